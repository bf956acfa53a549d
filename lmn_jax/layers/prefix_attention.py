"""Softmax attention of one query over a history that goes on: sums that can be carried."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Sums(NamedTuple):
  """Of events with scores a_s and values v_s, relative to the highest score so that none overflows.

  high: max a_s. weight: sum_s exp(a_s - high), 0 for no event. value [..., D]: the same sum of v_s.
  """

  high: Float[Array, '...']
  weight: Float[Array, '...']
  value: Float[Array, '... D']


def nothing(B: Any, D: int) -> Sums:
  """Sums of no event, [B]; an export has a B that is no number yet."""
  return Sums(jnp.zeros(B), jnp.zeros(B), jnp.zeros((B, D)))


def merge(a: Sums, b: Sums) -> Sums:
  """The sums of the events of both."""
  lowest = jnp.finfo(jnp.float32).min
  high_a, high_b = (jnp.where(x.weight > 0, x.high, lowest) for x in (a, b))
  high = jnp.maximum(high_a, high_b)
  # Where there is no event in either, nothing is weighed.
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
  """The sums after each event, [B, T].

  Args:
    score_BT, value_BTD: a and v. mask_BT: which events there are. before: of earlier events, [B].
  """
  there_BT = mask_BT.astype(jnp.float32)
  own = Sums(jnp.where(mask_BT, score_BT, 0), there_BT, there_BT[:, :, None] * value_BTD)
  sums = jax.lax.associative_scan(merge, own, axis=1)
  before = jax.tree.map(lambda x, like: jnp.broadcast_to(x[:, None], like.shape), before, sums)
  return merge(before, sums)


def mean_of(sums: Sums) -> Float[Array, '... D']:
  """`sum_s softmax(a)_s v_s`; zeros for no event."""
  return sums.value / jnp.maximum(sums.weight, 1e-30)[..., None]


def last_of(sums: Sums) -> Sums:
  """The sums after the last event, [B], of those after each."""
  return jax.tree.map(lambda x: x[:, -1], sums)
