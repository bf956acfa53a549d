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
  config.history_length = 50

  config.model.scale = 0.2
  config.model.softmax = True
  config.model.slots_per_axis = 256  # 65,536 slots
  config.model.top_k = 16
  config.model.positions = 1
  # A user axis and an item axis: best on validation, see experiments/LOG.md.
  config.model.query = 'axes'

  config.batch_size = 512
  config.steps = 1500
  config.optimizer.dense.rate = 2e-3
  config.optimizer.embedding.rate = 0.4
  config.optimizer.memory.rate = 0.15
  config.eval_every = 500
  return config
