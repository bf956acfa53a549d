"""Finds the store that a run was trained on, by its fingerprint; the log may have changed since.

Reading a trained model needs no log, and a run continues on the store that it began with.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from lmn_jax import config as configs
from lmn_jax.data import prepare, sources, store_folder
from lmn_jax.data.store import Store
from lmn_jax.distributed import processes
from lmn_jax.errors import UserError
from lmn_jax.training.compatibility import check_same, current_data
from lmn_jax.training.step_folders import step_folder, steps_of
from lmn_jax.training.trained_run import CHECKPOINTS

log = logging.getLogger(__name__)
# Defaults that fields of config.data had in earlier versions, for runs of these versions.
FORMER = {'quote': '"', 'missing': ['', 'NA', 'NULL', 'nan']}


class Run(NamedTuple):
  """The config of a run and the fingerprint of its store."""

  config: dict[str, Any]
  fingerprint: str


def run_of(workdir: Path) -> Run | None:
  """Returns the Run of the newest readable checkpoint; None if there is no checkpoint.

  Orbax is not used: on opening it deletes unfinished steps, also those of a running training.

  Raises:
    UserError: there are checkpoints, and none can be read.
  """
  folder = workdir / CHECKPOINTS
  steps = steps_of(folder)
  for step in reversed(steps):
    try:
      config = json.loads((step_folder(folder, step) / 'config' / 'metadata').read_text())
      return Run(config, config['store'])
    except (OSError, ValueError, TypeError, KeyError):
      continue  # damaged; restoring it reports that
  if steps:
    raise UserError(
      f'{folder}: all checkpoints are damaged, none names its store; restore them from a copy, or '
      'delete the folder to start again'
    )
  return None


def store_to_train(config: ml_collections.ConfigDict, workdir: Path, root: Path) -> Store:
  """Returns the store of an existing run, or for a new run that of the current log.

  Args:
    config: the whole experiment. workdir: of the run. root: folder of the stores.

  Raises:
    UserError: the run is of other data, or its store is missing and the log gives another one.
  """
  run = run_of(workdir)
  if run is None:
    return prepare.prepare(config.data, root)
  check_data(config, workdir, root, run)
  try:
    store = store_folder.find(root, run.fingerprint)
  except store_folder.NoStore as error:
    # On another machine, or after a folder was cleared, the log may still give the same store.
    current = prepare.prepare(config.data, root)
    if not store_folder.is_called(current.manifest, run.fingerprint):
      raise UserError(
        f'{workdir} was trained on a store that is missing, and the current log gives another '
        f'one ({current.fingerprint[: store_folder.DIGITS]}): {error}'
      ) from error
    return store_folder.find(root, run.fingerprint)
  _log_changes(config, workdir, store, 'the run continues with the store it began with')
  return store


def store_to_read(config: ml_collections.ConfigDict, workdir: Path, root: Path) -> Store:
  """Returns the store that a run was trained on. It builds nothing, and needs no log.

  Raises:
    UserError: there is no checkpoint, the run is of other data, or its store is missing.
  """
  run = run_of(workdir)
  if run is None:
    raise UserError(f'{workdir} holds no checkpoint; run --mode=train first')
  check_data(config, workdir, root, run)
  store = store_folder.find(root, run.fingerprint)
  _log_changes(config, workdir, store, 'the store that the run was trained on is read')
  return store


def store_to_plan(config: ml_collections.ConfigDict, workdir: Path, root: Path) -> Store:
  """Returns the store of a run if the config has its data, otherwise that of the current log.

  Raises:
    UserError: the log or the store is wrong.
  """
  run = run_of(workdir)
  if run is not None and _same_data(config, run):
    return store_to_train(config, workdir, root)
  return prepare.prepare(config.data, root)


def check_data(config: ml_collections.ConfigDict, workdir: Path, root: Path, run: Run) -> None:
  """Checks that the data of a config are those of the run.

  A config that differs but gives the same store, such as one of a moved log, passes.

  Raises:
    UserError: the data differ; it names the field.
  """
  if _same_data(config, run):
    return
  try:
    store = prepare.find(config.data, root)
  except UserError:
    store = None  # no log to compare with
  if store is not None and store_folder.is_called(store.manifest, run.fingerprint):
    return
  before, after = dict(run.config), config.to_dict() | {'store': ''}
  before['data'] = _data(before['data'])
  after['data'] |= {name: before['data'][name] for name in sources.IGNORED}
  check_same(workdir, before, after, trains=False)


def _same_data(config, run):
  before, after = _data(run.config['data']), _data(config.data.to_dict())
  return all(before[name] == after[name] for name in after if name not in sources.IGNORED)


def _data(fields: dict) -> dict:
  """Returns a section `data` as JSON, with today's defaults for missing fields and old defaults."""
  fields = current_data(fields)
  section, fields = (json.loads(json.dumps(x)) for x in (configs.data().to_dict(), fields))
  for name, value in fields.items():
    if isinstance(value, dict):
      section[name] = section.get(name, {}) | value
    elif FORMER.get(name) != value:
      section[name] = value
  return section


def _log_changes(config, workdir, store, action):
  changes = sources.describe_change(store.manifest['signature'], config.data)
  if changes and processes.index() == 0:  # of all hosts, one shows it
    log.warning(  # also seen by a program in Python, which shows no information
      'the log has changed since %s was built (%s): %s; to train on the current log use another '
      '--workdir than %s', store.path, changes, action, workdir,
    )  # fmt: skip
