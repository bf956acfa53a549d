"""The cost of a step: its arithmetic, and the same task for all contestants."""

import argparse
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.distributed import mesh as meshes
from tests.runs import load_experiment, mesh_of

step_cost = load_experiment('step_cost')


def line(who, log2, setting, ms, **fields):
  """Returns the result of one process, as in run_all."""
  blank = dict.fromkeys(('temporaries_mib', 'peak_device_mib', 'compile_s', 'gb_per_s'))
  return blank | dict(
    who=who, log2=log2, setting=setting, ms=ms, ms_best=ms / 2, ms_worst=ms * 2, state_mib=8.0,
    start_rss_mib=1.0, peak_rss_mib=9.0, peak_ratio=1.12, added_ratio=1.0, device='cpu', version='x'
  ) | fields  # fmt: skip


LINES = [
  *[line('lmn_jax', 14, 'default', ms) for ms in (8.0, 7.0, 30.0)],
  *[line('lmn_jax', 20, 'default', ms) for ms in (12.0, 10.0, 11.0)],
  line('lmn_jax', 20, 'kept', 20.0),
  line('lmn_jax', 22, 'default', 17.0),
  line('lmn_jax', 22, 'kept', 16.0, peak_ratio=1.2, added_ratio=1.05),
  line('pkm', 20, 'default', 300.0),
  line('pkm', 20, 'kept', 150.0),
  line('bag', 20, 'default', 40.0),
  line('rows', 20, 'kept', 33.0),
  line('dense', 20, 'default', 55.0, device='another'),
]


def test_rows_are_over_passes():
  rows = step_cost.over_passes(LINES)
  (row,) = [r for r in rows if (r['who'], r['log2'], r['setting']) == ('lmn_jax', 20, 'default')]
  assert [row[k] for k in ('passes', 'ms', 'ms_low', 'ms_high', 'ms_best', 'ms_worst')] == [
    3, 11.0, 10.0, 12.0, 5.0, 24.0,
  ]  # fmt: skip
  assert row['temporaries_mib'] is None and row['peak_rss_mib'] == 9.0
  assert [r['log2'] for r in rows] == sorted(r['log2'] for r in rows)


def test_ratios_credit_the_faster_setting_on_the_same_device():
  ratios = {r['log2']: r for r in step_cost.ratios(step_cost.over_passes(LINES))}
  assert ratios[20] == {
    'log2': 20, 'ms': 11.0, 'setting': 'default', 'dense': None, 'pkm': 13.64, 'tuned': 3.0,
  }  # fmt: skip
  assert ratios[22]['setting'] == 'kept' and ratios[22]['pkm'] is None


def test_goals():
  rows = step_cost.over_passes(LINES)
  results = [(goal.found, goal.verdict()) for goal in step_cost.goals(rows)]
  assert results == [
    (13.64, 'NOT MET'), (3.0, 'met'), (2.0, 'met'), (1.2, 'NOT MET'), (1.05, 'met'),
  ]  # fmt: skip
  nothing = step_cost.goals(step_cost.over_passes(LINES[:3]))
  assert {goal.verdict() for goal in nothing} == {'not measured'}


def test_the_table_has_no_empty_columns():
  assert step_cost.markdown([{'a': 1, 'b': None, 'c': None}, {'a': 22, 'b': None, 'c': 3}]) == (
    '| a  | c |\n| -- | - |\n| 1  | - |\n| 22 | 3 |'
  )
  assert step_cost.markdown([]) == ''


def test_environment():
  base = {'PATH': 'p', 'MALLOC_TOP_PAD_': '1'}
  assert step_cost.environment('default', base) == {'PATH': 'p'}
  assert step_cost.environment('kept', base) == {
    'PATH': 'p',
    'MALLOC_MMAP_MAX_': '0',
    'MALLOC_TRIM_THRESHOLD_': '34359738368',
    'MALLOC_TOP_PAD_': '268435456',
    'MALLOC_ARENA_MAX': '1',
  }
  huge = step_cost.environment('huge', base | {'GLIBC_TUNABLES': 'glibc.malloc.check=3'})
  assert huge['GLIBC_TUNABLES'] == 'glibc.malloc.hugetlb=1' and huge['MALLOC_MMAP_MAX_'] == '0'


def test_peers_that_are_not_installed_are_reported(monkeypatch, capsys):
  monkeypatch.setattr(step_cost, 'why_not', lambda who, python: f'{who} is missing')
  lines, missing = step_cost.run_all(step_cost.parse(['--only=pkm,bag', '--sizes=14']))
  assert not lines and missing == ['pkm is missing', 'bag is missing']
  assert capsys.readouterr().err == 'pkm is missing\nbag is missing\n'
  monkeypatch.undo()
  assert 'cannot import torch' in step_cost.why_not('rows', 'false')
  assert not step_cost.why_not('rows', 'true') and not step_cost.why_not('lmn_jax', 'false')


def test_a_turn_is_all_contestants_before_the_next_setting(monkeypatch):
  seen = []

  def ran(who, log2, setting, args):
    seen.append((log2, setting, who))
    output = json.dumps({'ms': 1.0})
    return argparse.Namespace(
      returncode=int(who == 'dense'), stdout=output, stderr='a\nno memory\n'
    ), 0.0

  monkeypatch.setattr(step_cost, 'run_one', ran)
  args = step_cost.parse(['--only=lmn_jax,dense', '--sizes=14,16', '--passes=2'])
  lines, missing = step_cost.run_all(args)
  turn = [
    (log2, setting, who)
    for log2 in (14, 16) for setting in step_cost.ALLOCATORS for who in ('lmn_jax', 'dense')
  ]  # fmt: skip
  assert seen == turn + turn
  assert len(lines) == 12 and {x['who'] for x in lines} == {'lmn_jax'}
  assert missing[0] == 'dense, default failed at 2^14: status 1 no memory'


def test_least_bytes():
  # Two distinct rows of 3 floats and 6 of accumulators: read, then all read and written.
  assert step_cost.least_bytes(2, 100, 3, 100 * 9 * 4) == 4 * 2 * (3 + 2 * (3 + 6))


@pytest.mark.slow
@pytest.mark.parametrize('who', ['lmn_jax', 'dense'])
def test_one_process(who, monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(meshes, 'make_mesh', lambda: mesh_of(1))
  step_cost.main([
    f'--one={who}', '--sizes=10', '--batch=8', '--steps=6', '--seconds=9', f'--profile={tmp_path}',
  ])  # fmt: skip
  result = json.loads(capsys.readouterr().out)
  assert result.keys() >= step_cost.over_passes(LINES)[0].keys() - {
    'log2', 'who', 'setting', 'passes', 'ms_low', 'ms_high', 'others',
  }  # fmt: skip
  assert result['steps'] == 6 and result['device'] == 'cpu'
  assert result['ms_best'] <= result['ms'] <= result['ms_worst']
  assert result['state_mib'] == pytest.approx(3 * 1024 * 64 * 4 / 2**20, abs=0.1)
  assert result['gb_per_s'] > 0
  assert [x.name for x in tmp_path.iterdir()] == [f'{who}-10']


def test_a_time_limit_ends_a_process():
  steps = []

  def step(state, batch):
    steps.append(batch)
    return state + 1, {}

  state, _, times = step_cost.timed(step, 0, [1, 2, 3], steps=1000, seconds=0.0)
  assert len(times) == step_cost.LEAST_STEPS and state == step_cost.WARMUP + len(times)
  assert steps[:4] == [1, 2, 3, 1]


def small(optimizer):
  """Returns (setup, trainer, (init, update) of dense) with 1,024 slots on one device."""
  setup = step_cost.memory_setup(1024, optimizer, steps=3, B=8, K=4, D=8)
  trainer = step_cost.trainer_of(setup, mesh_of(1))
  return setup, trainer, step_cost.dense_functions(setup, trainer)


@pytest.mark.parametrize('optimizer', ['sgd', 'adagrad'])
@pytest.mark.slow
def test_the_dense_parameter_has_the_same_task(optimizer):
  """With rules that do not move untouched rows, losses and values are equal."""
  setup, trainer, (init, update) = small(optimizer)
  state, other = trainer.init(0), init(0)
  start = np.asarray(other.rows_RD)
  for batch in setup.batches:
    state, metrics = trainer.update(state, batch)
    other, others = update(other, batch)
    np.testing.assert_allclose(metrics['loss'], others['loss'], rtol=1e-6)
  rows = np.asarray(state.tables['memory'].rows_RD)
  np.testing.assert_allclose(rows, other.rows_RD, atol=1e-6)
  moved = np.any(rows != start, axis=1).sum()
  assert 8 <= moved <= 3 * 8 * 4
  if optimizer == 'adagrad':
    assert np.abs(rows - start).max() > 1e-4
  # For a gradient near 0 Adam makes a step of the rate, 1e-3, in either direction by rounding.
  for ours, theirs in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def by_hand(params, rows, batch, K):
  """(sums of values [B, D], loss, slots [B, K]) in numpy, over all pairs of keys."""
  query, keys = params['query']['kernel'], np.asarray(params['keys'])[0]
  B, D = batch['query'].shape
  q = (batch['query'] @ query).reshape(B, 2, D // 2)
  q = (q - q.mean(-1, keepdims=True)) / np.sqrt(q.var(-1, keepdims=True) + 1e-5)
  q = q * params['query_norm']['scale'] + params['query_norm']['bias']
  a, b = q[:, 0] @ keys[0].T, q[:, 1] @ keys[1].T
  scores = (a[:, :, None] + b[:, None, :]).reshape(B, -1)
  slots = np.argsort(-scores, axis=1)[:, :K]
  best = np.take_along_axis(scores, slots, axis=1)
  weights = np.exp(best - best.max(1, keepdims=True))
  weights /= weights.sum(1, keepdims=True)
  out = np.einsum('bk,bkd->bd', weights, rows[slots])
  return out, np.mean((out - batch['target']) ** 2), slots


@pytest.mark.slow
def test_the_loss_is_the_squared_difference_of_the_reads():
  setup, trainer, _ = small('adagrad')
  state = jax.device_get(trainer.init(0))
  _, loss, slots = by_hand(state.params, state.tables['memory'].rows_RD, setup.batches[0], 4)
  _, metrics = trainer.update(trainer.init(0), setup.batches[0])
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  read = step_cost.rows_read(setup.model, jax.tree.map(jnp.asarray, state.params), setup.batches[0])
  assert read == np.unique(slots).size < slots.size


@pytest.mark.parametrize('contestant', ['pkm', 'bag', 'rows'])
def test_peers_compute_the_same(contestant):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    torch = pytest.importorskip('torch')
    if contestant == 'pkm':
      pytest.importorskip('product_key_memory')
  torch_pkm = load_experiment('torch_pkm')
  setup, trainer, _ = small('adagrad')
  state = jax.device_get(trainer.init(0))
  batch, rows = setup.batches[0], state.tables['memory'].rows_RD
  out, loss, _ = by_hand(state.params, rows, batch, 4)
  model, optimizers = torch_pkm.build(contestant, 1024, 4, 8, 'cpu')
  keys, query, norm = state.params['keys'], state.params['query'], state.params['query_norm']
  weights = {
    'query.weight': query['kernel'].T, 'norm.weight': norm['scale'], 'norm.bias': norm['bias'],
    'keys': keys[0], 'values.weight': rows,
  }  # fmt: skip
  if contestant == 'pkm':
    weights |= {'to_queries.weight': weights.pop('query.weight'), 'keys': keys.swapaxes(1, 2)}
    weights = {f'memory.{name}': x for name, x in weights.items()}
  model.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})
  x, target = torch.tensor(batch['query']), torch.tensor(batch['target'])
  np.testing.assert_allclose(model(x).detach().numpy(), out, atol=1e-5)
  assert torch_pkm.step(model, optimizers, x, target) == pytest.approx(loss, rel=1e-5)
  assert torch_pkm.step(model, optimizers, x, target) < loss
