"""DMAN on generated histories whose next item hangs on what lies far behind.

  ./launch.sh --config=configs/dman_xlong.py
  ./launch.sh --config=configs/dman_xlong.py:sasrec        # or any other next-item model

Users of 1,000 events each, who come back to ten favourites of two hundred goods, one in twelve
events, amid chatter; what is to be told are favourites that the newest 100 events do not show
(lmn_jax/data/synthetic_interests.py). Users come back to items, so what they have met
stays a candidate. A window of 50 events shows four visits. HR@10 of who knows the favourites is 1,
of who knows that goods follow a cue .05.

3,000 steps take one CPU core 6 minutes. HR@10 of the test, mean of 2 seeds: DMAN .231, with the
newest events for a memory (variant=fifo) .200, without one (xl) .089, SASRec's window of 50 events
.052 (experiments/dman_tables.py --table=5; the log, 2026-11-25). None has learned all by then.
"""

from lmn_jax.config import base, interests_data


def get_config(model='dman'):
  config = base(model, 'next_item')
  config.data = interests_data()
  config.exclude_seen = False
  config.history_length = 50
  config.batch_size = 64
  config.eval_batch_size = 128
  config.model.scale = 0.1
  config.optimizer.embedding.name = 'adam'
  config.optimizer.dense.rate = config.optimizer.embedding.rate = 4e-3
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_steps = 100
  config.optimizer.clip_norm = 1.0
  config.steps = 3000
  config.eval_every = 1000
  return config
