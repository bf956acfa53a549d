"""The training of one experiment, from the store to the report: one story, top to bottom."""

import math
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from lmn_jax import __version__, evaluate, mesh, models, update
from lmn_jax.batches import BatchSource, loader
from lmn_jax.checkpoint import Checkpoints, check_same
from lmn_jax.errors import UserError
from lmn_jax.layers import Schema
from lmn_jax.models.ctr import CTRModel
from lmn_jax.store import Store
from lmn_jax.writer import Writer, peak_rss, progress, write_json


class DivergedError(RuntimeError):
  """The loss is no number any more."""


class Experiment(NamedTuple):
  """What a config and a store make together."""

  mesh: Mesh
  model: CTRModel
  train: BatchSource
  valid: BatchSource
  test: BatchSource
  trainer: update.Trainer


def set_up(config: ml_collections.ConfigDict, store: Store) -> Experiment:
  """Builds mesh, model, batches and functions of an experiment; nothing is trained yet.

  Raises:
    UserError: for a value out of its bounds.
  """
  for name in ('steps', 'batch_size', 'eval_batch_size', 'history_length', 'log_every',
               'eval_every', 'save_every'):  # fmt: skip
    if config[name] < 1:
      raise UserError(f'config.{name}={config[name]} must be at least 1')
  grid = mesh.make_mesh(config.mesh.model)
  for name in ('batch_size', 'eval_batch_size'):
    if config[name] % grid.shape['data']:
      below = config[name] // grid.shape['data'] * grid.shape['data']
      near = [size for size in (below, below + grid.shape['data']) if size]
      raise UserError(
        f'config.{name}={config[name]} is not divisible by the {grid.shape["data"]} devices of '
        f'the data axis; use {" or ".join(map(str, near))}'
      )
  schema = Schema(tuple(store.vocabulary.items()), **store.features)
  model = models.build(config.model.to_dict(), schema)

  def source(split, size, shuffle=False):
    return BatchSource(
      store.path, split, size, config.history_length, config.seed, shuffle,
      jax.process_index(), jax.process_count(),
    )  # fmt: skip

  train = source('train', config.batch_size, shuffle=True)
  shapes = {
    name: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype)
    for name, x in train[0].items()
  }
  trainer = update.make_trainer(config, model, shapes, grid)
  return Experiment(
    grid, model, train,
    source('valid', config.eval_batch_size), source('test', config.eval_batch_size), trainer,
  )  # fmt: skip


def train(config: ml_collections.ConfigDict, workdir: Path, store: Store) -> dict:
  """Trains until `config.steps` or until validation stops improving, then reports on the best.

  Args:
    config: the whole experiment. workdir: of this run; a run found there is continued.
    store: the prepared history store.

  Returns:
    The report, also written to `workdir/report.json`.

  Raises:
    UserError: of a config that does not fit, or a workdir of another experiment.
    DivergedError: the loss became NaN or infinite.
  """
  exp = set_up(config, store)
  # What a checkpoint belongs to: the config and the content of the data.
  identity = config.to_dict() | {'store': store.fingerprint}
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    # Where to begin: the newest checkpoint, if this very experiment has one.
    data = loader(exp.train, workers=config.loader_workers)
    start = checkpoints.latest()
    if start is None:
      state = exp.trainer.init(config.seed)
      loop: dict[str, Any] = {'best_auc': None, 'best_step': None, 'waited': 0, 'seconds': 0.0}
    else:
      check_same(workdir, checkpoints.config(start), identity)
      _, state, loop = checkpoints.restore(start, exp.trainer.abstract, data)
    with Writer(workdir, start) as writer:
      writer.say(describe(config, store, exp))
      if start is not None:
        writer.say(f'resumed from step {start} of {workdir}')
      write_json(workdir / 'config.json', identity)

      # The loop. A step's metrics are fetched after the next step is sent, so that the device
      # never waits for the host.
      first = step = start or 0
      pending, began, window = None, time.monotonic(), (time.monotonic(), first)
      stopped = config.patience and loop['waited'] >= config.patience
      with jax.transfer_guard('disallow'):
        while step < config.steps and not stopped:
          state, metrics = exp.trainer.update(state, mesh.place(exp.mesh, next(data)))
          step += 1
          if pending is not None:
            loss = finite_loss(pending, step - 1, checkpoints)
          pending = metrics
          validate = step % config.eval_every == 0 or step == config.steps
          save = validate or step % config.save_every == 0
          if step % config.log_every == 0 or save:
            loss = finite_loss(pending, step, checkpoints)
            writer.write(step, jax.device_get(pending))
            pending = None
            now = time.monotonic()
            speed = (step - window[1]) * config.batch_size / max(now - window[0], 1e-9)
            window = (now, step)
            writer.say(
              progress(
                step, config.steps, now - began, speed, loss, loop['best_auc'], peak_rss(), first
              )
            )
          auc = None
          if validate:
            found = evaluate.report(
              evaluate.score(exp.trainer, state, exp.valid, exp.mesh), config.buckets
            )
            auc = found['overall']['auc']
            if auc is None:
              raise UserError(
                f'validation has {found["overall"]["rows"]} rows of one class, so no AUC; give '
                'config.data.split.valid more'
              )
            values = found['overall'] | evaluate.health(state, exp.model.tables())
            writer.write(step, values, 'valid')
            writer.say(line_of(values, 'valid'))
            state = exp.trainer.reset_reads(state)
            if loop['best_auc'] is None or auc > loop['best_auc']:
              loop |= {'best_auc': auc, 'best_step': step, 'waited': 0}
            else:
              loop['waited'] += 1
            stopped = config.patience and loop['waited'] >= config.patience
          if save:
            writer.flush()
            seconds = loop['seconds'] + time.monotonic() - began
            checkpoints.save(state, data, loop | {'seconds': seconds}, identity, auc)
            window = (time.monotonic(), step)
      checkpoints.wait()
      if stopped:
        writer.say(f'stopped at step {step}: {loop["waited"]} validations without a better AUC')
      seconds = loop['seconds'] + time.monotonic() - began

    # The report is about the best checkpoint: chosen on validation, tested once.
    best = checkpoints.restore(checkpoints.best(), exp.trainer.abstract)
    report = make_report(config, store, exp, best.state, best.step)
    report |= {'steps': step, 'train_seconds': seconds, 'peak_rss': peak_rss()}
    write_json(workdir / 'report.json', report)
    return report


def evaluate_best(config: ml_collections.ConfigDict, workdir: Path, store: Store) -> dict:
  """Reports again on the best checkpoint of a run, without training.

  Raises:
    UserError: if there is no checkpoint, or it is of another experiment.
  """
  if not (workdir / 'checkpoints').is_dir():
    raise UserError(f'{workdir} holds no checkpoint; run --mode=train first')
  exp = set_up(config, store)
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    step = checkpoints.best()
    if step is None:
      raise UserError(f'{workdir} holds no checkpoint; run --mode=train first')
    check_same(workdir, checkpoints.config(step), config.to_dict() | {'store': store.fingerprint})
    best = checkpoints.restore(step, exp.trainer.abstract)
  report = make_report(config, store, exp, best.state, best.step)
  write_json(workdir / 'evaluation.json', report)
  return report


def finite_loss(metrics: dict[str, jax.Array], step: int, checkpoints: Checkpoints) -> float:
  """The loss of a step, as a float.

  Raises:
    DivergedError: it is NaN or infinite.
  """
  loss = float(jax.device_get(metrics['loss']))
  if not math.isfinite(loss):
    checkpoints.wait()
    last = checkpoints.latest()
    kept = 'no checkpoint before it' if last is None else f'last good checkpoint: step {last}'
    raise DivergedError(
      f'loss is {loss} at step {step}; {kept}. Lower config.optimizer.*.rate, or set '
      'config.optimizer.clip_norm'
    )
  return loss


def make_report(
  config: ml_collections.ConfigDict, store: Store, exp: Experiment, state: update.State, step: int
) -> dict:
  """Metrics of the model and of the trainless baselines, with all that makes a number traceable."""
  valid = evaluate.score(exp.trainer, state, exp.valid, exp.mesh)
  test = evaluate.score(exp.trainer, state, exp.test, exp.mesh)
  return {
    'model': config.model.name,
    'step': step,
    'valid': evaluate.report(valid, config.buckets),
    'test': evaluate.report(test, config.buckets),
    'baselines': {
      'valid': evaluate.report_baselines(store, valid, config.buckets),
      'test': evaluate.report_baselines(store, test, config.buckets),
    },
    'protocol': store.protocol,
    'fingerprint': store.fingerprint,
    'seed': config.seed,
    'counts': store.manifest['counts'],
    'vocabulary': store.vocabulary,
    'parameters': sum(int(np.prod(x.shape)) for x in jax.tree.leaves(exp.trainer.abstract.params)),
    'tables': {name: [spec.rows, spec.width] for name, spec in exp.model.tables().items()},
    'devices': f'{jax.device_count()} {jax.devices()[0].device_kind}',
    'version': __version__,
    'commit': commit(),
    'config': config.to_dict(),
  }


def commit() -> str | None:
  """The commit of the source tree this package lies in, '+changes' if it was edited; or None."""
  here = Path(__file__).parent
  try:
    tracked = ['git', '-C', str(here), 'ls-files', '--error-unmatch', Path(__file__).name]
    subprocess.run(tracked, capture_output=True, check=True)
    head = ['git', '-C', str(here), 'rev-parse', 'HEAD']
    name = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    changed = ['git', '-C', str(here), 'diff', '--quiet', 'HEAD']
    return name + ('+changes' if subprocess.run(changed).returncode else '')
  except (OSError, subprocess.CalledProcessError):
    return None  # no git, or an installed package: the version stands for it


def describe(config: ml_collections.ConfigDict, store: Store, exp: Experiment) -> str:
  """One line on what is about to be trained."""
  counts = store.manifest['counts']
  tables = ', '.join(
    f'{name} {spec.rows:,} x {spec.width}' for name, spec in exp.model.tables().items()
  )
  return (
    f'{config.model.name} on {store.path.name}: {counts["users"]:,} users, '
    f'{counts["events"]:,} events, {exp.train.examples:,} / {exp.valid.examples:,} / '
    f'{exp.test.examples:,} examples; {store.protocol}; tables {tables}; '
    f'{exp.mesh.size} {jax.devices()[0].device_kind}'
  )


def line_of(values: dict, what: str) -> str:
  """Metrics on one line, those without a value left out."""
  shown = {k: v for k, v in values.items() if isinstance(v, float)}
  return f'{what} ' + ' · '.join(f'{name} {value:.4f}' for name, value in shown.items())


def table_of(report: dict) -> str:
  """The report's test metrics as a table: the model beside the trainless baselines."""
  rows = [(name, found['overall']) for name, found in report['baselines']['test'].items()]
  rows.append((report['model'], report['test']['overall']))
  columns = ('auc', 'gauc', 'log_loss', 'normalised_entropy', 'calibration')
  lines = [f'{"test":<18}' + ''.join(f'{name:>20}' for name in columns)]
  for name, found in rows:
    cells = ['-' if found[c] is None else f'{found[c]:.4f}' for c in columns]
    lines.append(f'{name:<18}' + ''.join(f'{cell:>20}' for cell in cells))
  lines.append('')
  lines.append(f'{report["model"] + " by history":<18}{"rows":>20}{"auc":>20}{"gauc":>20}')
  for name, found in report['test']['by_history'].items():
    cells = [f'{found["rows"]:,}'] + [
      '-' if found[c] is None else f'{found[c]:.4f}' for c in ('auc', 'gauc')
    ]
    lines.append(f'{name:<18}' + ''.join(f'{cell:>20}' for cell in cells))
  return '\n'.join(lines)
