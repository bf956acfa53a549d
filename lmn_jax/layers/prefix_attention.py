"""Softmax attention of one query over a growing history, by sums that can be carried."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Sums(NamedTuple):
  """Sums over events with scores a_s and values v_s, relative to the highest score.

  high: max_s a_s. weight: sum_s exp(a_s - high), 0 without events. value: [..., D],
  sum_s exp(a_s - high) v_s.
  """

  high: Float[Array, '...']
  weight: Float[Array, '...']
  value: Float[Array, '... D']


def no_events(B: Any, D: int) -> Sums:
  """Returns sums without events, [B]; B is an int, or symbolic in an export."""
  return Sums(jnp.zeros(B), jnp.zeros(B), jnp.zeros((B, D)))


def merge(a: Sums, b: Sums) -> Sums:
  """Returns the sums over the events of both."""
  lowest = jnp.finfo(jnp.float32).min
  high_a, high_b = (jnp.where(x.weight > 0, x.high, lowest) for x in (a, b))
  high = jnp.maximum(high_a, high_b)
  # Without events in both, all weights stay 0.
  part_a, part_b = jnp.exp(high_a - high), jnp.exp(high_b - high)
  return Sums(
    jnp.where(high > lowest, high, 0),
    part_a * a.weight + part_b * b.weight,
    part_a[..., None] * a.value + part_b[..., None] * b.value,
  )


def prefixes(
  score_BT: Float[Array, 'B T'],
  value_BTD: Float[Array, 'B T D'],
  mask_BT: Bool[Array, 'B T'],
  before: Sums,
) -> Sums:
  """Returns the sums after each event, [B, T].

  Args:
    score_BT, value_BTD: a and v. mask_BT: True on real events. before: sums of earlier events, [B].
  """
  weight_BT = mask_BT.astype(jnp.float32)
  events = Sums(jnp.where(mask_BT, score_BT, 0), weight_BT, weight_BT[:, :, None] * value_BTD)
  sums = jax.lax.associative_scan(merge, events, axis=1)
  before = jax.tree.map(lambda x, like: jnp.broadcast_to(x[:, None], like.shape), before, sums)
  return merge(before, sums)


def mean_of(sums: Sums) -> Float[Array, '... D']:
  """Returns `sum_s softmax(a)_s v_s`; zeros without events."""
  return sums.value / jnp.maximum(sums.weight, 1e-30)[..., None]


def last_of(sums: Sums) -> Sums:
  """Returns the sums after the last event, [B], of the sums after each event."""
  return jax.tree.map(lambda x: x[:, -1], sums)
