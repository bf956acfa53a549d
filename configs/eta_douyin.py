"""ETA on the embedded stand-in for the Douyin search log: a rival of lmn_douyin.py.

  ./launch.sh --config=configs/eta_douyin.py

The log is generated, the paper's is private (lmn_jax/data/synthetic.py). Data, head, optimizer and
budget are those of din_douyin.py; only the model differs: fingerprints and their Hamming distance.

The rate of the embeddings was chosen on validation, of .2, .4, .8, with one seed. Cost: half a
minute on one CPU core. Result (test AUC, one seed):
.703; the table is in the README.
"""

from lmn_jax.config import douyin


def get_config():
  config = douyin('eta')
  config.model.top_k = 16  # of the 50 behaviours that a model sees
  config.optimizer.embedding.rate = 0.4
  return config
