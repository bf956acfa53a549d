"""The click model of my_click_model.py on the generated stand-in."""

from lmn_jax import config as configs


def get_config():
  config = configs.base('my_click_model:Forgetting')
  config.data = configs.douyin_data()
  config.model.horizon = 20
  return config
