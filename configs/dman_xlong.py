"""DMAN on generated histories whose next item hangs on all that lies behind.

  ./launch.sh --config=configs/dman_xlong.py
  ./launch.sh --config=configs/dman_xlong.py:sasrec        # or any other next-item model

Users of 1,000 events each, in sessions of three behind a cue. An interest runs through the whole
history and shows in no window of it: two sessions in five are of one of the user's ten favourite
categories, of a hundred, and the items to be told are the first of such sessions
(lmn_jax/synthetic.py, `generate_interests`). The newest 50 events hold 12 sessions.

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
