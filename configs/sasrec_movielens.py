"""SASRec on MovieLens-1M: a rival of dman_movielens.py, with its data and protocol.

  ./launch.sh --config=configs/sasrec_movielens.py         # other sources: see dman_movielens.py

Windows of 200 events, the full softmax over all films. As it was published, with one negative:
`--config.model.loss=bce --config.model.negatives=1`; gSASRec: `--config.model.loss=gbce
--config.model.negatives=256`.

Twelve epochs take one CPU core 7 minutes. Test, two seeds: HR@10 .307, HR@50 .562, NDCG@100 .250
(the log, 2026-11-27). The rate was chosen on validation, by trials of three epochs.
"""

from lmn_jax.config import movielens_next


def get_config():
  config = movielens_next('sasrec')
  config.history_length = 200
  config.batch_size = 32
  config.eval_batch_size = 16  # of a CPU: what its caches hold
  config.model.heads = 2
  config.model.dropout = 0.2
  config.steps = 1850
  config.eval_every = 925
  return config
