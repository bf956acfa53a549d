"""HSTU on MovieLens-1M: a rival of dman_movielens.py, with its data and protocol.

  ./launch.sh --config=configs/hstu_movielens.py         # other sources: see dman_movielens.py

Windows of 200 events, the full softmax over all films.

Twelve epochs take one CPU core 8 minutes. Test, 2 seeds: HR@10 .319, HR@50 .580, NDCG@100 .260
(experiments/dman_tables.py; the log, 2026-11-25). The rate was chosen on validation.
"""

from lmn_jax.config import movielens_next


def get_config():
  config = movielens_next('hstu')
  config.history_length = 200
  config.batch_size = 32
  config.eval_batch_size = 16  # of a CPU: what its caches hold
  config.model.heads = 2
  config.model.dropout = 0.2
  config.steps = 1850
  config.eval_every = 925
  return config
