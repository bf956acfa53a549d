"""LMN on the generated stand-in for the Douyin e-commerce search log.

  ./launch.sh --config=configs/lmn_douyin.py               # other models: configs/douyin.py:MODEL

The log of the paper is private: this one is generated (lmn_jax/data/synthetic.py), and no number
measured on it is a number of the paper. `slots_per_axis` sets the size of the memory, which has its
square of slots: `--config.model.slots_per_axis=1024` trains a million.

Cost: a minute and a half on 2 CPU cores. Result (test AUC over 3 seeds): .735 +- .0003; the table
is in docs/explanation/results.md.
"""

from lmn_jax.config import douyin


def get_config():
  config = douyin('lmn')
  config.model.softmax = True
  config.model.slots_per_axis = 256  # 65,536 slots
  config.model.top_k = 16
  config.model.positions = 1
  # One axis for the user, one for the item: best on validation (experiments/LOG.md).
  config.model.query = 'axes'
  config.optimizer.embedding.rate = 0.06
  config.optimizer.memory.rate = 0.03
  return config
