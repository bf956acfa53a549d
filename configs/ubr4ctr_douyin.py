"""UBR4CTR on the embedded stand-in for the Douyin search log: a rival of lmn_douyin.py.

  ./launch.sh --config=configs/ubr4ctr_douyin.py

The log is generated, the paper's is private (lmn_jax/data/synthetic.py). Data, head, optimizer and
budget are those of din_douyin.py; only the model differs: a learnt query of the target's features.

The rate of the embeddings was chosen on validation, of .1, .2, .4, .8, with one seed. Cost: half a
minute on one CPU core. Result (test AUC, one seed):
.686; the table is in the README.
"""

from lmn_jax.config import douyin


def get_config():
  config = douyin('ubr4ctr')
  config.model.top_k = 16  # of the 50 behaviours that a model sees
  config.optimizer.embedding.rate = 0.2
  return config
