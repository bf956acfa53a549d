"""The loop: continuing, stopping, diverging, and what a run reports."""

import copy
import json
import re
import shutil
import traceback

import chex
import jax
import numpy as np
import pytest

from lmn_jax import files
from lmn_jax.data import prepare
from lmn_jax.data.histories import users_of
from lmn_jax.data.store import Store
from lmn_jax.data.targets import training_items
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import DivergedError, UserError
from lmn_jax.evaluation import click_evaluation, ranking
from lmn_jax.evaluation import report as reports
from lmn_jax.inference.user_states import StatefulModel
from lmn_jax.models.registry import CLICK, NEXT_ITEM
from lmn_jax.training import config_warnings, trained_run
from lmn_jax.training import loop as training_loop
from lmn_jax.training import setup as setups
from lmn_jax.training.checkpoint import Checkpoints
from tests.runs import but_slow, compilations, lines, steps_kept, tiny_config, tiny_next


class Cut(Exception):
  """Stands for a machine that is taken away."""


def cut_at(monkeypatch, step):
  """Training ends with `Cut` when the batch of that step is placed."""
  place, placed = meshes.place, []

  def cut(mesh, batch):
    if not isinstance(batch, dict):  # what lanes carry
      return place(mesh, batch)
    of_training = {'label': 32, 'target': 16}  # sizes of the batches of both tasks
    if any(len(batch.get(name, ())) == size for name, size in of_training.items()):
      placed.append(batch)
      if len(placed) == step:
        raise Cut
    return place(mesh, batch)

  monkeypatch.setattr(meshes, 'place', cut)


def left_behind(config, workdir, store):
  """All that a run leaves, but times: state, loop, data position, lines, report."""
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    step = checkpoints.latest()
    kept = checkpoints.restore(step, setups.set_up(config, store).trainer.abstract)
    scores, best = checkpoints.scores, checkpoints.best()
  folder = workdir / 'checkpoints' / f'step_{step}' / 'data'
  data = [x.read_text() for x in folder.glob('*.json')]
  report = json.loads((workdir / 'report.json').read_text())
  for name in ('train_seconds', 'peak_rss', 'commit'):
    report.pop(name)
  loop = {name: x for name, x in kept.loop.items() if name != 'seconds'}
  return jax.device_get(kept.state), (loop | {'scores': scores}, best, data, lines(workdir), report)


def assert_same(found, wanted):
  chex.assert_trees_all_equal(found[0], wanted[0])
  assert found[1] == wanted[1]


DRAWS = dict(dropout=0.1)


@pytest.fixture(scope='module')
def whole(tmp_path_factory, tiny_store):
  """An unbroken run of LMN, with all that it may draw: (config, workdir, report)."""
  config, workdir = tiny_config('lmn', **DRAWS), tmp_path_factory.mktemp('whole')
  return config, workdir, training_loop.train(config, workdir, tiny_store)


def test_continuing_a_shorter_run_is_exact(whole, tiny_store, tmp_path):
  config, workdir, _ = whole
  shorter = tiny_config('lmn', **DRAWS)
  shorter.steps = 8
  training_loop.train(shorter, tmp_path, tiny_store)
  training_loop.train(config, tmp_path, tiny_store)
  wanted = left_behind(config, workdir, tiny_store)
  assert_same(left_behind(config, tmp_path, tiny_store), wanted)
  # The comparison is of something: rows moved, slots counted, statistics moved, lines of each step.
  state, (loop, best, data, written, _) = wanted
  assert state.step == 16 and state.tables['memory'].ever_R.any() and jax.tree.leaves(state.stats)
  # 3 slots for each target and its 2 injected items: of the window that step 16 validated.
  assert state.tables['memory'].reads_R.sum() == 4 * 32 * 3 * 3
  assert [x for x, _ in loop['scores']] == [4, 8, 12, 16] and best in (4, 8, 12, 16)
  assert '16' in data[0]
  steps = {
    group: [x['step'] for x in written if x['group'] == group] for group in ('train', 'valid')
  }
  assert steps == {'train': [2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16], 'valid': [4, 8, 12, 16]}


@pytest.mark.parametrize('step, kept', but_slow([(2, None), (9, 8), (12, 9)], {1}))
def test_continuing_after_a_cut_is_exact(whole, tiny_store, tmp_path, monkeypatch, step, kept):
  """Before any checkpoint, after one with a validation and after one without: the
  counters of reads are cleared behind the first, and it keeps those that were validated."""
  config, workdir, _ = whole
  with monkeypatch.context() as patch:
    cut_at(patch, step)
    with pytest.raises(Cut):
      training_loop.train(config, tmp_path, tiny_store)
  assert steps_kept(tmp_path)[-1:] == [kept] * (kept is not None)
  training_loop.train(config, tmp_path, tiny_store)
  assert_same(left_behind(config, tmp_path, tiny_store), left_behind(config, workdir, tiny_store))


@pytest.fixture(scope='module')
def whole_next(tmp_path_factory):
  """An unbroken run of DMAN: (config, workdir, store)."""
  config, workdir = tiny_next(dropout=0.1), tmp_path_factory.mktemp('whole_next')
  config.sampled_negatives = 5
  store = prepare.prepare(config.data, tmp_path_factory.mktemp('stores_next'))
  training_loop.train(config, workdir, store)
  return config, workdir, store


@pytest.mark.parametrize('step', but_slow([6, 12], {1}))
def test_lanes_and_what_they_carry_go_on_after_a_cut(whole_next, tmp_path, monkeypatch, step):
  config, workdir, store = whole_next
  with monkeypatch.context() as patch:
    cut_at(patch, step)
    with pytest.raises(Cut):
      training_loop.train(config, tmp_path, store)
  training_loop.train(config, tmp_path, store)
  wanted = left_behind(config, workdir, store)
  assert_same(left_behind(config, tmp_path, store), wanted)
  carry = wanted[0].carry
  assert carry.there_BT.any() and np.ptp(carry.memory_BLMD) > 0.1


# The fast tests are those of one model of each task above; the promise is for all.
@pytest.mark.slow
@pytest.mark.parametrize('name', CLICK)
@pytest.mark.parametrize('workers', [0, 1])
def test_every_click_model_goes_on_exactly(name, workers, tiny_store, tmp_path, monkeypatch):
  config = tiny_config(name)
  config.model.dropout = 0.1
  goes_on_exactly(config, workers, tiny_store, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize('name', NEXT_ITEM)
@pytest.mark.parametrize('workers', [0, 1])
def test_every_next_item_model_goes_on_exactly(name, workers, whole_next, tmp_path, monkeypatch):
  config = tiny_next(name)
  config.model.dropout = 0.1
  goes_on_exactly(config, workers, whole_next[2], tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, arguments', [('adamw', {'b1': 0.8}), ('lion', {}), ('lamb', {}), ('adafactor', {})]
)
def test_optimizers_of_optax_go_on_exactly(name, arguments, tiny_store, tmp_path, monkeypatch):
  config = tiny_config()
  config.optimizer.dense = dict(name=name, rate=0.01, arguments=arguments)
  goes_on_exactly(config, 0, tiny_store, tmp_path, monkeypatch)


def goes_on_exactly(config, workers, store, tmp_path, monkeypatch):
  """A run that is cut before step 7 equals one that is not."""
  config.update(dict(steps=8, loader_workers=workers))
  training_loop.train(config, tmp_path / 'whole', store)
  with monkeypatch.context() as patch:
    cut_at(patch, 7)
    with pytest.raises(Cut):
      training_loop.train(config, tmp_path / 'cut', store)
  assert steps_kept(tmp_path / 'cut')[-1] == 6
  training_loop.train(config, tmp_path / 'cut', store)
  found, wanted = (left_behind(config, tmp_path / x, store) for x in ('cut', 'whole'))
  assert_same(found, wanted)


def test_report_of_next_items(whole_next):
  config, workdir, store = whole_next
  written = json.loads((workdir / 'report.json').read_text())
  assert written['columns'][:2] == ['ndcg@10', 'hr@10'] and written['columns'][-1] == 'mrr'
  targets = store.manifest['counts']['clicks']['test']
  for found in (written['test'], *written['baselines']['test'].values()):
    assert found['overall']['rows'] == targets > 30
    assert sum(x['rows'] for x in found['by_history'].values()) == targets
  assert set(written['baselines']['test']) == {'popularity', 'markov'}
  # Among sampled negatives, under a label of its own.
  setup, best = trained_run.best_of(config, workdir, store)
  source, V = setup.sources['test'], setup.model.items
  rank = setup.task.score(setup.trainer, best.state, setup.model, source, setup.mesh)
  unseen = [set(range(1, V)) - set(x.tolist()) for x in source.before(source.numbers)]
  rivals = [len(x - {y}) for x, y in zip(unseen, source.targets.item[source.numbers], strict=True)]
  wanted = ranking.measure_sampled(rank, np.array(rivals), 5, config.ranks)
  assert written['test']['sampled'] == pytest.approx(wanted)
  assert wanted['mrr'] > written['test']['overall']['mrr']
  printed = reports.table_of(written)
  assert f'{wanted["mrr"]:.4f}' in printed.split('among 5 sampled negatives, not comparable')[1]
  # The best of the validations by the first column, and of those the earliest.
  valid = {x['step']: x['ndcg@10'] for x in lines(workdir) if x['group'] == 'valid'}
  assert list(valid) == [4, 8, 12, 16] and written['step'] == max(valid, key=valid.get)
  assert written['valid']['overall']['ndcg@10'] == pytest.approx(valid[written['step']])


@pytest.mark.parametrize('exclude_seen', [True, False])
def test_ranks_are_those_of_one_user_at_a_time(whole_next, exclude_seen):
  """Streamed over lanes and ranked by blocks, or each user's history alone and sorted."""
  config, workdir, store = whole_next
  setup, best = trained_run.best_of(config, workdir, store)
  config = config.copy_and_resolve_references()
  config.exclude_seen = exclude_seen
  source, V = setup.task.sources(config, store, setup.mesh)['test'], setup.model.items
  found = setup.task.score(setup.trainer, best.state, setup.model, source, setup.mesh)
  server = StatefulModel(setup.model, setup.trainer, setup.mesh, config.history_length, 8)
  past = source.before(source.numbers)
  states = server.empty(
    np.array([users_of(store).row[u] for u in source.targets.user[source.numbers]])
  )
  states = server.update(best.state, states, past)
  every = np.tile(np.arange(1, V), (len(past), 1))
  scores = np.pad(server.score(best.state, states, every), ((0, 0), (1, 0)))
  met = past if exclude_seen else [x[:0] for x in past]
  wanted = ranking.ranks_of(scores, source.targets.item[source.numbers], met)
  said = setup.task.protocol(config)
  assert ('but those the user has met' in said) == exclude_seen
  baselines = ranking.rank_baselines(training_items(store), source, V)
  count_V = np.bincount(np.concatenate(list(training_items(store))), minlength=V)
  popular = ranking.ranks_of(
    np.broadcast_to(count_V.astype(np.float64), scores.shape),
    source.targets.item[source.numbers],
    met,
  )
  placed = np.array([len(items) > 0 for items in past])
  assert placed.sum() > 30 and len(set(wanted[placed])) > 8
  # Sums are rounded differently: a rank or two, here and there, where scores are nearly alike.
  assert (found == wanted)[placed].mean() > 0.9
  assert np.abs(found - wanted)[placed].max() <= 2
  assert (found[~placed] == V).all()
  assert (baselines['popularity'] == popular)[placed].all()


def test_a_finished_run_is_not_trained_again(whole, tiny_store, monkeypatch):
  config, workdir, report = whole
  before = left_behind(config, workdir, tiny_store)
  cut_at(monkeypatch, 1)
  again = training_loop.train(config, workdir, tiny_store)
  assert_same(left_behind(config, workdir, tiny_store), before)
  assert again['test'] == report['test'] and again['steps'] == 16


def test_a_run_is_used_by_one_command_at_a_time(whole, tiny_store):
  config, workdir, _ = whole
  with files.locked(workdir / trained_run.LOCK):
    for command in (training_loop.train, trained_run.evaluate_best):
      with pytest.raises(UserError, match=f'{workdir} is in use by process'):
        command(config, workdir, tiny_store)


def test_report(whole, tiny_store):
  config, workdir, report = whole
  written = json.loads((workdir / 'report.json').read_text())
  assert written['config'] == json.loads(json.dumps(config.to_dict()))
  assert written['seed'] == 0 and written['fingerprint'] == tiny_store.fingerprint
  assert written['rows']['rows_read'] == sum(written['counts']['examples'].values())
  assert written['vocabulary'] == tiny_store.vocabulary and written['tables']['memory'] == [64, 24]
  assert re.fullmatch(r'[0-9a-f]{40}(\+changes)?', written['commit'] or '0' * 40)
  assert 'global time split' in written['protocol'] and written['steps'] == 16
  valid = {x['step']: x['auc'] for x in lines(workdir) if x['group'] == 'valid'}
  assert report['step'] == max(valid, key=valid.get)
  assert report['valid']['overall']['auc'] == max(valid.values())
  assert report['test']['overall']['rows'] == tiny_store.examples['test']


def test_evaluating_gives_the_report_again(whole, tiny_store):
  config, workdir, report = whole
  again = trained_run.evaluate_best(config, workdir, tiny_store)
  times = ('steps', 'train_seconds', 'peak_rss')
  assert again == {name: x for name, x in report.items() if name not in times}
  assert json.loads((workdir / 'evaluation.json').read_text())['test'] == again['test']


def validations(monkeypatch, aucs):
  """The AUCs that validation finds, in order; afterwards the true ones."""
  report, left = click_evaluation.report, list(aucs)

  def planned(*arguments):
    found = report(*arguments)
    if left:
      found['overall']['auc'] = left.pop(0)
    return found

  monkeypatch.setattr(click_evaluation, 'report', planned)


def test_best_and_last_are_kept(tiny_store, tmp_path, monkeypatch):
  """Of equals the first is best, a cut does not forget it, and what lies between goes."""
  validations(monkeypatch, [0.6, 0.7, 0.5, 0.7])
  with monkeypatch.context() as patch:
    cut_at(patch, 14)
    with pytest.raises(Cut):
      training_loop.train(tiny_config(), tmp_path, tiny_store)
  assert steps_kept(tmp_path) == [8, 9, 12]
  report = training_loop.train(tiny_config(), tmp_path, tiny_store)
  assert steps_kept(tmp_path) == [8, 16]
  assert report['step'] == 8
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    assert (checkpoints.best(), checkpoints.latest()) == (8, 16)


def test_patience(tiny_store, tmp_path, monkeypatch, capsys):
  """Two without a better one, in a row; more patience goes on where it stopped."""
  config = tiny_config()
  config.update(dict(steps=400, patience=2))
  validations(monkeypatch, [0.7, 0.6, 0.8, 0.8, 0.5])
  report = training_loop.train(config, tmp_path, tiny_store)
  assert (report['step'], report['steps']) == (12, 20)
  assert 'stopped at step 20: 2 validations without a better auc' in capsys.readouterr().err
  assert training_loop.train(config, tmp_path, tiny_store)['steps'] == 20
  config.patience = 3
  validations(monkeypatch, [0.6])
  assert training_loop.train(config, tmp_path, tiny_store)['steps'] == 24


def wild_config(rate):
  config = tiny_config()
  for group in ('dense', 'embedding'):
    config.optimizer[group].update(dict(name='sgd', rate=rate))
  config.save_every = 1
  return config


def test_a_loss_that_is_no_number_stops_the_run(tiny_store, tmp_path):
  message = r'not finite at step 2: the loss is (nan|inf), \w+/.*; the last good .* is step 1 \('
  with pytest.raises(DivergedError, match=message):
    training_loop.train(wild_config(1e30), tmp_path, tiny_store)
  state = left_state(wild_config(1e30), tmp_path, tiny_store)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def left_state(config, workdir, store):
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    return checkpoints.restore(
      checkpoints.latest(), setups.set_up(config, store).trainer.abstract
    ).state


def test_weights_that_are_no_numbers_are_not_kept(tiny_store, tmp_path):
  message = r'not finite at step 1: weights/\w+.*; no checkpoint was kept'
  config = wild_config(1e38)
  config.optimizer.dense.rate = 3e38
  config.optimizer.dense.decay = 1e30
  with pytest.raises(DivergedError, match=message):
    training_loop.train(config, tmp_path, tiny_store)
  assert steps_kept(tmp_path) == []


def spoilt_batches(monkeypatch, steps):
  """The labels of these batches of training are NaN."""
  place, placed = meshes.place, []

  def spoiling(mesh, batch):
    if len(batch.get('label', ())) == 32:
      placed.append(batch)
      if len(placed) in steps:
        batch = batch | {'label': np.full(32, np.nan, np.float32)}
    return place(mesh, batch)

  monkeypatch.setattr(meshes, 'place', spoiling)


def test_steps_that_are_not_finite_are_left_out_if_so_wanted(tiny_store, tmp_path, monkeypatch):
  """Two in a row, counted in the lines; a third in a row ends the run."""
  config = tiny_config()
  config.skip_not_finite = 2
  with monkeypatch.context() as patch:
    spoilt_batches(patch, (3, 5, 6))
    training_loop.train(config, tmp_path / 'two', tiny_store)
  skipped = {x['step']: x['skipped'] for x in lines(tmp_path / 'two') if x['group'] == 'train'}
  assert {step: count for step, count in skipped.items() if count} == {3: 1, 6: 2}
  with monkeypatch.context() as patch:
    spoilt_batches(patch, (5, 6, 7))
    message = 'not finite at step 7: the loss is nan, losses/click and .* last good .* is step 6'
    with pytest.raises(DivergedError, match=message):
      training_loop.train(config, tmp_path / 'three', tiny_store)
  state = left_state(config, tmp_path / 'three', tiny_store)
  assert state.step == 6 and all(np.isfinite(x).all() for x in jax.tree.leaves(state))
  # In a row counts over a cut as well: two of them are in the checkpoint.
  with monkeypatch.context() as patch:
    spoilt_batches(patch, (1,))
    with pytest.raises(DivergedError, match='not finite at step 7: '):
      training_loop.train(config, tmp_path / 'three', tiny_store)


def test_a_step_is_diagnosed_with_its_own_state(tiny_store, tmp_path, monkeypatch):
  """Though the next step, whose batch is sound, was sent before: weights, key and moments are those
  that the step began with."""
  config = tiny_config('din')
  config.model.dropout = 0.5
  config.update(dict(steps=2, eval_every=2, save_every=2, log_every=4))
  training_loop.train(config, tmp_path / 'before', tiny_store)
  want = left_state(config, tmp_path / 'before', tiny_store)
  spoilt_batches(monkeypatch, (3,))
  given, compile_program = [], setups.compile_program

  def spied(program):
    trainer = compile_program(program)

    def diagnose(state, batch):
      given.append(jax.device_get((state, batch)))
      return trainer.diagnose(state, batch)

    return trainer._replace(diagnose=diagnose)

  monkeypatch.setattr(setups, 'compile_program', spied)
  config.update(dict(steps=8, eval_every=8, save_every=8))
  with pytest.raises(DivergedError, match='not finite at step 3: the loss is nan, losses/click'):
    training_loop.train(config, tmp_path / 'spoilt', tiny_store)
  ((state, batch),) = given
  assert np.isnan(batch['label']).all()
  chex.assert_trees_all_equal(state, jax.device_get(want))


def test_a_run_goes_on_from_the_last_sound_step(whole, tiny_store, tmp_path, monkeypatch, caplog):
  config, workdir, _ = whole
  with monkeypatch.context() as patch:
    cut_at(patch, 10)
    with pytest.raises(Cut):
      training_loop.train(config, tmp_path, tiny_store)
  assert steps_kept(tmp_path)[-2:] == [8, 9]
  file = tmp_path / 'checkpoints' / 'step_9' / 'loop' / 'metadata'
  file.write_bytes(file.read_bytes()[:-1])
  training_loop.train(config, tmp_path, tiny_store)
  assert 'step_9 is spoilt' in caplog.text
  assert_same(left_behind(config, tmp_path, tiny_store), left_behind(config, workdir, tiny_store))


def test_a_best_checkpoint_that_is_spoilt_is_not_reported_on(tiny_store, tmp_path, monkeypatch):
  validations(monkeypatch, [0.6, 0.7, 0.5, 0.6])
  training_loop.train(tiny_config(), tmp_path, tiny_store)
  (tmp_path / 'checkpoints' / 'step_8' / 'seal.json').unlink()
  with pytest.raises(UserError, match='step_8 is spoilt: it has no seal.json; bring it back'):
    trained_run.evaluate_best(tiny_config(), tmp_path, tiny_store)


def test_a_store_that_changes_under_a_run_ends_it(tiny_store, tmp_path, monkeypatch):
  folder = tmp_path / 'store'
  shutil.copytree(tiny_store.path, folder)
  store, place, placed = Store(folder), meshes.place, []

  def touching(mesh, batch):
    placed.append(batch)
    if len(placed) == 6:
      (folder / 'items.arrow').touch()
    return place(mesh, batch)

  monkeypatch.setattr(meshes, 'place', touching)
  with pytest.raises(UserError, match='items.arrow was changed while it was in use'):
    training_loop.train(tiny_config(), tmp_path / 'run', store)
  assert steps_kept(tmp_path / 'run')[-1] <= 4


def test_scores_that_are_no_numbers_stop_the_run(tiny_store, tmp_path, monkeypatch):
  score, rows = click_evaluation.score, tiny_store.examples['valid']
  monkeypatch.setattr(click_evaluation, 'score', lambda *a: score(*a) * np.float32(np.nan))
  with pytest.raises(
    DivergedError, match=f'not finite at step 4: {rows} validation scores; the last .* is step 3'
  ):
    training_loop.train(tiny_config(), tmp_path, tiny_store)


def test_the_loop_makes_no_implicit_transfer(tiny_store, tmp_path, monkeypatch):
  monkeypatch.setattr(meshes, 'place', lambda mesh, batch: batch)
  with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
    training_loop.train(tiny_config(), tmp_path, tiny_store)


def test_nothing_is_compiled_twice(whole, tiny_store, tmp_path):
  """After a run, another one, stopped half way and continued, finds all it needs."""
  config, *_ = whole
  half = copy.deepcopy(config)
  half.steps = 8
  with compilations() as compiled:
    training_loop.train(half, tmp_path, tiny_store)
    training_loop.train(config, tmp_path, tiny_store)
  assert not compiled


HELD_OUT = {'all': (0.1, 0.1), 'valid': (0.2, 0.0), 'test': (0.0, 0.2), 'none': (0.0, 0.0)}


@pytest.mark.parametrize('held', ['test', 'none', pytest.param('valid', marks=pytest.mark.slow)])
@pytest.mark.parametrize('make', [tiny_config, tiny_next], ids=['click', 'next_item'])
def test_training_on_what_is_not_held_out(tmp_path, monkeypatch, capsys, make, held):
  """Without validation for config.steps, and the last checkpoint is the best, also cut short."""
  config = make() if make is tiny_config else make('hpmn')
  valid, test = HELD_OUT[held]
  config.data.split.update(dict(valid=valid, test=test))
  store = prepare.prepare(config.data, tmp_path / 'stores')
  wanted = [name for name, share in (('valid', valid), ('test', test)) if share]
  assert [name for name in ('valid', 'test') if store.examples[name]] == wanted
  if not valid:
    with monkeypatch.context() as patch:
      cut_at(patch, 7)
      with pytest.raises(Cut):
        training_loop.train(config, tmp_path / 'run', store)
  found = training_loop.train(config, tmp_path / 'run', store)
  assert [name for name in ('valid', 'test') if name in found] == wanted
  assert list(found['baselines']) == wanted and found['steps'] == 16
  if not valid:
    assert found['step'] == 16 == steps_kept(tmp_path / 'run')[-1]
    assert 'nothing validates: trains for config.steps' in capsys.readouterr().err
    config.patience = 2
    with pytest.raises(UserError, match='config.patience=2 waits for a better validation, and'):
      training_loop.train(config, tmp_path / 'run', store)
    config.patience = 0
  printed = reports.table_of(found)
  if wanted:
    assert printed.startswith(f'{wanted[-1]}, {found[wanted[-1]]["overall"]["rows"]:,} rows')
  else:
    assert printed.startswith('no split is held out') and found['protocol'] in printed
  assert trained_run.evaluate_best(config, tmp_path / 'run', store)['step'] == found['step']


def test_what_trains_and_makes_no_sense_is_said(tmp_path, tiny_store, caplog):
  config = tiny_config()
  config.optimizer.dense.rate = 1e6
  config.data.min_count = 100_000
  config.batch_size = 8192
  store = prepare.prepare(config.data, tmp_path)
  source = setups.set_up(config, store).sources
  assert config_warnings.doubts(config, store, source) == [
    'every user is unknown: none occurs often enough in training for '
    'config.data.min_count=100000; lower it',
    'every item is unknown: none occurs often enough in training for '
    'config.data.min_count=100000; lower it',
    f'config.batch_size=8192 is more than the {store.examples["train"]} rows that training has for '
    'batches: each step has some of them more than once',
    'config.optimizer.dense.rate=1000000.0 is too large for adam to learn anything; at most 1 '
    'makes sense',
  ]
  plain = tiny_config()
  assert not config_warnings.doubts(plain, tiny_store, {'train': source['train']})


def test_a_validation_of_one_class_is_refused(tiny_store, tmp_path, monkeypatch):
  monkeypatch.setitem(tiny_store.manifest['counts']['clicks'], 'valid', 0)
  message = (
    'validation split has 0 clicks in .* examples, so no AUC; raise config.data.split.valid=0.1'
  )
  with pytest.raises(UserError, match=message):
    training_loop.train(tiny_config(), tmp_path / 'run', tiny_store)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'field, value, message',
  [
    (
      'batch_size',
      33,
      'batch_size=33 is not divisible by the 8 devices of the data axis; use 32 or 40',
    ),
    ('eval_batch_size', 4, 'eval_batch_size=4 is not divisible by the 8 devices .* use 8'),
    ('steps', 0, 'config.steps=0 must be at least 1'),
    ('patience', -1, 'config.patience=-1 must be at least 0'),
    ('seed', 2**31, 'config.seed=2147483648 must be below 2147483648'),
    ('steps', 2**31, 'config.steps=2147483648 must be below 2147483648'),
    ('skip_not_finite', -1, 'config.skip_not_finite=-1 must be at least 0'),
    ('buckets', (50, 10), r'config.buckets=\(50, 10\) must ascend'),
    ('buckets', (-1, 10), r'config.buckets=\(-1, 10\) must be whole numbers from 0 on'),
  ],
)
def test_out_of_bounds(field, value, message):
  config = tiny_config()
  config[field] = value
  with pytest.raises(UserError, match=message):
    setups.check(config)


def test_every_nan_and_negative_is_refused():
  bounded = [('loss', name) for name in tiny_config().loss] + [('optimizer', 'clip_norm')]
  for section, field in bounded:
    for value in (float('nan'), -1.0):
      config = tiny_config()
      config[section][field] = value
      with pytest.raises(UserError, match=f'config.{section}.{field}={value} must be at least 0'):
        setups.check(config)


def test_workers_read_the_same_batches(tiny_store, tmp_path):
  """A run with worker processes, cut and continued, equals one without."""
  config = tiny_config()
  config.steps = 8
  training_loop.train(config, tmp_path / 'threads', tiny_store)
  config.loader_workers = 1
  config.steps = 4
  training_loop.train(config, tmp_path / 'workers', tiny_store)
  config.steps = 8
  training_loop.train(config, tmp_path / 'workers', tiny_store)
  assert lines(tmp_path / 'threads') == lines(tmp_path / 'workers')


@pytest.mark.parametrize('make', [tiny_config, tiny_next])
def test_the_loop_reads_no_array_unasked(make, tmp_path, monkeypatch):
  """What a GPU refuses under the loop's guard: on CPU reading an array is no transfer."""
  kind, reading, asked = type(jax.numpy.zeros(())), [], [0]
  own_get, own_value = jax.device_get, kind._value

  def device_get(x):
    asked[0] += 1
    try:
      return own_get(x)
    finally:
      asked[0] -= 1

  def value(self):
    if jax.config.jax_transfer_guard == 'disallow' and not asked[0]:
      reading.append(traceback.format_stack(limit=6))
    return own_value.__get__(self)

  config = make()
  config.update(dict(steps=3, eval_every=2, save_every=1, log_every=1))
  store = prepare.prepare(config.data, tmp_path / 'stores')
  monkeypatch.setattr(jax, 'device_get', device_get)
  monkeypatch.setattr(kind, '_value', property(value))
  training_loop.train(config, tmp_path / 'run', store)
  assert not reading, ''.join(reading[0])
