"""GRU4Rec on MovieLens-1M: a rival of dman_movielens.py, with its data and protocol.

  ./launch.sh --config=configs/gru4rec_movielens.py         # other sources: see dman_movielens.py

Lanes of users, the state carried from segment to segment.

Six epochs take one CPU core 3 to 4 minutes. Test, 2 seeds: HR@10 .311, HR@50 .560, NDCG@100 .250
(experiments/dman_tables.py; the log, 2026-11-25). The rate was chosen on validation.
"""

from lmn_jax.config import movielens_next


def get_config():
  config = movielens_next('gru4rec')
  config.history_length = 50
  config.batch_size = 64
  config.model.dropout = 0.2
  config.steps = 2260
  config.eval_every = 1130
  return config
