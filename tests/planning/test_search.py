"""The largest sizes that fit: the search itself, and with a formula for the cost of a step."""

import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmn_jax.planning import hlo, plan, search, slices
from lmn_jax.planning.traffic import Traffic
from tests.runs import tiny_config


@given(
  st.lists(st.integers(1, 10**6), min_size=1, max_size=30, unique=True), st.data(),
  st.floats(0, 2), st.floats(1e-9, 1e-2), st.sampled_from([1, 2]), st.floats(1, 3),
)  # fmt: skip
def test_the_largest_size(sizes, data, least, slope, degree, bound):
  """Compared with trying all sizes; shares above a bound are inf."""
  sizes = sorted(sizes)
  tried = []

  def share(size):
    tried.append(size)
    value = least + slope * size**degree
    return value if value <= bound else math.inf

  size, part = search.largest(sizes, data.draw(st.sampled_from(sizes)), share, degree)
  fit = [size for size in sizes if share(size) <= 1]
  assert size == (fit[-1] if fit else None)
  assert part == (share(size) if fit else math.inf)
  tried = tried[: -len(sizes) - bool(fit)]
  # The result and the next larger size were tried, and no size twice.
  assert {*fit[-1:], *sizes[len(fit) : len(fit) + 1]} <= set(tried)
  assert len(tried) == len(set(tried))


def test_few_sizes_are_tried():
  tried = []

  def share(size):
    tried.append(size)
    return 0.01 + size**2 / 20_000**2

  sizes = [2**k for k in range(16)]
  assert search.largest(sizes, 256, share, 2)[0] == 16_384
  assert len(tried) <= 4


@pytest.fixture
def searched(monkeypatch, tiny_store):
  """Searches with a formula: an example takes 1000 bytes, a slot 100; and the sizes tried."""
  tried = []

  def step(config, setup, chip):
    slots = config.model.get('slots_per_axis', 0)
    tried.append((config.batch_size, slots))
    size = slots**2 * 100 + config.batch_size * 1000
    cost = hlo.Cost(size, 0, 0, 1.0, 1.0, [], Traffic([], []))
    return setup.trainer.abstract, {}, cost if cost.total <= chip.hbm * 2**30 else None

  def searched(config, mib):
    tried.clear()
    chip = slices.Chip(mib / 1024, 819, 197, 200, 1.5, '2x4')
    monkeypatch.setitem(slices.CHIPS, 'v5e', chip)
    lines = list(search.search(plan.plan(config, tiny_store, 'v5e:2x4')))
    assert len(tried) == len(set(tried)) < 8
    return lines

  monkeypatch.setattr(plan, 'step', step)
  monkeypatch.setattr(plan, 'slice_of', lambda topology: jax.devices())
  return searched


def test_the_largest_sizes_that_fit(searched):
  assert searched(tiny_config('lmn'), 16 * 1024) == [
    'batch_size: about 17,179,856 would fit, extrapolated from 32 (0.0% of the memory) and 256 '
    '(0.0%)',
    'model.slots_per_axis: 8,192 fits (39.1% of the memory), 16,384 does not',
  ]
  assert searched(tiny_config('lmn'), 1024**2)[1].endswith('46,340 fits (19.5% of the memory)')
  assert searched(tiny_config(), 1) == [
    'batch_size: about 1,048 would fit, extrapolated from 32 (3.1% of the memory) and 256 (24.4%)'
  ]
  assert searched(tiny_config(), 0.1) == ['batch_size: 32 fits, 256 does not']


def test_nothing_fits(searched):
  assert searched(tiny_config('lmn'), 0.001) == [
    'batch_size: 32 does not fit', 'model.slots_per_axis: not even 4 fits'
  ]  # fmt: skip


def test_a_compilation_is_announced(searched, caplog):
  caplog.set_level('INFO', logger='lmn_jax')
  searched(tiny_config(), 1)
  first, second, third = (record.getMessage() for record in caplog.records)
  assert first == 'compiling the step for v5e:2x4: one to four minutes of a CPU core'
  assert second == 'compiling with batch_size=256: about 0 s, longer for larger batches'
  assert third == 'batch_size=256 takes 24.4% of the memory'
