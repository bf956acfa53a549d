"""DMAN on MovieLens-1M: which film does a user rate next?

  ./launch.sh --config=configs/dman_movielens.py           # downloads it through TFDS; [tfds] extra
  ./launch.sh --config=configs/dman_movielens.py --config.data.source=FOLDER/ratings.dat
                                                           # from ml-1m.zip of GroupLens
  ./launch.sh --config=configs/dman_movielens.py --config.data.source=FOLDER/sequences.tsv
                                                           # one line per user, films in time order
  ./launch.sh --config=configs/dman_movielens.py --mode=states --events=FOLDER/new.tsv
                                                           # states of users, with new events

Protocol: the last film of each user is the test, the one before it validates, all films are ranked
except those that the user has rated (lmn_jax/config.py, movielens_next). Other models:
configs/movielens_next.py. Ablations of table 5 of the paper: `--config.model.variant=xl`, `fifo`,
`nran`. Routing maps: `--config.model.routing_map=shared`, `per_capsule`, `per_pair`.

Six epochs take one CPU core 8 minutes. Test, 2 seeds: HR@10 .308, HR@50 .570, NDCG@100 .254; the
paper has .252, .532, .220 (experiments/dman_tables.py; experiments/LOG.md, 2026-11-25). The rate
was chosen on validation, by trials of three epochs.
"""

from lmn_jax.config import movielens_next


def get_config():
  config = movielens_next('dman')
  config.history_length = 20  # T, events of a segment
  config.batch_size = 128  # lanes
  config.model.dropout = 0.2
  config.steps = 2800
  config.eval_every = 1400
  return config
