"""The plan for a slice, on eight simulated devices and with the TPU compiler."""

import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lmn_jax.config import base
from lmn_jax.data import prepare
from lmn_jax.planning import plan, slices
from lmn_jax.training import setup as setups
from tests.rich_runs import rich_config
from tests.runs import mesh_of, tiny_config, tiny_next


@pytest.fixture
def planned(monkeypatch, tiny_store):
  """Plans for eight simulated devices instead of a slice, each with some MiB of memory."""

  def planned(config, mib):
    chip = slices.Chip(mib / 1024, 819, 197, 200, 1.5, '2x4')
    monkeypatch.setitem(slices.CHIPS, 'v5e', chip)
    monkeypatch.setattr(plan, 'slice_of', lambda topology: jax.devices())
    return plan.text_of(plan.plan(config, tiny_store, 'v5e:2x4'))

  return planned


def test_a_plan(planned, tiny_store):
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
  assert re.search(r"^XLA's bytes accessed, not used +[\d,.]+ MB +\([\d.]+\)$", text, re.M), text
  (row,) = re.findall(
    r'^step, estimated +device_ms +per_s +bound +share +cold_s\n(.*)$', text, re.M
  )
  pattern = r'[\d,]+ instructions +([\d.]+) +([\d,]+) +(?:memory traffic|operations|from other '
  ms, per_s, share = re.fullmatch(pattern + r'chips) +([\d.]+)% +\d+', row).groups()
  assert float(per_s.replace(',', '')) == pytest.approx(32e3 / float(ms), rel=0.05)
  assert 0 < float(share) <= 100
  assert re.search(r'^loops of unknown length, counted once: \d+ \(.*while', text, re.M)
  assert re.search(r'^(gather|dynamic-slice) in f32\S+ .* +\d+ +[\d.]+$', text, re.M)
  assert re.search(r'^traffic with the table \S+ +MB of rows +MB of all\nf32\[64,4\]', text, re.M)
  assert re.search(r'^all-reduce f32\S* .* +\d+ +[\d.]+$', text, re.M)
  assert 'config.mesh.model' not in text


@pytest.mark.slow
@pytest.mark.parametrize('task, name', [('click', 'din'), ('next_item', 'hstu')])
def test_the_arrays_of_events_and_numbers_are_counted(task, name, monkeypatch, tmp_path):
  config = rich_config(tmp_path, name, task, time='bias')
  store = prepare.prepare(config.data, tmp_path)
  monkeypatch.setattr(plan, 'slice_of', lambda topology: jax.devices())
  planned = plan.plan(config, store, 'v5e:2x4')
  batch = setups.set_up(config, store).sources['train'][0]
  assert {'time_gap', *store.fields('event')} <= set(planned.batch) == set(batch)
  nbytes = sum(x.nbytes for x in batch.values()) / 8
  assert plan.bytes_on_chip(planned.batch) == nbytes
  arguments = nbytes + plan.bytes_on_chip(planned.state)
  # The compiler leaves out what the step does not read, such as a key without dropout.
  assert planned.cost.arguments >= 0.99 * arguments and 'memory traffic' in plan.text_of(planned)


def test_a_step_that_does_not_fit(planned):
  assert planned(tiny_config(), 0.001).splitlines()[2].startswith('the step does not fit into ')


def mesh_advice(batch_size, model):
  return plan.advice(batch_size, mesh_of(8 // model, model))


def test_a_model_axis_that_only_repeats_work():
  """All chips along it compute the same examples; rows are split over both axes at any size."""
  assert mesh_advice(32, 1) == []
  assert mesh_advice(32, 8)[1] == (
    'config.mesh.model=8: every chip computes 32 examples of a step; with 1 it computes 4 and '
    'holds as many rows: use 1'
  )
  # Eight chips do not divide four examples: a model axis of 2 is the least.
  assert mesh_advice(4, 2) == []
  assert 'with 2 it computes 1 and' in mesh_advice(4, 4)[1]


@pytest.mark.slow
def test_a_plan_of_next_items(planned):
  text = planned(tiny_next(), 3)
  assert re.match(r'dman on douyin_standin-\w+, batches of 16, on v5e:2x4: 8 chips', text)
  assert re.search(r'^temporaries +[\d.]+ ', text, re.M), text


@pytest.mark.slow
def test_with_the_tpu_compiler(tmp_path, tiny_store):
  pytest.importorskip('libtpu')
  config = tmp_path / 'tiny.py'
  config.write_text(
    'from tests.runs import tiny_config\n\n\ndef get_config():\n  return tiny_config()\n'
  )
  done = subprocess.run(
    [sys.executable, '-m', 'lmn_jax', f'--config={config}', '--mode=plan',
     '--topology=v5e:2x4', f'--workdir={tmp_path / "run"}', f'--stores={tiny_store.path.parent}'],
    cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert re.search(r'^together +[\d.]+ +[\d.]+%$', done.stdout, re.M), done.stdout
  assert re.search(r'^traffic with the table ', done.stdout, re.M), done.stdout
  assert 'batch_size: about' not in done.stdout  # without --search
  assert all(re.match('store |compiling the step for ', x) for x in done.stderr.splitlines())
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.parametrize('topology, slots', [('v5e:2x4', 2**24), ('v5e:16x16', 2**30)])
def test_the_step_of_lmn_on_a_slice(topology, slots, tiny_store):
  """No row moves between chips, the table is used in parts only, and temporaries are small."""
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
  parts = [part for run in cost.traffic.runs for part in run.parts if part.array.dims == (R, D)]
  assert parts and not any(part.whole for part in parts)
  assert cost.temporaries < 64 * 2**20
