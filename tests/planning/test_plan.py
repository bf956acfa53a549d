"""The plan for a slice, on eight simulated devices and with the TPU compiler."""

import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmn_jax.config import base
from lmn_jax.planning import hlo, plan, slices
from lmn_jax.training import setup as setups
from tests.runs import tiny_config, tiny_next


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

  size, part = plan.largest(sizes, data.draw(st.sampled_from(sizes)), share, degree)
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
  assert plan.largest(sizes, 256, share, 2)[0] == 16_384
  assert len(tried) <= 4


@pytest.fixture
def planned(monkeypatch, tiny_store):
  """Plans for eight simulated devices instead of a slice, each with some MiB of memory."""

  def planned(config, mib):
    chip = slices.Chip(mib / 1024, 819, 197, 200, '2x4')
    monkeypatch.setitem(slices.CHIPS, 'v5e', chip)
    monkeypatch.setattr(plan, 'slice_of', lambda topology: jax.devices())
    return plan.plan(config, tiny_store, 'v5e:2x4')

  return planned


def test_a_plan(monkeypatch, planned, tiny_store):
  monkeypatch.setattr(plan, 'most_examples', lambda config, setup, chip, cost: 'batch_size')
  text = planned(tiny_config(), 3)
  assert text.startswith(
    f'pooling on {tiny_store.path.name}, batches of 32, on v5e:2x4: 8 chips, mesh data 8 x '
    'model 1; for each '
  )
  setup = setups.set_up(tiny_config(), tiny_store)
  tables = sum(x.size * 4 for x in jax.tree.leaves(setup.trainer.abstract.tables) if x.ndim) / 8
  (mebibytes,) = re.findall(r'^tables and their optimizer +([\d.]+) ', text, re.M)
  assert float(mebibytes) == pytest.approx(tables / 2**20, abs=0.06)
  for line in ('temporaries', 'together', 'operations', 'memory traffic', 'from other chips'):
    assert re.search(rf'^{line} +[\d.]+ ', text, re.M), text
  assert re.search(r'^roofline: [\d.]+ ms a step, bound by .*; [\d,]+ examples/s$', text, re.M)
  assert re.search(r'^all-reduce f32\S* .* +\d+ +[\d.]+$', text, re.M)
  assert re.search(r'^copies of the rows of \S+, f32\[64,4\]: \d+, [\d.]+ MB$', text, re.M)
  assert text.endswith('\n\nbatch_size')


@pytest.mark.slow
def test_a_plan_of_next_items(monkeypatch, planned):
  monkeypatch.setattr(plan, 'most_examples', lambda config, setup, chip, cost: 'batch_size')
  text = planned(tiny_next(), 3)
  assert re.match(r'dman on douyin_standin-\w+, batches of 16, on v5e:2x4: 8 chips', text)
  assert re.search(r'^temporaries +[\d.]+ ', text, re.M), text


@pytest.fixture
def sizes(monkeypatch):
  """Replaces the cost of a step by a formula; the list of (batch size, slots on an axis) tried."""
  sizes = []

  def step(config, setup, chip):
    slots = config.model.get('slots_per_axis', 0)
    sizes.append((config.batch_size, slots))
    size = slots**2 * 100 + config.batch_size * 1000
    cost = hlo.Cost(size, 0, 0, 1.0, 1.0, [])
    return setup.trainer.abstract, {}, cost if cost.total <= chip.hbm * 2**30 else None

  monkeypatch.setattr(plan, 'step', step)
  return sizes


def test_the_largest_sizes_that_fit(planned, sizes):
  """An example takes 1000 bytes and a slot 100."""
  text = planned(tiny_config('lmn'), 16 * 1024)
  assert text.splitlines()[-2:] == [
    'batch_size: about 17,179,856 would fit, extrapolated from 32 (0.0% of the memory) and 256 '
    '(0.0%)',
    'model.slots_per_axis: 8,192 fits (39.1% of the memory), 16,384 does not',
  ]
  assert len(sizes) == len(set(sizes)) < 8
  assert planned(tiny_config('lmn'), 1024**2).endswith('46,340 fits (19.5% of the memory)')
  text = planned(tiny_config(), 1)
  assert text.endswith('about 1,048 would fit, extrapolated from 32 (3.1% of the memory) and 256 '
                       '(24.4%)')  # fmt: skip
  assert planned(tiny_config(), 0.1).endswith('batch_size: 32 fits, 256 does not')


def test_a_step_that_does_not_fit(planned, sizes):
  lines = planned(tiny_config('lmn'), 0.001).splitlines()
  assert lines[2].startswith('the step does not fit into ')
  assert lines[-2:] == ['batch_size: 32 does not fit', 'model.slots_per_axis: not even 4 fits']


def test_with_the_tpu_compiler(tmp_path, tiny_store):
  pytest.importorskip('libtpu')
  config = tmp_path / 'tiny.py'
  config.write_text(
    'from tests.runs import tiny_config\n\n\ndef get_config():\n  return tiny_config()\n'
  )
  done = subprocess.run(
    [sys.executable, '-m', 'lmn_jax', f'--config={config}', '--mode=plan',
     '--topology=v5e:2x4', f'--workdir={tmp_path / "run"}', f'--stores={tiny_store.path.parent}'],
    cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert re.search(r'^together +[\d.]+ +[\d.]+%$', done.stdout, re.M), done.stdout
  assert re.search(r'^batch_size: about [\d,]+ would fit', done.stdout, re.M), done.stdout
  assert all(re.match('store |batch_size=', line) for line in done.stderr.splitlines())
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.parametrize('topology, slots', [('v5e:2x4', 2**24), ('v5e:16x16', 2**30)])
def test_the_step_of_lmn_on_a_slice(topology, slots, tiny_store):
  """No row moves between chips, no table is copied, and temporaries are small."""
  pytest.importorskip('libtpu')
  config = base('lmn')
  config.model.slots_per_axis = math.isqrt(slots)
  config.data = tiny_config().data
  setup = setups.set_up(config, tiny_store, slices.slice_of(topology))
  state, _, cost = plan.step(config, setup, slices.CHIPS['v5e'])
  R, D = plan.shard(state.tables['memory'].rows_RD)
  most = config.batch_size * (1 + config.model.positions)
  for move in cost.moves:
    for dims in re.findall(r'\[([\d,]+)\]', move.shape):
      shape = [int(d) for d in dims.split(',')]
      rows = math.prod(shape[:-1]) if shape[-1] == D else 0
      assert rows <= most, move
  assert R * setup.mesh.size == slots
  assert cost.temporaries < 64 * 2**20
