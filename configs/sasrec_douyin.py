"""SASRec on the embedded stand-in for the Douyin search log: a rival of lmn_douyin.py.

  ./launch.sh --config=configs/sasrec_douyin.py

The log is generated, the paper's is private (lmn_jax/data/synthetic.py). Data, head, optimizer and
budget are those of din_douyin.py; only the model differs: causal self-attention over the history.

The rate of the embeddings is the one found for DIN; none was searched for this model. Cost: eight
minutes on one CPU core. Result (test AUC, one seed):
.695; the table is in the README.
"""

from lmn_jax.config import douyin


def get_config():
  config = douyin('sasrec')
  config.optimizer.embedding.rate = 0.8
  return config
