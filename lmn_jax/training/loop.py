"""The training loop of one experiment, from the store to the report.

`Session` holds what is constant while a process trains, `Run` the current position; each function
of the loop takes a Run and returns the next one.
"""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.distributed import preemption
from lmn_jax.errors import DivergedError, Preempted
from lmn_jax.evaluation import click_evaluation, report
from lmn_jax.evaluation.criterion import Criterion, criterion_of
from lmn_jax.files import write_json
from lmn_jax.training import config_warnings, integrity, step_folders, trained_run, validations
from lmn_jax.training import setup as setups
from lmn_jax.training.checkpoint import Checkpoints
from lmn_jax.training.compatibility import check_same
from lmn_jax.training.feed import Dispatch, Feed, until_event
from lmn_jax.training.initial_state import initial_state
from lmn_jax.training.program import State
from lmn_jax.training.setup import Setup
from lmn_jax.training.trained_run import CHECKPOINTS
from lmn_jax.training.update import first_not_finite
from lmn_jax.training.validations import out_of_patience
from lmn_jax.training.writer import Writer, peak_rss, progress

REPORT = 'report.json'


@dataclasses.dataclass(frozen=True)
class Session:
  """What is constant while a process trains.

  Attributes:
    config, workdir, store, setup: of `train`. notice: of SIGTERM.
    checkpoints: of the run. feed: of the training batches. writer: of the metrics.
    first: the step at which this process began. began: its time, by time.monotonic.
    seconds: of training before that.
  """

  config: ml_collections.ConfigDict
  workdir: Path
  store: Store
  setup: Setup
  notice: preemption.Notice
  checkpoints: Checkpoints
  feed: Feed
  writer: Writer
  first: int
  began: float
  seconds: float

  @property
  def criterion(self) -> Criterion:
    """The criterion that chooses the best checkpoint."""
    return criterion_of(self.config, self.setup.task.columns(self.config))

  def trained(self) -> float:
    """Returns the seconds of training, including those of earlier processes of the run."""
    return self.seconds + time.monotonic() - self.began


class Sent(NamedTuple):
  """Steps that were sent to the devices together.

  begin: number of updates before them. dispatch: their inputs. metrics: of `Feed.train`, [S] by
  name, or scalars for a single step.
  """

  begin: int
  dispatch: Dispatch
  metrics: dict[str, jax.Array]

  def metrics_of(self, *names: str) -> tuple[np.ndarray, ...]:
    """Returns metrics on the host, each with one value for every step."""
    values = jax.device_get([self.metrics[name] for name in names])
    return tuple(np.atleast_1d(x)[: self.dispatch.count] for x in values)


class Run(NamedTuple):
  """The position of training between two steps.

  state: on the devices. step: number of updates sent. sent: at most two dispatches whose losses are
  not yet checked. skipped: float32 scalar on the devices, number of consecutive steps that were not
  finite, from the last update. in_row: the same on the host, after the last checked step. left_out:
  steps that were not finite since the last line of metrics. saved: step of the newest checkpoint.
  line: (time, step) of the last line of metrics, from which the speed is measured.
  """

  state: State
  step: int
  sent: tuple[Sent, ...]
  skipped: jax.Array
  in_row: int
  left_out: int
  saved: int | None
  line: tuple[float, int]


def train(config: ml_collections.ConfigDict, workdir: Path, store: Store) -> dict:
  """Trains until `config.steps` or until validation stops improving, then evaluates the best step.

  Without a validation split the last checkpoint counts as the best.

  Args:
    config: the whole experiment. workdir: of this run; a run that it holds is continued.
    store: the prepared history store.

  Returns:
    The report, also written to `workdir/report.json`.

  Raises:
    UserError: the config is wrong, the workdir is in use or holds another experiment, or a
      checkpoint cannot be written.
    DivergedError: the loss, a gradient, a score or a weight became NaN or infinite.
    Preempted: SIGTERM came; the state is saved.
    KeyboardInterrupt: Ctrl-C; the message names the step from which the run can continue.
  """
  folder = workdir / CHECKPOINTS
  try:
    with preemption.listening() as notice:
      setup = setups.set_up(config, store)
      workdir.mkdir(parents=True, exist_ok=True)
      with trained_run.only_command(workdir), integrity.disk_errors(folder):
        return _train(config, workdir, store, setup, notice)
  except (Preempted, KeyboardInterrupt) as error:
    last = max(step_folders.steps_of(folder), default=None)
    cause = f'ended by {error}' if isinstance(error, Preempted) else 'interrupted'
    remedy = 'nothing is saved yet; the same command starts again'
    if last is not None:
      remedy = f'step {last} is saved ({folder}); the same command continues from there'
    raise type(error)(f'{cause}: {remedy}') from error


def _train(config, workdir, store, setup, notice):
  integrity.set_aside(workdir / CHECKPOINTS)
  with Checkpoints(workdir / CHECKPOINTS) as checkpoints, contextlib.ExitStack() as opened:
    # Begin at the newest checkpoint of this experiment, or at step 0.
    start = checkpoints.latest()
    if start is not None:
      check_same(workdir, checkpoints.config(start), setups.identity_of(config, store))
    checkpoints.forget_after(start)
    resident = setup.residents.get('train')
    feed = Feed(config, setup.sources['train'], resident, setup.mesh, start or 0)
    opened.enter_context(feed)
    run, seconds = begin(config, store, setup, checkpoints, start)
    writer = opened.enter_context(Writer(workdir, start))
    session = Session(
      config=config, workdir=workdir, store=store, setup=setup, notice=notice,
      checkpoints=checkpoints, feed=feed, writer=writer, first=run.step, began=run.line[0],
      seconds=seconds,
    )  # fmt: skip
    describe(session, start)

    # The steps. SIGTERM waits for the end of a step; implicit transfers of arrays are errors.
    with jax.transfer_guard('disallow'), notice.deferred():
      run, stopped = take_steps(session, run)
    trained = session.trained()
    checkpoints.wait()
    if stopped:
      raise Preempted('SIGTERM')
    notice.raise_if_received()
    if run.step < config.steps:
      waited, name = validations.standing(checkpoints.scores).waited, session.criterion.name
      writer.print(f'stopped at step {run.step}: {waited} validations without a better {name}')
    checkpoints.prune()

    # The report: the best checkpoint is chosen by validation, and tested once.
    opened.close()
    best = checkpoints.restore(checkpoints.best(), setup.trainer.abstract)
    scores = trained_run.score_held_out(setup, best.state)
    metrics = trained_run.make_report(config, store, setup, best, scores)
    metrics |= {'steps': run.step, 'train_seconds': trained, 'peak_rss': peak_rss()}
    write_json(workdir / REPORT, metrics)
    return metrics


def begin(
  config: ml_collections.ConfigDict,
  store: Store,
  setup: Setup,
  checkpoints: Checkpoints,
  start: int | None,
) -> tuple[Run, float]:
  """Returns the run at step 0 or at the checkpoint `start`, and the seconds trained before."""
  saved = {'seconds': 0.0, 'in_row': 0, 'skipped': 0}
  if start is None:
    state = initial_state(setup, store, config.seed)
  else:
    _, state, saved = checkpoints.restore(start, setup.trainer.abstract)
  skipped = meshes.replicated(setup.mesh, np.float32(saved['in_row']))
  step = start or 0
  run = Run(
    state, step, (), skipped, saved['in_row'], saved['skipped'], start, (time.monotonic(), step)
  )
  return run, saved['seconds']


def describe(session: Session, start: int | None) -> None:
  """Prints a description of the training and warnings, and writes workdir/config.json."""
  config, workdir, store, setup = session.config, session.workdir, session.store, session.setup
  print_line = session.writer.print
  print_line(report.describe(config, store, setup.model.tables(), setup.mesh.size))
  for line in setup.task.notes(setup.sources):
    print_line(line)
  for line in config_warnings.doubts(config, store, setup.sources):
    print_line(f'warning: {line}')
  if 'valid' not in setup.sources:
    print_line('no validation split: trains for config.steps, and the last checkpoint is the best')
  if start is not None:
    print_line(f'resumed from step {start} of {workdir}')
  elif (workdir / 'config.json').exists():
    print_line(f'{workdir} holds no checkpoint: begins at step 0')
  write_json(workdir / 'config.json', setups.identity_of(config, store))


def take_steps(session: Session, run: Run) -> tuple[Run, bool]:
  """Trains to the end; returns the run, and whether SIGTERM ended it."""
  config, checkpoints = session.config, session.checkpoints
  if validation_is_due(session, run.step):  # the process ended between save and validation
    validate(session, run)
  stopped = False
  while run.step < config.steps and not out_of_patience(config.patience, checkpoints.scores):
    # Send the next steps, and check those before while the devices work.
    dispatch = next_dispatch(session, run.step)
    if dispatch is None:
      stopped = True
      break
    run = check_sent(session, send(session, run, dispatch), unchecked=1)

    # A step is saved before it is validated.
    saves = save_is_due(session, run.step)
    if saves or run.step % config.log_every == 0:
      run = log(session, run)
    if saves:
      run = save(session, run)
      if validation_is_due(session, run.step):
        validate(session, run)
      run = run._replace(line=(time.monotonic(), run.step))
  run = check_sent(session, run)
  if stopped and run.saved != run.step:
    run = save(session, run)
  return run, stopped


def validation_is_due(session: Session, step: int) -> bool:
  """Whether a step is to be validated and has no score yet."""
  if step == 0 or 'valid' not in session.setup.sources:
    return False
  due = step % session.config.eval_every == 0 or step == session.config.steps
  return due and step not in dict(session.checkpoints.scores)


def save_is_due(session: Session, step: int) -> bool:
  """Whether a checkpoint is to be written after a step."""
  due = step % session.config.save_every == 0 or step == session.config.steps
  return due or validation_is_due(session, step)


def next_dispatch(session: Session, step: int) -> Dispatch | None:
  """Returns the inputs of the next steps; None if SIGTERM ends training after `step`."""
  if session.notice.due(step):
    return None
  try:
    return session.feed.next(until_event(session.config, step, session.feed.capacity))
  except Exception:
    if session.notice.explains_failure():
      return None
    raise


def send(session: Session, run: Run, dispatch: Dispatch) -> Run:
  """Sends updates to the devices without waiting for their results."""
  trainer, state = session.setup.trainer, run.state
  # Reads are counted from one validation to the next. They are cleared here, not after the
  # validation: a checkpoint then has the validated counts, and a continued run clears them too.
  if run.step % session.config.eval_every == 0:
    state = trainer.clear_reads(state)
  state, skipped, metrics = session.feed.train(trainer, state, dispatch, run.skipped)
  sent = (*run.sent, Sent(run.step, dispatch, metrics))
  return run._replace(state=state, step=run.step + dispatch.count, sent=sent, skipped=skipped)


def check_sent(session: Session, run: Run, unchecked: int = 0) -> Run:
  """Checks the losses of the sent steps, the oldest first, but for `unchecked` dispatches.

  Raises:
    DivergedError: more than config.skip_not_finite consecutive steps were not finite.
  """
  while len(run.sent) > unchecked:
    sent, *rest = run.sent
    losses, in_row = sent.metrics_of('loss', 'skipped')
    for k in np.flatnonzero(in_row > session.config.skip_not_finite)[:1]:
      cause = f'the loss is {losses[k]}, {cause_of(session, run, sent, int(k))}'
      raise diverged(session, cause, sent.begin + int(k) + 1)
    run = run._replace(
      sent=tuple(rest),
      in_row=int(in_row[-1]),
      left_out=run.left_out + int(np.count_nonzero(in_row)),
    )
  return run


def cause_of(session: Session, run: Run, sent: Sent, k: int) -> str:
  """Returns the name of what is not finite in the k-th of some steps, which ended training.

  Neither this step nor a later one has changed anything but the number of steps, so the state of
  the run is the one before this step, but for that number.
  """
  trainer, mesh = session.setup.trainer, session.setup.mesh
  before = run.state._replace(step=meshes.replicated(mesh, np.int32(sent.begin + k)))
  batch = session.feed.batch_of(sent.dispatch, k)
  return first_not_finite(jax.device_get(trainer.diagnose(before, batch))) or 'a gradient'


def log(session: Session, run: Run) -> Run:
  """Checks the last step, writes its metrics and prints a line of progress."""
  config, sent = session.config, run.sent[-1]
  run = check_sent(session, run)
  names = sorted(sent.metrics)
  metrics = dict(zip(names, (x[-1] for x in sent.metrics_of(*names)), strict=True))
  session.writer.write(run.step, metrics | {'skipped': run.left_out})
  now, (before, step) = time.monotonic(), run.line
  rows = (run.step - step) * config.batch_size
  speed = rows * session.setup.sources['train'].examples_per_row / max(now - before, 1e-9)
  best = validations.standing(session.checkpoints.scores).best
  session.writer.print(
    progress(
      run.step, config.steps, now - session.began, speed, float(metrics['loss']),
      None if best is None else (session.criterion.name, best), peak_rss(), session.first,
    )
  )  # fmt: skip
  return run._replace(left_out=0, line=(now, run.step))


def save(session: Session, run: Run) -> Run:
  """Begins to write a checkpoint.

  Raises:
    DivergedError: the state is not finite.
    UserError: the store was changed during the training.
  """
  cause = first_not_finite(jax.device_get(session.setup.trainer.finite(run.state)))
  if cause:
    raise diverged(session, cause, run.step)
  session.store.check_unchanged()
  session.writer.flush()
  numbers = {'seconds': session.trained(), 'in_row': run.in_row, 'skipped': run.left_out}
  identity = setups.identity_of(session.config, session.store)
  session.checkpoints.save(run.state, numbers, identity)
  return run._replace(saved=run.step)


def validate(session: Session, run: Run) -> None:
  """Validates the saved state and stores its score. SIGTERM ends it at once.

  Raises:
    DivergedError: a score is not finite; the checkpoint is removed.
  """
  setup, checkpoints = session.setup, session.checkpoints
  with session.notice.deferred(False):
    metrics = trained_run.evaluate_split(session.config, session.store, setup, run.state, 'valid')
  values = metrics['overall']
  if values.get('not_finite'):
    checkpoints.drop(run.step)
    raise diverged(session, f'{values["not_finite"]} validation scores', run.step)
  shown = values | click_evaluation.health(run.state.tables, setup.model.tables())
  session.writer.write(run.step, shown, 'valid')
  session.writer.print(report.line_of(shown, 'valid'))
  session.writer.flush()
  checkpoints.validated(run.step, session.criterion.score(values))


def diverged(session: Session, cause: str, step: int) -> DivergedError:
  """Returns the error for values that are not finite at a step; it names the last checkpoint."""
  session.checkpoints.wait()
  folder = session.checkpoints.folder
  return DivergedError(
    f'not finite at step {step}: {cause}; {step_folders.last_good(folder)} ({folder}). Lower '
    'config.optimizer.*.rate or set config.optimizer.clip_norm, with another --workdir; or '
    'continue this run and skip such steps with config.skip_not_finite=N'
  )
