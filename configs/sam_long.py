"""SAM, or any other model, on a generated log of histories of 10,000 events.

  ./launch.sh --config=configs/sam_long.py
  ./launch.sh --config=configs/sam_long.py --config.history_length=50      # the newest events alone
  ./launch.sh --config=configs/sam_long.py:din                             # or any other model

The interests of a user are only in the events before the newest 1,000, and all of them only in all
10,000 (lmn_jax/data/synthetic.py, `generate_long`). So any model that reads 50 events has an AUC of
.5, and no model can have more than .98.

Cost: 6 minutes on one CPU core. Result (test AUC, one seed): SAM .958 with all events; .495 with
the newest 50 and .493 with the newest 1,000 (experiments/LOG.md).
"""

from lmn_jax.config import base, long_data


def get_config(model='sam'):
  config = base(model)
  config.data = long_data()
  config.history_length = 10_000
  config.model.scale = 1.0  # with smaller rows SAM learns more slowly (experiments/LOG.md)
  if 'attention' in config.model:
    config.model.attention = 16
  config.optimizer.dense.rate = 1e-3
  config.optimizer.embedding.rate = 0.15
  config.optimizer.embedding.initial_accumulator = 1e-7  # the rate was chosen with it
  config.batch_size = config.eval_batch_size = 32
  config.steps = 800
  config.eval_every = 400
  return config
