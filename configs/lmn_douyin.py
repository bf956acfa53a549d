"""LMN on the embedded stand-in for the Douyin e-commerce search log.

  ./launch.sh --config=configs/lmn_douyin.py

The paper's log is private: this one is generated (lmn_jax/synthetic.py), and no number made with
it is a number of the paper. The dial is `slots_per_axis`: the memory has its square of slots, so
`--config.model.slots_per_axis=1024` trains a million.
"""

from lmn_jax.config import base, douyin


def get_config():
  config = base('lmn')
  config.data = douyin()
  config.model.top_k = 16
  config.model.positions = 1
  return config
