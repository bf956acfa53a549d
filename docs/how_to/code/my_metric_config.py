"""DIN on the generated stand-in, chosen by the criterion of my_metric.py."""

from lmn_jax import config as configs


def get_config():
  config = configs.base('din')
  config.data = configs.douyin_data()
  config.metrics = ('my_metric:precision_of_the_top_tenth',)
  config.criterion = 'my_metric:order_and_calibration'
  return config
