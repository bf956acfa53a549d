"""DIN on the generated stand-in; my_criterion.py chooses its best checkpoint."""

from lmn_jax import config as configs


def get_config():
  config = configs.base('din')
  config.data = configs.douyin_data()
  config.criterion = 'my_criterion:order_and_calibration'
  return config
