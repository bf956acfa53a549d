"""Steps that are sent together, and batches that the devices cut, give the bits of single steps."""

import contextlib

import chex
import jax
import numpy as np
import pytest

from lmn_jax.data import prepare
from lmn_jax.errors import DivergedError, UserError
from lmn_jax.training import feed, residence
from lmn_jax.training import loop as training_loop
from lmn_jax.training import setup as setups
from tests.runs import (
  but_slow,
  compilations,
  lines,
  mesh_of,
  steps_kept,
  tiny_config,
  tiny_next,
)
from tests.training.test_loop import Cut, assert_same, results_of

# How batches come to the devices, beside the one from the host, step by step.
# Of at most 2 steps, as a line follows every second one; some dispatches have a single step.
WAYS = [('host', 3), ('device', 1), ('device', 50)]
NEXT = ['dman', 'sasrec']


def config_of(name, place='host', steps=1):
  config = tiny_next(name) if name in NEXT else tiny_config(name)
  config.model.dropout = 0.1
  config.update(dict(store_on=place, steps_per_dispatch=steps))
  return config


@pytest.fixture(scope='module')
def stores(tmp_path_factory, tiny_store):
  folder = tmp_path_factory.mktemp('stores_next')
  next_store = prepare.prepare(tiny_next().data, folder)
  return lambda name: next_store if name in NEXT else tiny_store


@pytest.fixture(scope='module')
def plain(tmp_path_factory, stores):
  """Results of runs from the host, step by step, by name of the model."""
  results = {}

  def results_by(name):
    if name not in results:
      workdir, config = tmp_path_factory.mktemp(name), config_of(name)
      training_loop.train(config, workdir, stores(name))
      results[name] = results_of(config, workdir, stores(name))
    return results[name]

  return results_by


def without_config(results):
  """Results but for the fields of the config that differ."""
  state, (loop, best, written, report) = results
  return state, (loop, best, written, {k: x for k, x in report.items() if k != 'config'})


# XLA on CPU rounds the attention of SASRec differently in a loop over several steps.
ROUNDED = ('sasrec',)


def assert_same_run(name, results, expected):
  """Asserts equal states, scores, lines and reports; weights up to rounding for ROUNDED."""
  if name in ROUNDED:
    weights = [(state.params, state.tables['item'].rows_RD) for state in (results[0], expected[0])]
    chex.assert_trees_all_close(*weights, rtol=1e-2, atol=1e-4)
  else:
    assert_same(results, expected)


# All ways for LMN, two for DMAN, and the one that differs most for models that carry a state
# through the loop or are rounded differently in it.
CASES = [('lmn', *way) for way in WAYS] + [('dman', *way) for way in WAYS[::2]]
CASES += [(name, *WAYS[-1]) for name in ('dien', 'sasrec')]


@pytest.mark.slow
@pytest.mark.parametrize('name, place, steps', CASES)
def test_every_way_gives_the_same_run(name, place, steps, plain, stores, tmp_path):
  """State, scores, lines of metrics and the report, on eight devices."""
  config, store = config_of(name, place, steps), stores(name)
  training_loop.train(config, tmp_path, store)
  results = results_of(config, tmp_path, store)
  assert_same_run(name, without_config(results), without_config(plain(name)))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lmn', 'dman'])
def test_every_way_gives_the_same_run_on_one_device(name, stores, tmp_path, monkeypatch):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
  store, results = stores(name), []
  for place, steps in [('host', 1), *WAYS]:
    config, workdir = config_of(name, place, steps), tmp_path / f'{place}{steps}'
    training_loop.train(config, workdir, store)
    results.append(without_config(results_of(config, workdir, store)))
  for result in results[1:]:
    assert_same_run(name, result, results[0])


def cut_dispatch(monkeypatch, number):
  """Makes training end with `Cut` before a dispatch."""
  send, sent = training_loop.send, []

  def cut(*arguments):
    sent.append(arguments)
    if len(sent) == number:
      raise Cut
    return send(*arguments)

  monkeypatch.setattr(training_loop, 'send', cut)


@pytest.mark.parametrize('name', but_slow(['lmn', 'dman'], {0}))
@pytest.mark.parametrize(
  'before, after', [(('device', 50), ('host', 1)), (('host', 1), ('device', 4))]
)
def test_a_run_continues_in_another_way(name, before, after, plain, stores, tmp_path, monkeypatch):
  store = stores(name)
  with monkeypatch.context() as patch:
    cut_dispatch(patch, 7)
    with pytest.raises(Cut):
      training_loop.train(config_of(name, *before), tmp_path, store)
  assert steps_kept(tmp_path)
  config = config_of(name, *after)
  training_loop.train(config, tmp_path, store)
  results = results_of(config, tmp_path, store)
  assert_same(without_config(results), without_config(plain(name)))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lmn', 'dien'])
def test_requests_give_the_same_run_every_way(name, stores, tmp_path, monkeypatch):
  """From the host step by step, and from the devices, ended and continued from the host."""
  store, results = stores(name), []
  for ways in [[('host', 1)], [('device', 50), ('host', 3)]]:
    workdir = tmp_path / ways[0][0]
    for number, way in enumerate(ways, 1):
      config = config_of(name, *way)
      config.update(dict(targets_per_request=4, stale_events=1))
      with monkeypatch.context() as patch:
        if number < len(ways):
          cut_dispatch(patch, 7)
        with pytest.raises(Cut) if number < len(ways) else contextlib.nullcontext():
          training_loop.train(config, workdir, store)
    results.append(without_config(results_of(config, workdir, store)))
  assert_same(*results)
  (line,) = results[0][1][3]['batches']
  assert 'requests of at most 4 training examples' in line and 'lack their newest events' in line


RANDOM_LENGTHS = dict(
  train_length='beta', train_length_mean=0.3, history_length=16, steps=40, log_every=20,
  save_every=20, eval_every=20,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lmn'])
def test_random_lengths_give_the_same_run_every_way(name, stores, tmp_path, monkeypatch):
  store, results = stores(name), []
  for ways in [[('host', 1)], [('host', 50)], [('device', 50), ('host', 3)]]:
    workdir = tmp_path / f'{ways[0]}'
    for number, way in enumerate(ways, 1):
      config = config_of(name, *way)
      config.update(RANDOM_LENGTHS)
      with monkeypatch.context() as patch:
        if number < len(ways):
          cut_dispatch(patch, 5)
        with pytest.raises(Cut) if number < len(ways) else contextlib.nullcontext():
          training_loop.train(config, workdir, store)
    results.append(without_config(results_of(config, workdir, store)))
  assert_same(results[1], results[0])
  assert_same(results[2], results[0])
  (line,) = results[0][1][3]['batches']
  assert line.startswith('training reads histories of 1 (')


@pytest.mark.slow
def test_each_length_is_compiled_once(stores, tmp_path, monkeypatch):
  monkeypatch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
  config = config_of('din')
  config.update(RANDOM_LENGTHS | dict(steps=160, log_every=160, save_every=160, eval_every=160))
  setup = setups.set_up(config, stores('din'))
  setups.compile_program.cache_clear()
  training_loop.train(config, tmp_path, stores('din'))
  lengths = {setup.sources['train'].lengths.at(step) for step in range(160)}
  assert len(lengths) > 2
  trainer = setups.set_up(config, stores('din')).trainer
  assert trainer.update._cache_size() == len(lengths)


def test_dispatches_end_at_lines_saves_and_validations():
  config = tiny_config()
  config.update(dict(steps=20, log_every=6, save_every=10, eval_every=7))
  ends, step = [], 0
  while step < 20:
    step += feed.until_event(config, step, 5)
    ends.append(step)
  assert ends == [5, 6, 7, 10, 12, 14, 18, 20]


def test_a_dispatch_has_one_length():
  config = tiny_config('din')
  config.update(dict(steps=30, log_every=30, save_every=30, eval_every=30, train_length='suffix'))
  assert [feed.until_event(config, step, 50) for step in (0, 3, 8, 25)] == [8, 5, 8, 5]


@pytest.mark.slow
def test_dispatches_of_all_sizes_share_a_program(stores, tmp_path):
  """Sizes 2, 1, 1, 2, ... of at most 50 steps: one program for the full ones, one for others."""
  config = config_of('lmn', 'device', 50)
  setups.compile_program.cache_clear()
  training_loop.train(config, tmp_path / 'first', stores('lmn'))
  config.seed = 1
  with compilations() as compiled:
    training_loop.train(config, tmp_path / 'second', stores('lmn'))
  assert len(compiled) <= 2, compiled  # another seed is another order, with the same shapes


def nan_plans(monkeypatch, steps):
  """Replaces the labels of these steps by NaN, in batches that are stacked on the host."""
  next_of, count = feed.Feed.next, [0]

  def replaced(self, n):
    dispatch = next_of(self, n)
    labels = np.array(jax.device_get(dispatch.inputs['label']))
    for k in range(n):
      if count[0] + k + 1 in steps:
        labels[k] = np.nan
    count[0] += n
    label = jax.device_put(labels, dispatch.inputs['label'].sharding)
    return dispatch._replace(inputs=dispatch.inputs | {'label': label})

  monkeypatch.setattr(feed.Feed, 'next', replaced)


def test_a_step_within_a_dispatch_that_is_not_finite(tiny_store, tmp_path, monkeypatch):
  """It is skipped and counted, or ends the run with its own number and the state before it."""
  config = config_of('pooling', 'host', 4)
  config.update(dict(skip_not_finite=1, log_every=8, save_every=8, eval_every=8))
  with monkeypatch.context() as patch:
    nan_plans(patch, (3, 6))
    training_loop.train(config, tmp_path / 'skipped', tiny_store)
  skipped = {x['step']: x['skipped'] for x in lines(tmp_path / 'skipped') if x['group'] == 'train'}
  assert skipped == {8: 2, 16: 0}
  with monkeypatch.context() as patch:
    nan_plans(patch, (10, 11))
    message = 'not finite at step 11: the loss is nan, losses/click and .* last good .* is step 8'
    with pytest.raises(DivergedError, match=message):
      training_loop.train(config, tmp_path / 'ended', tiny_store)


def test_a_store_that_does_not_fit(tiny_store, monkeypatch):
  config = config_of('pooling', 'device')
  monkeypatch.setattr(residence, 'memory_of', lambda mesh: 10_000)
  message = (
    r"config.store_on='device': the store takes [\d.]+ MiB on each device, the state [\d.]+, and a "
    r"device has 0.0; use 'auto' or 'host', or more devices"
  )
  with pytest.raises(UserError, match=message):
    setups.set_up(config, tiny_store)


@pytest.mark.parametrize('platform, memory, on_devices', [
  ('cpu', 2**40, False), ('gpu', 2**40, True), ('gpu', 10_000, False),
])  # fmt: skip
def test_auto_chooses_by_platform_and_memory(tiny_store, monkeypatch, platform, memory, on_devices):
  monkeypatch.setattr(residence.meshes, 'platform_of', lambda mesh: platform)
  monkeypatch.setattr(residence, 'memory_of', lambda mesh: memory)
  config = config_of('pooling', 'auto')
  assert bool(setups.set_up(config, tiny_store).residents) == on_devices


def test_an_unknown_place_is_refused_before_the_log_is_read():
  with pytest.raises(UserError, match="config.store_on='gpu' is unknown"):
    setups.check(config_of('pooling', 'gpu'))


def test_a_store_on_the_devices_takes_its_columns_once(tiny_store):
  """The splits share histories, users and item features."""
  setup = setups.set_up(config_of('lmn', 'device'), tiny_store)
  columns = [resident.put() for resident in setup.residents.values()]
  for name in ('events', 'users', 'items'):
    assert len({id(column[name]) for column in columns}) == 1
  chex.assert_trees_all_equal_shapes(columns[0]['events'], columns[1]['events'])
