"""Pooling on a log of Feather files that my_reader.py reads."""

from lmn_jax import config as configs


def get_config():
  config = configs.base('pooling')
  config.data.source = 'log-*.feather'
  config.data.format = 'my_reader:Feather'
  config.data.name = 'feather'
  return config
