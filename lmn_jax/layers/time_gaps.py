"""Time between an event and a request: its logarithmic bucket, a row or a bias for each bucket."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

BUCKETS = 128
STEP = 0.301  # natural logarithm of the ratio of two successive bounds of a bucket
TIMES = ('none', 'buckets', 'bias')  # values of config.model.time


class Times(NamedTuple):
  """When the events of a sequence took place, and when a request followed each.

  time_BT: seconds after a common zero, int32 or float32. gap_BT: float32, seconds from the event to
  the request that the vector at its position answers.
  """

  time_BT: Num[Array, 'B T']
  gap_BT: Float[Array, 'B T']


def bucket(gap: Float[Array, '...']) -> Int[Array, '...']:
  """Computes `min(127, floor(log(max(1, gap)) / .301))`: int32.

  It is the bucketing of the authors' code of HSTU. [code] A bucket ends at 1.35 times its begin;
  bucket 0 has the gaps below 1.35 seconds, 37 a day, 57 a year.

  Args:
    gap: seconds.
  """
  log = jnp.log(jnp.maximum(gap, 1))
  return jnp.minimum((log / STEP).astype(jnp.int32), BUCKETS - 1)


def times_of_history(gap_BL: Float[Array, 'B L'], mask_BL: Bool[Array, 'B L']) -> Times:
  """Returns the times of a history: zero is the request, and the request of an event the next one.

  Args:
    gap_BL: `time_gap` of a batch of clicks; the request after the newest event is that of the
      batch. mask_BL: True on real events.
  """
  gap_BL = jnp.where(mask_BL, gap_BL, 0)
  next_BL = jnp.pad(gap_BL[:, 1:], ((0, 0), (0, 1)))
  return Times(-gap_BL, gap_BL - next_BL)


def pair_buckets(
  time_BP: Num[Array, 'B P'], gap_BP: Float[Array, 'B P'], time_BS: Num[Array, 'B S']
) -> Int[Array, 'B P S']:
  """Computes the bucket of `|time_p + gap_p - time_s|`, from event s to the request at p.

  Args:
    time_BP, gap_BP: `Times` of the queries. time_BS: those of the keys.
  """
  # Differences before sums: int32 seconds are exact, and float32 has 24 bits.
  apart_BPS = (time_BP[:, :, None] - time_BS[:, None, :]).astype(jnp.float32)
  return bucket(jnp.abs(apart_BPS + gap_BP[:, :, None]))


class TimeBias(nn.Module):
  """The scalars that an attention adds to its scores, one for each bucket of a gap.

  All heads share them, and their initial standard deviation is .02, as in the authors' code of
  HSTU. [code]
  """

  @nn.compact
  def __call__(self) -> Float[Array, 'N']:
    """Returns the scalars, float32."""
    return self.param('bias', nn.initializers.normal(0.02), (BUCKETS,))
