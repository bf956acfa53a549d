"""DMAN on generated histories whose next item depends on old events.

  ./launch.sh --config=configs/dman_xlong.py
  ./launch.sh --config=configs/dman_xlong.py:sasrec        # or any other next-item model

Each user has 1,000 events. One in twelve is a return to one of the ten favourites of the user, out
of two hundred goods; the others are chatter. The targets are favourites that are not among the
newest 100 events (lmn_jax/data/synthetic_interests.py). Users return to items, so met
items stay candidates. A window of 50 events has four returns. A model that knows the favourites has
HR@10 1, one that knows only that goods follow a cue .05.

3,000 steps take one CPU core 6 minutes. HR@10 of the test, mean of 2 seeds: DMAN .231, with the
newest events as memory (variant=fifo) .200, without memory (xl) .089, SASRec with a window of 50
events .052 (experiments/dman_tables.py --table=5; experiments/LOG.md, 2026-11-25). None has
converged by then.
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
