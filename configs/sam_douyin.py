"""SAM on the embedded stand-in for the Douyin search log: a rival of lmn_douyin.py.

  ./launch.sh --config=configs/sam_douyin.py
  ./launch.sh --config=configs/sam_douyin.py --config.history_length=1000    # O(L) work and memory

The log is generated, the LMN paper's is private (lmn_jax/data/synthetic.py). Data, head, optimizer
and budget are those of lmn_douyin.py; only the model differs. Variants:
`--config.model.variant=2P`, `3P` (default), `3P+`; `--config.model.feedback=stk` asks with the
target in every pass.

The rate of the embeddings was chosen on validation, of .2, .4, .8, 1.6, 3.2, with one seed. Cost:
three quarters of a minute on one CPU core. Result (test AUC, one seed):
.721; the table is in the README.
"""

from lmn_jax.config import douyin


def get_config():
  config = douyin('sam')
  config.optimizer.embedding.rate = 1.6
  return config
