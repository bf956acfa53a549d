"""DMAN on generated histories whose next item hangs on all that lies behind.

  ./launch.sh --config=configs/dman_xlong.py
  ./launch.sh --config=configs/dman_xlong.py:sasrec        # or any other next-item model

Users of 1,000 events each. An interest runs through the whole history, one session in five, and
shows in no window of it: the items to be told are of the user's favourite categories, which come
twice as often as others (lmn_jax/synthetic.py, `generate_interests`). A model of the newest 50
events has seen each favourite .7 times.

Cost and result: not measured yet.
"""

from lmn_jax.config import base, interests_data


def get_config(model='dman'):
  config = base(model, 'next_item')
  config.data = interests_data()
  config.history_length = 50
  config.batch_size = 64
  config.eval_batch_size = 128
  config.model.width = 32
  config.model.scale = 0.1
  config.optimizer.embedding.name = 'adam'
  config.optimizer.dense.rate = config.optimizer.embedding.rate = 2e-3
  config.steps = 3000
  config.eval_every = 1000
  return config
