"""HPMN on MovieLens-1M: a rival of dman_movielens.py, with its data and protocol.

  ./launch.sh --config=configs/hpmn_movielens.py         # other sources: see dman_movielens.py

Lanes of users, the slots of the memory carried on.

Six epochs take one CPU core 8 to 12 minutes. Test, 2 seeds: HR@10 .302, HR@50 .557, NDCG@100 .251
(experiments/dman_tables.py; the log, 2026-11-25). The rate is that of the others, not tried for it.
"""

from lmn_jax.config import movielens_next


def get_config():
  config = movielens_next('hpmn')
  config.history_length = 20
  config.batch_size = 128
  config.steps = 2800
  config.eval_every = 1400
  return config
