"""SIM on the embedded stand-in for the Douyin search log: a rival of lmn_douyin.py.

  ./launch.sh --config=configs/sim_douyin.py

The log is generated, the paper's is private (lmn_jax/data/synthetic.py). Data, head, optimizer and
budget are those of din_douyin.py; only the model differs: the newest behaviours of the target's
category, then attention.

The rate of the embeddings was chosen on validation, of .2, .4, .8, 1.6, 3.2, with one seed. Cost:
half a minute on one CPU core. Result (test AUC, one seed):
.696; the table is in the README.
"""

from lmn_jax.config import douyin


def get_config():
  config = douyin('sim')
  config.model.top_k = 16  # of the 50 behaviours that a model sees
  config.model.search = 'hard'  # by category, the one the paper serves
  config.optimizer.embedding.rate = 1.6
  return config
