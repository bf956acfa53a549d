"""SDM on MovieLens-1M: a rival of dman_movielens.py, with its data and protocol.

  ./launch.sh --config=configs/sdm_movielens.py         # other sources: see dman_movielens.py

Lanes of users; a segment of 20 events is the session.

Six epochs take one CPU core 4 minutes. Test, 2 seeds: HR@10 .280, HR@50 .540, NDCG@100 .235
(experiments/dman_tables.py; the log, 2026-11-25). The rate was chosen on validation.
"""

from lmn_jax.config import movielens_next


def get_config():
  config = movielens_next('sdm')
  config.history_length = 20
  config.batch_size = 128
  config.model.dropout = 0.2
  config.steps = 2800
  config.eval_every = 1400
  return config
