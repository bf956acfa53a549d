"""DIN on the embedded stand-in for the Douyin search log: the rival of lmn_douyin.py.

  ./launch.sh --config=configs/din_douyin.py

The log is generated, the paper's is private (lmn_jax/data/synthetic.py). Data, head, optimizer and
budget are those of lmn_douyin.py; only the model differs.

Cost: half a minute on 2 CPU cores. Result (test AUC over 3 seeds): .713 +- .004; the table
is in the README.
"""

from lmn_jax.config import douyin


def get_config():
  config = douyin('din')
  config.model.softmax = True
  config.optimizer.embedding.rate = 0.4
  return config
