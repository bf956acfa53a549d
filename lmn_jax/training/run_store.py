"""A run and the store that it was trained on: found by its fingerprint, whatever the log is by now.

What reads a trained model needs no log; a training that goes on does so on the store it began with.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from lmn_jax import config as configs
from lmn_jax.data import prepare, sources, store_folder
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError
from lmn_jax.training.compatibility import check_same
from lmn_jax.training.step_folders import step_folder, steps_of
from lmn_jax.training.trained_run import CHECKPOINTS

log = logging.getLogger(__name__)
# Defaults that fields of config.data had in earlier versions, for the runs made with them.
FORMER = {'quote': '"', 'missing': ['', 'NA', 'NULL', 'nan']}


class Run(NamedTuple):
  """What a run was trained with: its config, and the fingerprint of its store."""

  config: dict[str, Any]
  fingerprint: str


def run_of(workdir: Path) -> Run | None:
  """What the checkpoints of a run are of, the newest that can be read; None if there is none.

  Orbax is not asked: it would tidy up beside a training that is going on.

  Raises:
    UserError: there are checkpoints, and none can be read.
  """
  folder = workdir / CHECKPOINTS
  steps = steps_of(folder)
  for step in reversed(steps):
    try:
      found = json.loads((step_folder(folder, step) / 'config' / 'metadata').read_text())
      return Run(found, found['store'])
    except (OSError, ValueError, TypeError, KeyError):
      continue  # spoilt; who restores it says so
  if steps:
    raise UserError(
      f'{folder}: no checkpoint says which store it is of, all are spoilt; bring them back from a '
      'copy, or delete the folder to begin anew'
    )
  return None


def store_to_train(config: ml_collections.ConfigDict, workdir: Path, root: Path) -> Store:
  """The store of a run that goes on, or for one that begins that of the log as it is now.

  Args:
    config: the whole experiment. workdir: of the run. root: folder of the stores.

  Raises:
    UserError: the run is of other data, or its store is gone and the log makes another one.
  """
  run = run_of(workdir)
  if run is None:
    return prepare.prepare(config.data, root)
  check_data(config, workdir, root, run)
  try:
    store = store_folder.find(root, run.fingerprint)
  except store_folder.NoStore as error:
    # On another machine, or after a folder was cleared, the log may still make the same one.
    made = prepare.prepare(config.data, root)
    if not store_folder.is_called(made.manifest, run.fingerprint):
      raise UserError(
        f'{workdir} was trained on a store that is gone, and the log as it is now makes another '
        f'one ({made.fingerprint[: store_folder.DIGITS]}): {error}'
      ) from error
    return store_folder.find(root, run.fingerprint)
  _say_changes(config, workdir, store, 'the run goes on with the store it began with')
  return store


def store_to_read(config: ml_collections.ConfigDict, workdir: Path, root: Path) -> Store:
  """The store that a run was trained on. Nothing is built, and the log may be gone.

  Raises:
    UserError: there is no checkpoint, the run is of other data, or its store is gone.
  """
  run = run_of(workdir)
  if run is None:
    raise UserError(f'{workdir} holds no checkpoint; run --mode=train first')
  check_data(config, workdir, root, run)
  store = store_folder.find(root, run.fingerprint)
  _say_changes(config, workdir, store, 'the store that the run was trained on is read')
  return store


def store_to_plan(config: ml_collections.ConfigDict, workdir: Path, root: Path) -> Store:
  """The store of a run if the config is of its data, or else that of the log as it is now.

  Raises:
    UserError: of the log or the store.
  """
  run = run_of(workdir)
  if run is not None and _same_data(config, run):
    return store_to_train(config, workdir, root)
  return prepare.prepare(config.data, root)


def check_data(config: ml_collections.ConfigDict, workdir: Path, root: Path, run: Run) -> None:
  """Refuses a config whose data are not those of the run.

  Other words for the same data, such as a log that was moved, are no other data: they lead to the
  same store, if it is there.

  Raises:
    UserError: naming the field.
  """
  if _same_data(config, run):
    return
  try:
    found = prepare.find(config.data, root)
  except UserError:
    found = None  # no log to tell by
  if found is not None and store_folder.is_called(found.manifest, run.fingerprint):
    return
  before, after = dict(run.config), config.to_dict() | {'store': ''}
  before['data'] = _data(before['data'])
  after['data'] |= {name: before['data'][name] for name in sources.APART}
  check_same(workdir, before, after, trains=False)


def _same_data(config, run):
  before, after = _data(run.config['data']), _data(config.data.to_dict())
  return all(before[name] == after[name] for name in after if name not in sources.APART)


def _data(fields: dict) -> dict:
  """A section `data` as JSON; what there was not yet, or was another default, is as it is now."""
  made, fields = (json.loads(json.dumps(x)) for x in (configs.data().to_dict(), fields))
  for name, value in fields.items():
    if isinstance(value, dict):
      made[name] = made.get(name, {}) | value
    elif FORMER.get(name) != value:
      made[name] = value
  return made


def _say_changes(config, workdir, store, what):
  found = sources.changed(store.manifest['signature'], config.data)
  if found:
    log.info(
      'the log has changed since %s was made (%s): %s; another --workdir than %s trains on the log '
      'as it is now', store.path, found, what, workdir,
    )  # fmt: skip
