"""Pooling on the embedded stand-in for the Douyin search log: a rival of lmn_douyin.py.

  ./launch.sh --config=configs/pooling_douyin.py

The log is generated, the paper's is private (lmn_jax/synthetic.py). Data, head, optimizer and
budget are those of lmn_douyin.py; only the model differs.
"""

from lmn_jax.config import base, douyin


def get_config():
  config = base('pooling')
  config.data = douyin()
  config.history_length = 50

  config.model.scale = 0.2

  config.batch_size = 512
  config.steps = 1500
  config.optimizer.dense.rate = 2e-3
  config.optimizer.embedding.rate = 0.4
  config.eval_every = 500
  return config
