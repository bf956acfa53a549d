"""The next film of MovieLens-100K: which film does a user rate next?

  ./launch.sh --config=configs/next_movielens_100k.py --config.data.source=FOLDER/ml-100k.inter
  ./launch.sh --config=configs/next_movielens_100k.py:dman --config.data.source=...  # or any other

The source is the atomic file of RecBole, with all ratings. Half of them have the same second as
another rating of the same user and are in the order of the file. Protocol: the last film of each
user is the test, the one before it validates, all films are ranked except those that the user has
rated.

A model takes one CPU core 1.5 to 4.5 minutes. Test, 3 seeds, HR@10: DMAN .208, Caser .206, GRU4Rec
.205, SASRec .202, HSTU .197; Markov .144 (experiments/LOG.md, 2026-11-26; SASRec then applied
dropout twice to its rows, and was not trained again). The rate was chosen on validation.
"""

from lmn_jax.config import data, next_item

LONG = ('sasrec', 'hstu', 'caser', 'gru4rec')  # the others read segments of 20 events


def get_config(model='sasrec'):
  log = data(
    name='movielens_100k_next',
    user='user_id',
    item='item_id',
    time='timestamp',
    label='',
    split=dict(protocol='leave_one_out'),
  )
  config = next_item(model, log)
  config.history_length = 100 if model in LONG else 20
  config.batch_size = 32 if model in LONG else 64
  config.model.dropout = 0.3
  config.optimizer.dense.rate = config.optimizer.embedding.rate = 1e-2
  config.optimizer.warmup_steps = 50
  config.steps = 1000
  config.eval_every = 100
  return config
