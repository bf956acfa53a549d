"""DIN that predicts the dwell time of an impression, in seconds."""

from lmn_jax import config as configs


def get_config():
  config = configs.base('din')
  config.data = configs.data(
    name='dwell', source='log.csv', label='dwell', label_kind='number', history='all'
  )
  config.model.loss = 'huber'
  config.model.delta = 0.5
  return config
