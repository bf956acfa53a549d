"""DMAN on MovieLens-1M: which film does a user rate next?

  ./launch.sh --config=configs/dman_movielens.py           # downloads it through TFDS; [tfds] extra
  ./launch.sh --config=configs/dman_movielens.py --config.data.source=FOLDER/ratings.dat
                                                           # GroupLens' ml-1m.zip
  ./launch.sh --config=configs/dman_movielens.py --config.data.source=FOLDER/sequences.tsv
                                                           # one line a user, films in time order
  ./launch.sh --config=configs/dman_movielens.py --mode=states --events=FOLDER/new.tsv
                                                           # every user's memory, and new events

Protocol: each user's last film is the test, the one before it validates, all films are ranked but
those the user has rated (lmn_jax/config.py, movielens_next). Ablations of the paper's table 5:
`--config.model.variant=xl`, `fifo`, `nran`. Routing maps: `--config.model.routing_map=shared`,
`per_capsule`, `per_pair`.

Settings by validation, one seed: its HR@10 is .3109, HR@50 .5818, NDCG@100 .2482 (the log,
2026-11-23). 4,800 steps of 128 lanes, 12 epochs, took one CPU core 22 minutes with other work
beside it. The test was not looked at yet.
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
