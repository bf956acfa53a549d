"""MIMN on the embedded stand-in for the Douyin search log: a rival of lmn_douyin.py.

  ./launch.sh --config=configs/mimn_douyin.py

The log is generated, the paper's is private (lmn_jax/data/synthetic.py). Data, head, optimizer and
budget are those of din_douyin.py; only the model differs: a small memory of each user's own.

The rate of the embeddings is one tried for DIN (as good as its own); none was searched for this
model. Cost and result: not measured yet.
"""

from lmn_jax.config import douyin


def get_config():
  config = douyin('mimn')
  config.optimizer.embedding.rate = 0.8
  return config
