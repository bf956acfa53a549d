"""The models to compare with LMN, on the generated stand-in for the Douyin search log.

  ./launch.sh --config=configs/douyin.py:din               # or any other model of the table
  ./launch.sh --config=configs/douyin.py:sam --config.history_length=1000    # O(L) work and memory

The log is generated, because that of the LMN paper is private (lmn_jax/data/synthetic.py). Data,
head, optimizer and steps are those of lmn_douyin.py, the config of LMN; only the model differs. A
model that is not in the table, such as MODULE:CLASS, has the rate of DIN.

Test AUC of 1,500 steps, the rate of the embeddings, and the minutes on one CPU core (*: on two):

  | model   | rate | test AUC       | minutes | rate chosen on validation among    |
  |---------|------|----------------|---------|------------------------------------|
  | pooling | .4   | .695 +- .003   | .5 *    | see experiments/LOG.md             |
  | din     | .4   | .713 +- .004   | .5 *    | see experiments/LOG.md             |
  | sam     | 1.6  | .721, one seed | .75     | .2, .4, .8, 1.6, 3.2               |
  | twin    | .4   | .708, one seed | .5      | .2, .4, .8                         |
  | eta     | .4   | .703, one seed | .5      | .2, .4, .8                         |
  | sdim    | .4   | .703, one seed | .5      | .2, .4, .8                         |
  | sim     | 1.6  | .696, one seed | .5      | .2, .4, .8, 1.6, 3.2               |
  | sasrec  | .8   | .695, one seed | 8       | not searched: tried for DIN        |
  | ubr4ctr | .2   | .686, one seed | .5      | .1, .2, .4, .8                     |
  | bst     | .8   | .602, one seed | 9       | not searched: tried for DIN        |
  | dien    | .8   | not measured   |         | not searched: tried for DIN        |
  | mimn    | .8   | not measured   |         | not searched: tried for DIN        |

Three seeds where there is a deviation; the whole table is in docs/explanation/results.md. Variants
of SAM: `--config.model.variant=2P`, `3P` (default), `3P+`; with `--config.model.feedback=stk` every
pass has the target in its query.
"""

from lmn_jax.config import douyin
from lmn_jax.errors import UserError

# Peak rate of Adagrad for the embeddings.
RATES = dict(
  pooling=0.4, din=0.4, sam=1.6, twin=0.4, eta=0.4, sdim=0.4, sim=1.6, sasrec=0.8, ubr4ctr=0.2,
  bst=0.8, dien=0.8, mimn=0.8,
)  # fmt: skip
# Fields of the section `model` that differ from the defaults of the model; top_k is out of the 50
# events that a model reads.
FIELDS = dict(
  din=dict(softmax=True),
  twin=dict(top_k=16),
  eta=dict(top_k=16),
  sim=dict(top_k=16, search='hard'),  # by category, as the paper serves it
  ubr4ctr=dict(top_k=16),
)


def get_config(model='din'):
  if model == 'lmn':
    raise UserError('LMN has a config of its own; use --config=lmn_douyin')
  config = douyin(model)
  config.model.update(FIELDS.get(model, {}))
  config.optimizer.embedding.rate = RATES.get(model, RATES['din'])
  return config
