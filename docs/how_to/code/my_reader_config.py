"""Pooling on a log in Feather files, which my_reader.py reads."""

from lmn_jax import config as configs


def get_config():
  config = configs.base('pooling')
  config.data.name = 'feather'
  config.data.source = 'log-*.feather'
  config.data.format = 'my_reader:Feather'
  return config
