"""The next film of MovieLens-100K: which film does a user rate next?

  ./launch.sh --config=configs/next_movielens_100k.py --config.data.source=FOLDER/ml-100k.inter
  ./launch.sh --config=configs/next_movielens_100k.py:dman --config.data.source=...  # or another

The source is RecBole's atomic file, ratings of any number of stars; half of them share their second
with another of the same user and stand in the file's order. Protocol: each user's last film is the
test, the one before it validates, all films are ranked but those the user has rated.

Cost and result: not measured yet.
"""

from lmn_jax.config import base, data

WINDOWS = ('sasrec', 'hstu', 'caser', 'gru4rec')  # the others take segments of 20


def get_config(model='sasrec'):
  config = base(model, 'next_item')
  config.data = data(
    name='movielens_100k_next',
    user='user_id',
    item='item_id',
    time='timestamp',
    label='',
    split=dict(protocol='leave_one_out'),
  )
  config.history_length = 100 if model in WINDOWS else 20
  config.batch_size = 32 if model in WINDOWS else 64
  config.eval_batch_size = 64
  config.model.width = 64
  config.model.scale = 0.1
  config.model.dropout = 0.3
  config.optimizer.embedding.name = 'adam'
  config.optimizer.dense.rate = config.optimizer.embedding.rate = 1e-3
  config.steps = 1000
  config.eval_every = 100
  return config
