"""SHAN on MovieLens-1M: a rival of dman_movielens.py, with its data and protocol.

  ./launch.sh --config=configs/shan_movielens.py         # other sources: see dman_movielens.py

Lanes of users; a segment of 20 events is the short-term set.

Six epochs take one CPU core 3 to 7 minutes. Test, 2 seeds: HR@10 .203, HR@50 .449, NDCG@100 .186
(experiments/dman_tables.py; the log, 2026-11-25). The rate was chosen on validation.
"""

from lmn_jax.config import movielens_next


def get_config():
  config = movielens_next('shan')
  config.history_length = 20
  config.batch_size = 128
  config.steps = 2800
  config.eval_every = 1400
  return config
