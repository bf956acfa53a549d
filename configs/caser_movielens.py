"""Caser on MovieLens-1M: a rival of dman_movielens.py, with its data and protocol.

  ./launch.sh --config=configs/caser_movielens.py         # other sources: see dman_movielens.py

Windows of 50 events, of which each position reads the last five.

Six epochs take one CPU core 6 minutes. Test, 2 seeds: HR@10 .305, HR@50 .554, NDCG@100 .249
(experiments/dman_tables.py; the log, 2026-11-25). The rate is that of the others, not tried for it.
"""

from lmn_jax.config import movielens_next


def get_config():
  config = movielens_next('caser')
  config.history_length = 50
  config.batch_size = 64
  config.model.dropout = 0.2
  config.steps = 2120
  config.eval_every = 1060
  return config
