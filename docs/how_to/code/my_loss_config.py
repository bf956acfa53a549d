"""DIN on the generated stand-in, or GRU4Rec on generated interests, with a loss of my_loss.py."""

from lmn_jax import config as configs


def get_config(task):
  if task == 'click':
    config = configs.base('din')
    config.data = configs.douyin_data()
    config.model.loss = 'my_loss:focal_loss'
  else:
    config = configs.base('gru4rec', 'next_item')
    config.data = configs.interests_data()
    config.model.loss = 'my_loss:bpr_loss'
    config.model.negatives = 8
  return config
