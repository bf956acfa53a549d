"""BST on the embedded stand-in for the Douyin search log: a rival of lmn_douyin.py.

  ./launch.sh --config=configs/bst_douyin.py

The log is generated, the paper's is private (lmn_jax/data/synthetic.py). Data, head, optimizer and
budget are those of din_douyin.py; only the model differs: self-attention over the history and the
target.

The rate of the embeddings is the one found for DIN; none was searched for this model. Cost: nine
minutes on one CPU core. Result (test AUC, one seed):
.602; the table is in the README.
"""

from lmn_jax.config import douyin


def get_config():
  config = douyin('bst')
  config.optimizer.embedding.rate = 0.8
  return config
