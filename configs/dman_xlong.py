"""DMAN on generated histories whose next item hangs on what lies far back.

  ./launch.sh --config=configs/dman_xlong.py
  ./launch.sh --config=configs/dman_xlong.py:sasrec        # or any other next-item model

Each user has favourite categories, which show at the beginning of the history and then in a return
now and then, a hundred events apart; the items to be told are such returns (lmn_jax/synthetic.py,
`generate_returns`). A model of the newest 50 events has seen one of them, and knows little.

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
