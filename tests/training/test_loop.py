"""The training loop: continuation, stops, divergence, and reports."""

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
from lmn_jax.training import config_warnings, trained_run
from lmn_jax.training import loop as training_loop
from lmn_jax.training import setup as setups
from lmn_jax.training.checkpoint import Checkpoints
from tests.runs import (
  but_slow,
  compilations,
  lines,
  promotion_of,
  steps_kept,
  tiny_config,
  tiny_next,
)


class Cut(Exception):
  """Simulates the loss of the machine."""


def cut_at(monkeypatch, step):
  """Makes training end with `Cut` when the batch of a step is placed."""
  place, placed = meshes.place, []

  def cut(mesh, batch):
    if not isinstance(batch, dict):  # the carry of lanes
      return place(mesh, batch)
    sizes = {'label': 32, 'target': 16}  # of the training batches of both tasks
    if any(len(batch.get(name, ())) == size for name, size in sizes.items()):
      placed.append(batch)
      if len(placed) == step:
        raise Cut
    return place(mesh, batch)

  monkeypatch.setattr(meshes, 'place', cut)


def results_of(config, workdir, store):
  """Returns all results of a run but times: state, loop, lines, report."""
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    step = checkpoints.latest()
    restored = checkpoints.restore(step, setups.set_up(config, store).trainer.abstract)
    scores, best = checkpoints.scores, checkpoints.best()
  report = json.loads((workdir / 'report.json').read_text())
  for name in ('train_seconds', 'peak_rss', 'commit'):
    report.pop(name)
  loop = {name: x for name, x in restored.loop.items() if name != 'seconds'}
  return jax.device_get(restored.state), (loop | {'scores': scores}, best, lines(workdir), report)


def assert_same(results, expected):
  chex.assert_trees_all_equal(results[0], expected[0])
  assert results[1] == expected[1]


DRAWS = dict(dropout=0.1)


@pytest.fixture(scope='module')
def whole(tmp_path_factory, tiny_store):
  """An uninterrupted run of LMN with dropout: (config, workdir, report)."""
  config, workdir = tiny_config('lmn', **DRAWS), tmp_path_factory.mktemp('whole')
  return config, workdir, training_loop.train(config, workdir, tiny_store)


def test_continuing_a_shorter_run_is_exact(whole, tiny_store, tmp_path):
  config, workdir, _ = whole
  shorter = tiny_config('lmn', **DRAWS)
  shorter.steps = 8
  training_loop.train(shorter, tmp_path, tiny_store)
  training_loop.train(config, tmp_path, tiny_store)
  expected = results_of(config, workdir, tiny_store)
  assert_same(results_of(config, tmp_path, tiny_store), expected)
  # The comparison is not empty: rows changed, reads are counted, statistics changed, lines exist.
  state, (loop, best, written, _) = expected
  assert state.step == 16 and state.tables['memory'].ever_R.any() and jax.tree.leaves(state.stats)
  # Counted since step 12: 3 slots for each target and for its 2 injected items.
  assert state.tables['memory'].reads_R.sum() == 4 * 32 * 3 * 3
  assert [x for x, _ in loop['scores']] == [4, 8, 12, 16] and best in (4, 8, 12, 16)
  steps = {
    group: [x['step'] for x in written if x['group'] == group] for group in ('train', 'valid')
  }
  assert steps == {'train': [2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16], 'valid': [4, 8, 12, 16]}


@pytest.mark.parametrize('step, saved', but_slow([(2, None), (9, 8), (12, 9)], {1}))
def test_continuing_after_a_cut_is_exact(whole, tiny_store, tmp_path, monkeypatch, step, saved):
  """Before any checkpoint, after one with a validation, and after one without. The counters of
  reads are cleared after a validated checkpoint, which holds the validated counts."""
  config, workdir, _ = whole
  with monkeypatch.context() as patch:
    cut_at(patch, step)
    with pytest.raises(Cut):
      training_loop.train(config, tmp_path, tiny_store)
  assert steps_kept(tmp_path)[-1:] == [saved] * (saved is not None)
  training_loop.train(config, tmp_path, tiny_store)
  assert_same(results_of(config, tmp_path, tiny_store), results_of(config, workdir, tiny_store))


@pytest.fixture(scope='module')
def whole_next(tmp_path_factory):
  """An uninterrupted run of DMAN: (config, workdir, store)."""
  config, workdir = tiny_next(dropout=0.1), tmp_path_factory.mktemp('whole_next')
  config.sampled_negatives = 5
  store = prepare.prepare(config.data, tmp_path_factory.mktemp('stores_next'))
  training_loop.train(config, workdir, store)
  return config, workdir, store


@pytest.mark.parametrize('step', but_slow([6, 12], {1}))
def test_lanes_and_their_carry_continue_after_a_cut(whole_next, tmp_path, monkeypatch, step):
  config, workdir, store = whole_next
  with monkeypatch.context() as patch:
    cut_at(patch, step)
    with pytest.raises(Cut):
      training_loop.train(config, tmp_path, store)
  training_loop.train(config, tmp_path, store)
  expected = results_of(config, workdir, store)
  assert_same(results_of(config, tmp_path, store), expected)
  carry = expected[0].carry
  assert carry.there_BT.any() and np.ptp(carry.memory_BLMD) > 0.1


# The fast tests above are of one model for each task.
# Those here have draws, statistics, auxiliary losses, a memory or a carry of their own.
@pytest.mark.slow
@pytest.mark.parametrize('name, workers, bf16', [
  ('lmn', 1, True), ('dien', 0, False), ('mimn', 1, True), ('ubr4ctr', 0, False),
])  # fmt: skip
def test_click_models_continue_exactly(name, workers, bf16, tiny_store, tmp_path, monkeypatch):
  config = tiny_config(name, dropout=0.1, bf16=bf16)
  assert_continues_exactly(config, workers, tiny_store, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize('name, workers, bf16', [('dman', 1, True), ('sasrec', 0, False)])
def test_next_item_models_continue_exactly(name, workers, bf16, whole_next, tmp_path, monkeypatch):
  config = tiny_next(name, dropout=0.1, bf16=bf16)
  assert_continues_exactly(config, workers, whole_next[2], tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize('name, arguments', [('adamw', {'b1': 0.8}), ('adafactor', {})])
def test_optimizers_of_optax_continue_exactly(name, arguments, tiny_store, tmp_path, monkeypatch):
  config = tiny_config()
  config.optimizer.dense = dict(name=name, rate=0.01, arguments=arguments)
  assert_continues_exactly(config, 0, tiny_store, tmp_path, monkeypatch)


def assert_continues_exactly(config, workers, store, tmp_path, monkeypatch):
  """Asserts that a run that is cut before step 7 equals one that is not."""
  config.update(dict(steps=8, loader_workers=workers))
  with promotion_of(config):
    training_loop.train(config, tmp_path / 'whole', store)
    with monkeypatch.context() as patch:
      cut_at(patch, 7)
      with pytest.raises(Cut):
        training_loop.train(config, tmp_path / 'cut', store)
    assert steps_kept(tmp_path / 'cut')[-1] == 6
    training_loop.train(config, tmp_path / 'cut', store)
  assert_same(*(results_of(config, tmp_path / name, store) for name in ('cut', 'whole')))


def test_report_of_next_items(whole_next):
  config, workdir, store = whole_next
  written = json.loads((workdir / 'report.json').read_text())
  assert written['columns'][:2] == ['ndcg@10', 'hr@10'] and written['columns'][-1] == 'mrr'
  targets = store.manifest['counts']['clicks']['test']
  for metrics in (written['test'], *written['baselines']['test'].values()):
    assert metrics['overall']['rows'] == targets > 30
    assert sum(x['rows'] for x in metrics['by_history'].values()) == targets
  assert set(written['baselines']['test']) == {'popularity', 'markov'}
  # Ranks among sampled negatives are reported under another name.
  setup, best = trained_run.best_of(config, workdir, store)
  source, V = setup.sources['test'], setup.model.items
  rank = trained_run.score_split(setup, best.state, 'test')
  unseen = [set(range(1, V)) - set(x.tolist()) for x in source.before(source.numbers)]
  rivals = [len(x - {y}) for x, y in zip(unseen, source.targets.item[source.numbers], strict=True)]
  expected = ranking.measure_sampled(rank, np.array(rivals), 5, config.ranks)
  assert written['test']['sampled'] == pytest.approx(expected)
  assert expected['mrr'] > written['test']['overall']['mrr']
  printed = reports.table_of(written)
  assert f'{expected["mrr"]:.4f}' in printed.split('among 5 sampled negatives, not comparable')[1]
  # The best validation by the first column; of equals the earliest.
  valid = {x['step']: x['ndcg@10'] for x in lines(workdir) if x['group'] == 'valid'}
  assert list(valid) == [4, 8, 12, 16] and written['step'] == max(valid, key=valid.get)
  assert written['valid']['overall']['ndcg@10'] == pytest.approx(valid[written['step']])


@pytest.mark.parametrize('exclude_seen', [True, False])
def test_ranks_equal_those_of_one_user_at_a_time(whole_next, exclude_seen):
  """Streaming over lanes and ranking in blocks equals sorting the scores of each user alone."""
  config, workdir, store = whole_next
  setup, best = trained_run.best_of(config, workdir, store)
  config = config.copy_and_resolve_references()
  config.exclude_seen = exclude_seen
  setup = setup._replace(sources=setup.task.sources(config, store, setup.mesh))
  source, V = setup.sources['test'], setup.model.items
  ranks = trained_run.score_split(setup, best.state, 'test')
  server = StatefulModel(setup.model, setup.trainer, setup.mesh, config.history_length, 8)
  past = source.before(source.numbers)
  states = server.empty(
    np.array([users_of(store).row[u] for u in source.targets.user[source.numbers]])
  )
  states = server.update(best.state, states, [{'item': items} for items in past])
  every = np.tile(np.arange(1, V), (len(past), 1))
  scores = np.pad(server.score(best.state, states, every), ((0, 0), (1, 0)))
  met = past if exclude_seen else [x[:0] for x in past]
  expected = ranking.ranks_of(scores, source.targets.item[source.numbers], met)
  protocol = setup.task.protocol(config)
  assert ('but those the user has met' in protocol) == exclude_seen
  baselines = ranking.rank_baselines(training_items(store), source, V)
  count_V = np.bincount(np.concatenate(list(training_items(store))), minlength=V)
  popular = ranking.ranks_of(
    np.broadcast_to(count_V.astype(np.float64), scores.shape),
    source.targets.item[source.numbers],
    met,
  )
  placed = np.array([len(items) > 0 for items in past])
  assert placed.sum() > 30 and len(set(expected[placed])) > 8
  # Sums are rounded differently, so a few ranks differ by one or two where scores are close.
  assert (ranks == expected)[placed].mean() > 0.9
  assert np.abs(ranks - expected)[placed].max() <= 2
  assert (ranks[~placed] == V).all()
  assert (baselines['popularity'] == popular)[placed].all()


def test_a_finished_run_is_not_trained_again(whole, tiny_store, monkeypatch):
  config, workdir, report = whole
  before = results_of(config, workdir, tiny_store)
  cut_at(monkeypatch, 1)
  again = training_loop.train(config, workdir, tiny_store)
  assert_same(results_of(config, workdir, tiny_store), before)
  assert again['test'] == report['test'] and again['steps'] == 16


def test_one_command_at_a_time_uses_a_run(whole, tiny_store):
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


def test_evaluation_gives_the_same_report(whole, tiny_store):
  config, workdir, report = whole
  again = trained_run.evaluate_best(config, workdir, tiny_store)
  times = ('steps', 'train_seconds', 'peak_rss')
  assert again == {name: x for name, x in report.items() if name not in times}
  assert json.loads((workdir / 'evaluation.json').read_text())['test'] == again['test']


def validations(monkeypatch, aucs):
  """Replaces the AUCs of the first validations; later ones are unchanged."""
  report, aucs = click_evaluation.report, list(aucs)

  def replaced(*arguments):
    metrics = report(*arguments)
    if aucs:
      metrics['overall']['auc'] = aucs.pop(0)
    return metrics

  monkeypatch.setattr(click_evaluation, 'report', replaced)


def test_best_and_last_are_kept(tiny_store, tmp_path, monkeypatch):
  """Of equal scores the first is best, also after a cut; steps between are removed."""
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
  """Two consecutive validations without a better score stop the run; more patience continues it."""
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


def test_a_loss_that_is_not_finite_stops_the_run(tiny_store, tmp_path):
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


def test_weights_that_are_not_finite_are_not_saved(tiny_store, tmp_path):
  message = r'not finite at step 1: weights/\w+.*; there is no checkpoint'
  config = wild_config(1e38)
  config.optimizer.dense.rate = 3e38
  config.optimizer.dense.decay = 1e30
  with pytest.raises(DivergedError, match=message):
    training_loop.train(config, tmp_path, tiny_store)
  assert steps_kept(tmp_path) == []


def nan_batches(monkeypatch, steps):
  """Replaces the labels of these training batches by NaN."""
  place, placed = meshes.place, []

  def place_nan(mesh, batch):
    if len(batch.get('label', ())) == 32:
      placed.append(batch)
      if len(placed) in steps:
        batch = batch | {'label': np.full(32, np.nan, np.float32)}
    return place(mesh, batch)

  monkeypatch.setattr(meshes, 'place', place_nan)


def test_skip_not_finite_skips_steps(tiny_store, tmp_path, monkeypatch):
  """Two consecutive ones are skipped and counted; a third ends the run."""
  config = tiny_config()
  config.skip_not_finite = 2
  with monkeypatch.context() as patch:
    nan_batches(patch, (3, 5, 6))
    training_loop.train(config, tmp_path / 'two', tiny_store)
  skipped = {x['step']: x['skipped'] for x in lines(tmp_path / 'two') if x['group'] == 'train'}
  assert {step: count for step, count in skipped.items() if count} == {3: 1, 6: 2}
  with monkeypatch.context() as patch:
    nan_batches(patch, (5, 6, 7))
    message = 'not finite at step 7: the loss is nan, losses/click and .* last good .* is step 6'
    with pytest.raises(DivergedError, match=message):
      training_loop.train(config, tmp_path / 'three', tiny_store)
  state = left_state(config, tmp_path / 'three', tiny_store)
  assert state.step == 6 and all(np.isfinite(x).all() for x in jax.tree.leaves(state))
  # The count of consecutive steps continues after a cut: the checkpoint holds two.
  with monkeypatch.context() as patch:
    nan_batches(patch, (1,))
    with pytest.raises(DivergedError, match='not finite at step 7: '):
      training_loop.train(config, tmp_path / 'three', tiny_store)


@pytest.mark.slow
def test_a_step_is_diagnosed_with_its_own_state(tiny_store, tmp_path, monkeypatch):
  """Although the next step was sent before: weights, key and moments are those before the step."""
  config = tiny_config('din')
  config.model.dropout = 0.5
  config.update(dict(steps=2, eval_every=2, save_every=2, log_every=4))
  training_loop.train(config, tmp_path / 'before', tiny_store)
  expected = left_state(config, tmp_path / 'before', tiny_store)
  nan_batches(monkeypatch, (3,))
  calls, compile_program = [], setups.compile_program

  def spied(program):
    trainer = compile_program(program)

    def diagnose(state, batch):
      calls.append(jax.device_get((state, batch)))
      return trainer.diagnose(state, batch)

    return trainer._replace(diagnose=diagnose)

  monkeypatch.setattr(setups, 'compile_program', spied)
  config.update(dict(steps=8, eval_every=8, save_every=8))
  with pytest.raises(DivergedError, match='not finite at step 3: the loss is nan, losses/click'):
    training_loop.train(config, tmp_path / 'nan', tiny_store)
  ((state, batch),) = calls
  assert np.isnan(batch['label']).all()
  chex.assert_trees_all_equal(state, jax.device_get(expected))


def test_a_run_continues_from_the_last_sound_step(whole, tiny_store, tmp_path, monkeypatch, caplog):
  config, workdir, _ = whole
  with monkeypatch.context() as patch:
    cut_at(patch, 10)
    with pytest.raises(Cut):
      training_loop.train(config, tmp_path, tiny_store)
  assert steps_kept(tmp_path)[-2:] == [8, 9]
  file = tmp_path / 'checkpoints' / 'step_9' / 'loop' / 'metadata'
  file.write_bytes(file.read_bytes()[:-1])
  training_loop.train(config, tmp_path, tiny_store)
  assert 'step_9 is damaged' in caplog.text
  assert_same(results_of(config, tmp_path, tiny_store), results_of(config, workdir, tiny_store))


def test_a_damaged_best_checkpoint_is_not_evaluated(tiny_store, tmp_path, monkeypatch):
  validations(monkeypatch, [0.6, 0.7, 0.5, 0.6])
  training_loop.train(tiny_config(), tmp_path, tiny_store)
  (tmp_path / 'checkpoints' / 'step_8' / 'seal.json').unlink()
  with pytest.raises(UserError, match='step_8 is damaged: it has no seal.json; restore it'):
    trained_run.evaluate_best(tiny_config(), tmp_path, tiny_store)


def test_a_store_that_changes_ends_the_run(tiny_store, tmp_path, monkeypatch):
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


def test_scores_that_are_not_finite_stop_the_run(tiny_store, tmp_path, monkeypatch):
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
  """After a run, another one that is stopped and continued compiles nothing."""
  config, *_ = whole
  half = copy.deepcopy(config)
  half.steps = 8
  with compilations() as compiled:
    training_loop.train(half, tmp_path, tiny_store)
    training_loop.train(config, tmp_path, tiny_store)
  assert not compiled


HELD_OUT = {'all': (0.1, 0.1), 'valid': (0.2, 0.0), 'test': (0.0, 0.2), 'none': (0.0, 0.0)}


@pytest.mark.parametrize('held', but_slow(['none', 'test', 'valid'], {0}))
@pytest.mark.parametrize('make', but_slow([tiny_config, tiny_next], {0}))
def test_training_without_some_splits(tmp_path, monkeypatch, capsys, make, held):
  """Without validation it trains for config.steps, and the last checkpoint is the best."""
  config = make() if make is tiny_config else make('hpmn')
  valid, test = HELD_OUT[held]
  config.data.split.update(dict(valid=valid, test=test))
  store = prepare.prepare(config.data, tmp_path / 'stores')
  expected = [name for name, share in (('valid', valid), ('test', test)) if share]
  assert [name for name in ('valid', 'test') if store.examples[name]] == expected
  if not valid:
    with monkeypatch.context() as patch:
      cut_at(patch, 7)
      with pytest.raises(Cut):
        training_loop.train(config, tmp_path / 'run', store)
  report = training_loop.train(config, tmp_path / 'run', store)
  assert [name for name in ('valid', 'test') if name in report] == expected
  assert list(report['baselines']) == expected and report['steps'] == 16
  if not valid:
    assert report['step'] == 16 == steps_kept(tmp_path / 'run')[-1]
    assert 'no validation split: trains for config.steps' in capsys.readouterr().err
    config.patience = 2
    with pytest.raises(UserError, match='config.patience=2 needs a validation split, and there'):
      training_loop.train(config, tmp_path / 'run', store)
    config.patience = 0
  printed = reports.table_of(report)
  if expected:
    assert printed.startswith(f'{expected[-1]}, {report[expected[-1]]["overall"]["rows"]:,} rows')
  else:
    assert printed.startswith('no split is held out') and report['protocol'] in printed
  assert trained_run.evaluate_best(config, tmp_path / 'run', store)['step'] == report['step']


def test_warnings_about_a_config(tmp_path, tiny_store, monkeypatch):
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
    'batches: each step has some of them more than once; lower it',
    'config.optimizer.dense.rate=1000000.0 is too large for adam to learn anything; set at most 1',
  ]
  plain = tiny_config()
  assert not config_warnings.doubts(plain, tiny_store, {'train': source['train']})
  monkeypatch.setitem(tiny_store.manifest['counts']['out_of_vocabulary']['item'], 'test', 0.6)
  (line,) = config_warnings.doubts(plain, tiny_store, {'train': source['train']})
  assert line.startswith('60% of the examples of test have an unknown item, about which its id')


def test_a_validation_of_one_class_is_refused(tiny_store, tmp_path, monkeypatch):
  monkeypatch.setitem(tiny_store.manifest['counts']['clicks'], 'valid', 0)
  message = (
    'validation split has 0 clicks in .* examples, so it has no AUC; '
    'raise config.data.split.valid=0.1'
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


@pytest.mark.slow
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


@pytest.mark.parametrize('make', but_slow([tiny_config, tiny_next], {0}))
def test_the_loop_reads_arrays_with_device_get_only(make, tmp_path, monkeypatch):
  """On a GPU the loop's guard refuses other reads; on CPU reading an array is not a transfer."""
  array, reads, depth = type(jax.numpy.zeros(())), [], [0]
  jax_get, jax_value = jax.device_get, array._value

  def device_get(x):
    depth[0] += 1
    try:
      return jax_get(x)
    finally:
      depth[0] -= 1

  def value(self):
    if jax.config.jax_transfer_guard == 'disallow' and not depth[0]:
      reads.append(traceback.format_stack(limit=6))
    return jax_value.__get__(self)

  config = make()
  config.update(dict(steps=3, eval_every=2, save_every=1, log_every=1))
  store = prepare.prepare(config.data, tmp_path / 'stores')
  monkeypatch.setattr(jax, 'device_get', device_get)
  monkeypatch.setattr(array, '_value', property(value))
  training_loop.train(config, tmp_path / 'run', store)
  assert not reads, ''.join(reads[0])
