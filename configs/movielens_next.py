"""The models to compare with DMAN on MovieLens-1M: which film does a user rate next?

  ./launch.sh --config=configs/movielens_next.py:hstu      # or any other model of the table

Data, protocol and other sources are those of dman_movielens.py, the config of DMAN. Test, mean of
two seeds, and the minutes on one CPU core (experiments/dman_tables.py; experiments/LOG.md,
2026-11-25 and, for SASRec, 2026-11-27):

  | model   | HR@10 | HR@50 | NDCG@100 | epochs | minutes | reads                                 |
  |---------|-------|-------|----------|--------|---------|---------------------------------------|
  | hstu    | .319  | .580  | .260     | 12     | 8       | windows of 200 events                 |
  | gru4rec | .311  | .560  | .250     | 6      | 3-4     | lanes with a carried state            |
  | sasrec  | .307  | .562  | .250     | 12     | 7       | windows of 200 events                 |
  | caser   | .305  | .554  | .249     | 6      | 6       | windows of 50, 5 for each position    |
  | hpmn    | .302  | .557  | .251     | 6      | 8-12    | lanes with carried slots              |
  | sdm     | .280  | .540  | .235     | 6      | 4       | lanes, segments of 20 as sessions     |
  | shan    | .203  | .449  | .186     | 6      | 3-7     | lanes, segments of 20 as short term   |

All use the softmax over all films. The rate was chosen on validation for each except Caser and
HPMN, which have that of the others. SASRec as published, with one negative:
`--config.model.loss=bce --config.model.negatives=1`; gSASRec: `--config.model.loss=gbce
--config.model.negatives=256`. A model that is not in the table, such as MODULE:CLASS, reads
segments as SDM does.
"""

from lmn_jax.config import movielens_next
from lmn_jax.errors import UserError

# By model: events of a window or segment, lanes of a batch, steps.
SIZES = dict(
  sasrec=(200, 32, 1850), hstu=(200, 32, 1850), caser=(50, 64, 2120), gru4rec=(50, 64, 2260),
  hpmn=(20, 128, 2800), sdm=(20, 128, 2800), shan=(20, 128, 2800),
)  # fmt: skip
# Fields of the section `model` that differ from the defaults of the model.
FIELDS = dict(
  sasrec=dict(heads=2, dropout=0.2),
  hstu=dict(heads=2, dropout=0.2),
  caser=dict(dropout=0.2),
  gru4rec=dict(dropout=0.2),
  sdm=dict(dropout=0.2),
)


def get_config(model='sasrec'):
  if model == 'dman':
    raise UserError('DMAN has a config of its own; use --config=dman_movielens')
  config = movielens_next(model)
  config.history_length, config.batch_size, config.steps = SIZES.get(model, SIZES['sdm'])
  config.eval_every = config.steps // 2
  if config.history_length == 200:
    config.eval_batch_size = 16  # fits the caches of a CPU
  config.model.update(FIELDS.get(model, {}))
  return config
