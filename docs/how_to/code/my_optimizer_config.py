"""DIN on the generated stand-in with Lion for the dense parameters."""

from lmn_jax import config as configs


def get_config():
  config = configs.base('din')
  config.data = configs.douyin_data()
  config.optimizer.dense.name = 'lion'
  config.optimizer.dense.rate = 3e-4
  config.optimizer.dense.arguments = dict(b1=0.95, b2=0.98, weight_decay=1e-3)
  config.optimizer.embedding.name = 'rowwise_adagrad'
  return config
