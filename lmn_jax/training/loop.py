"""The training of one experiment, from the store to the report: one story, top to bottom."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from lmn_jax import config as configs
from lmn_jax import files
from lmn_jax.data.batches import loader
from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh, preemption, processes
from lmn_jax.errors import DivergedError, Preempted, UserError
from lmn_jax.evaluation import click_evaluation, report, scored_rows
from lmn_jax.files import write_json
from lmn_jax.layers.basic import Schema
from lmn_jax.models import registry
from lmn_jax.models.base import Model
from lmn_jax.tables import optimizers
from lmn_jax.training import checkpoint, config_warnings, update
from lmn_jax.training.checkpoint import Checkpoints, check_same
from lmn_jax.training.tasks import TASKS, Task
from lmn_jax.training.writer import Writer, peak_rss, progress

REPORT, EVALUATION, CHECKPOINTS = 'report.json', 'evaluation.json', 'checkpoints'
LOCK = '.lock'  # in a workdir: one command at a time uses a run


class Experiment(NamedTuple):
  """What a config and a store make together. sources: batches by split, the training's endless."""

  task: Task
  mesh: Mesh
  model: Model
  sources: dict[str, Any]
  trainer: update.Trainer


@contextlib.contextmanager
def only_command(workdir: Path) -> Iterator[None]:
  """Holds the lock of a run, so that one command at a time uses it.

  The hosts of one command share the run: the first of them holds the lock.

  Raises:
    UserError: another command uses the run.
  """
  if processes.index() > 0:
    yield
    return
  with files.locked(workdir / LOCK):
    yield


def check(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
  """Refuses what is wrong with a config whatever the data are, before they are prepared.

  Args:
    config: the whole experiment. devices: of the mesh; by default those JAX runs on.

  Raises:
    UserError: naming the field, its value and the bound.
  """
  configs.check(config)
  # How many ids there are is in the data; what the items' features are called is not.
  features = tuple(f'item.{name}' for name in config.data.item_features)
  registry.build(config.model.to_dict(), Schema((), item=features), config.task)
  for group in ('dense', 'embedding', 'memory'):
    optimizers.make(config.optimizer, group, config.steps)
    if group != 'dense':
      optimizers.row_type(config.optimizer, group)
  data = mesh.make_mesh(config.mesh.model, devices).shape['data']
  for name in ('batch_size', 'eval_batch_size'):
    if config[name] % data:
      below = config[name] // data * data
      near = [str(size) for size in (below, below + data) if size]
      raise UserError(
        f'config.{name}={config[name]} is not divisible by the {data} devices of the data axis; '
        f'use {" or ".join(near)}'
      )


def set_up(
  config: ml_collections.ConfigDict, store: Store, devices: Sequence[jax.Device] | None = None
) -> Experiment:
  """Builds mesh, model, batches and functions of an experiment; nothing is trained yet.

  Args:
    config: the whole experiment. store: its data.
    devices: of the mesh; by default those JAX runs on.

  Raises:
    UserError: for a value out of its bounds, or a validation split that cannot choose.
  """
  check(config, devices)
  task, grid = TASKS[config.task], mesh.make_mesh(config.mesh.model, devices)
  schema = Schema(tuple(store.vocabulary.items()), **store.features)
  model = registry.build(config.model.to_dict(), schema, config.task)
  sources = task.sources(config, store, grid)
  shapes = {
    name: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype)
    for name, x in sources['train'][0].items()
  }
  if config.patience and 'valid' not in sources:
    raise UserError(
      f'config.patience={config.patience} waits for a better validation, and nothing validates; '
      'set it to 0, or hold out config.data.split.valid'
    )
  trainer = update.make_trainer(config, model, shapes, grid)
  return Experiment(task, grid, model, sources, trainer)


def train(config: ml_collections.ConfigDict, workdir: Path, store: Store) -> dict:
  """Trains until `config.steps` or until validation stops improving, then reports on the best.

  Without a validation split the last checkpoint counts as the best.

  Args:
    config: the whole experiment. workdir: of this run; a run found there is continued.
    store: the prepared history store.

  Returns:
    The report, also written to `workdir/report.json`.

  Raises:
    UserError: of a config that does not fit, a workdir that is in use or of another experiment, a
      disk that does not take a checkpoint.
    DivergedError: the loss, a gradient, a score or a weight became NaN or infinite.
    Preempted: SIGTERM came; what was trained is saved.
    KeyboardInterrupt: it says from which step the run can go on.
  """
  folder = workdir / CHECKPOINTS
  try:
    with preemption.listening() as notice:
      exp = set_up(config, store)
      workdir.mkdir(parents=True, exist_ok=True)
      with only_command(workdir), checkpoint.told_of_disk(folder):
        return _train(config, workdir, store, exp, notice)
  except (Preempted, KeyboardInterrupt) as error:
    last = max(checkpoint.steps_of(folder), default=None)
    ended = f'ended by {error}' if isinstance(error, Preempted) else 'interrupted'
    kept = 'nothing is saved yet; the same command begins again'
    if last is not None:
      kept = f'step {last} is saved ({folder}); the same command goes on from there'
    raise type(error)(f'{ended}: {kept}') from error


def _train(config, workdir, store, exp, notice):
  # What a checkpoint belongs to: the config and the content of the data.
  identity = config.to_dict() | {'store': store.fingerprint}
  criterion = exp.task.columns(config)[0]
  checkpoint.set_aside(workdir / CHECKPOINTS)
  with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
    # Where to begin: the newest checkpoint, if this very experiment has one.
    start = checkpoints.latest()
    if start is not None:
      check_same(workdir, checkpoints.config(start), identity)
    checkpoints.go_on_from(start)
    data = loader(exp.sources['train'], workers=config.loader_workers)
    # in_row, skipped: steps left out as not finite, one after the other and since the last line.
    # The device counts those in a row itself: see `update.Trainer`.
    loop: dict[str, Any] = {'seconds': 0.0, 'in_row': 0, 'skipped': 0}
    if start is None:
      state = exp.trainer.init(config.seed)
    else:
      _, state, loop = checkpoints.restore(start, exp.trainer.abstract, data)
    with contextlib.closing(data), Writer(workdir, start) as writer:
      writer.say(report.describe(config, store, exp.model.tables(), exp.mesh.size))
      for line in config_warnings.doubts(config, store, exp.sources):
        writer.say(f'warning: {line}')
      if 'valid' not in exp.sources:
        writer.say(
          'nothing validates: trains for config.steps, and the last checkpoint is the best'
        )
      if start is not None:
        writer.say(f'resumed from step {start} of {workdir}')
      elif (workdir / 'config.json').exists():
        writer.say(f'{workdir} holds no checkpoint: begins at step 0')
      write_json(workdir / 'config.json', identity)

      first = step = start or 0
      began, window = time.monotonic(), (time.monotonic(), first)

      def look(number, metrics, batch):
        """Looks at a step when the next one is sent: the device never waits for the host."""
        loss, in_row = jax.device_get((metrics['loss'], metrics['skipped']))
        loop['in_row'] = int(in_row)
        loop['skipped'] += int(in_row > 0)
        if in_row > config.skip_not_finite:
          # Neither this step nor the one sent since has moved anything but the count of steps.
          began_with = state._replace(step=mesh.whole(exp.mesh, np.int32(number - 1)))
          found = update.first_not_finite(jax.device_get(exp.trainer.finite(began_with, batch)))
          raise diverged(f'the loss is {loss}, {found or "a gradient"}', number, checkpoints)
        return float(loss)

      def save():
        found = update.first_not_finite(jax.device_get(checkpoint.finite(state)))
        if found:
          raise diverged(found, step, checkpoints)
        store.check_unchanged()
        writer.flush()
        seconds = loop['seconds'] + time.monotonic() - began
        checkpoints.save(state, data, loop | {'seconds': seconds}, identity)

      def validate():
        with notice.waits(False):
          found = evaluate_split(config, store, exp, state, 'valid')['overall']
        if found.get('not_finite'):
          checkpoints.drop(step)
          raise diverged(f'{found["not_finite"]} validation scores', step, checkpoints)
        values = found | click_evaluation.health(state.tables, exp.model.tables())
        writer.write(step, values, 'valid')
        writer.say(report.line_of(values, 'valid'))
        writer.flush()
        checkpoints.validated(step, found[criterion])

      def due():
        """Whether a step asks for a validation that it has not had."""
        asks = 'valid' in exp.sources and (step % config.eval_every == 0 or step == config.steps)
        return asks and step > 0 and step not in dict(checkpoints.scores)

      # The loop. What is validated has been saved before.
      pending, saved, told = None, start, False
      skipped = mesh.whole(exp.mesh, np.float32(loop['in_row']))
      with jax.transfer_guard('disallow'), notice.waits():
        if due():
          validate()
        while step < config.steps and not out_of_patience(config, checkpoints.scores):
          told = notice.due(step)
          try:
            batch = None if told else mesh.place(exp.mesh, next(data))
          except Exception:
            told = notice.explains_failure()
            if not told:
              raise
          if told:
            break
          # Not right after the validation: a checkpoint holds the weights that were validated, and
          # a run that is continued from it opens the window as well.
          if step % config.eval_every == 0:
            state = exp.trainer.new_window(state)
          state, metrics = exp.trainer.update(state, batch, skipped)
          skipped = metrics['skipped']
          step += 1
          if pending is not None:
            look(*pending)
          pending = step, metrics, batch
          saves = due() or step % config.save_every == 0 or step == config.steps
          if step % config.log_every == 0 or saves:
            loss = look(*pending)
            pending = None
            writer.write(step, jax.device_get(metrics) | {'skipped': loop['skipped']})
            loop['skipped'] = 0
            now = time.monotonic()
            speed = (step - window[1]) * config.batch_size / max(now - window[0], 1e-9)
            window = (now, step)
            best = checkpoint.standing(checkpoints.scores).best
            writer.say(
              progress(
                step, config.steps, now - began, speed, loss,
                None if best is None else (criterion, best), peak_rss(), first,
              )
            )  # fmt: skip
          if saves:
            save()
            saved = step
            if due():
              validate()
            window = (time.monotonic(), step)
        if pending is not None:
          look(*pending)
        if told and saved != step:
          save()
      seconds = loop['seconds'] + time.monotonic() - began
      checkpoints.wait()
      if told:
        raise Preempted('SIGTERM')
      notice.heed()
      if step < config.steps:
        waited = checkpoint.standing(checkpoints.scores).waited
        writer.say(f'stopped at step {step}: {waited} validations without a better {criterion}')
      checkpoints.prune()

    # The report is about the best checkpoint: chosen on validation, tested once.
    best = checkpoints.restore(checkpoints.best(), exp.trainer.abstract)
    found = make_report(config, store, exp, best, score_held_out(exp, best.state))
    found |= {'steps': step, 'train_seconds': seconds, 'peak_rss': peak_rss()}
    write_json(workdir / REPORT, found)
    return found


def evaluate_best(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, output: Path | None = None
) -> dict:
  """Reports again on the best checkpoint of a run, without training.

  Args:
    config: of a run that was trained. workdir: of the run. store: its data.
    output: a file for the score of each row of the test, see scored_rows.py; None for none.

  Returns:
    The report, also written to `workdir/evaluation.json`.

  Raises:
    UserError: if there is no checkpoint, or it is of another experiment, or in use; no test, or an
      output that cannot be written.
  """
  check_trained(workdir)
  with only_command(workdir):
    exp, best = best_of(config, workdir, store)
    if output and 'test' not in exp.sources:
      raise UserError(f'--output={output}: nothing is held out for the test, so it has no row')
    scores = score_held_out(exp, best.state)
    found = make_report(config, store, exp, best, scores)
    if output and jax.process_index() == 0:
      rows = exp.task.rows(store, exp.sources, 'test', scores['test'])
      scored_rows.write(config.data, store, 'test', rows, output)
    write_json(workdir / EVALUATION, found)
    return found


def check_trained(workdir: Path) -> None:
  """Refuses a folder in which nothing was trained.

  Raises:
    UserError: it has no folder of checkpoints.
  """
  if not (workdir / CHECKPOINTS).is_dir():
    raise UserError(f'{workdir} holds no checkpoint; run --mode=train first')


def best_of(
  config: ml_collections.ConfigDict, workdir: Path, store: Store
) -> tuple[Experiment, checkpoint.Restored]:
  """The experiment of a run with its best checkpoint.

  Raises:
    UserError: if there is no checkpoint, or it is of another experiment.
  """
  check_trained(workdir)
  exp = set_up(config, store)
  with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
    step = checkpoints.best()
    if step is None:
      raise UserError(f'{workdir} holds no checkpoint; run --mode=train first')
    check_same(workdir, checkpoints.config(step), config.to_dict() | {'store': store.fingerprint})
    return exp, checkpoints.restore(step, exp.trainer.abstract)


def score_held_out(exp: Experiment, state: update.State) -> dict[str, np.ndarray]:
  """The scores of the splits that are held out, by split; on every host."""
  return {
    split: exp.task.score(exp.trainer, state, exp.model, source, exp.mesh)
    for split, source in exp.sources.items()
    if split != 'train'
  }


def make_report(
  config: ml_collections.ConfigDict,
  store: Store,
  exp: Experiment,
  best: checkpoint.Restored,
  scores: dict[str, np.ndarray],
) -> dict:
  """The report on a checkpoint: the splits that are held out, scored with its weights."""
  return {
    'step': best.step,
    **report.origin(config, store),
    'protocol': '; '.join(filter(None, (store.protocol, exp.task.protocol(config)))),
    **{
      split: exp.task.report(config, store, exp.sources, split, found)
      for split, found in scores.items()
    },
    'baselines': {split: exp.task.baselines(config, store, exp.sources, split) for split in scores},
    'columns': exp.task.columns(config),
    'parameters': sum(math.prod(x.shape) for x in jax.tree.leaves(exp.trainer.abstract.params)),
    'tables': {name: [spec.rows, spec.width] for name, spec in exp.model.tables().items()},
  }


def evaluate_split(
  config: ml_collections.ConfigDict, store: Store, exp: Experiment, state: update.State, split: str
) -> dict:
  """The metrics of a split, overall and by length of history, with these weights."""
  scores = exp.task.score(exp.trainer, state, exp.model, exp.sources[split], exp.mesh)
  return exp.task.report(config, store, exp.sources, split, scores)


def out_of_patience(config: ml_collections.ConfigDict, scores: list[tuple[int, float]]) -> bool:
  """Whether validation has not improved for `config.patience` times; never if that is 0."""
  return 0 < config.patience <= checkpoint.standing(scores).waited


def diverged(what: str, step: int, checkpoints: Checkpoints) -> DivergedError:
  """The error for what is not finite at a step, naming the checkpoint that was kept."""
  checkpoints.wait()
  kept = checkpoint.last_kept(checkpoints.folder)
  return DivergedError(
    f'not finite at step {step}: {what}; {kept} ({checkpoints.folder}). Lower '
    'config.optimizer.*.rate or set config.optimizer.clip_norm, with another --workdir, or go on '
    'here and leave such steps out: config.skip_not_finite=N'
  )
