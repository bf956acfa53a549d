"""DIN with two labels: clicks, and orders, which only some rows have."""

from lmn_jax import config as configs


def get_config():
  config = configs.base('din')
  config.data = configs.data(
    name='shop', source='log.csv', labels=('click', 'order'), weight='importance'
  )
  config.model.label_head = 'mmoe'
  config.model.experts = 4
  config.model.tower = (32,)
  config.model.label_weights = (1.0, 2.0)
  config.criterion = 'order/auc'
  return config
