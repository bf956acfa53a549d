"""A loss for each task."""

import jax
import jax.numpy as jnp
import optax


def focal_loss(logit_B, label_B, weight_B):
  """Clicks: `-(1 - p)^2 log p`, p the probability of the label (Lin et al. 2017, equation 4)."""
  nats_B = optax.sigmoid_binary_cross_entropy(logit_B, label_B)
  focus_B = (1 - jnp.exp(-nats_B)) ** 2
  return jnp.sum(weight_B * focus_B * nats_B) / jnp.maximum(jnp.sum(weight_B), 1e-6)


def bpr_loss(target_BT, negative_BTN, valid_BTN, weight_BT):
  """Next items: `-log sigmoid(s - s_n)`, the mean over negatives (Rendle et al. 2009)."""
  nats_BTN = -jax.nn.log_sigmoid(target_BT[:, :, None] - negative_BTN)
  count_BT = jnp.maximum(jnp.sum(valid_BTN, axis=-1), 1).astype(jnp.float32)
  nats_BT = jnp.sum(jnp.where(valid_BTN, nats_BTN, 0), axis=-1) / count_BT
  return jnp.sum(weight_BT * nats_BT) / jnp.maximum(jnp.sum(weight_BT), 1e-6)
