"""SDIM on the embedded stand-in for the Douyin search log: a rival of lmn_douyin.py.

  ./launch.sh --config=configs/sdim_douyin.py

The log is generated, the paper's is private (lmn_jax/data/synthetic.py). Data, head, optimizer and
budget are those of din_douyin.py; only the model differs: sums of what collides with the target in
a hash.

The rate of the embeddings was chosen on validation, of .2, .4, .8, with one seed. Cost: half a
minute on one CPU core. Result (test AUC, one seed):
.703; the table is in the README.
"""

from lmn_jax.config import douyin


def get_config():
  config = douyin('sdim')
  config.optimizer.embedding.rate = 0.4
  return config
