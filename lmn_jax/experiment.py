"""The front door for Python: `Experiment`, whose methods the command line calls (commands.py)."""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
import pyarrow as pa

from lmn_jax import config as configs
from lmn_jax import config_files
from lmn_jax.data import frames, prepare
from lmn_jax.data.store import Store
from lmn_jax.distributed import processes
from lmn_jax.errors import UserError, one_of

# Arguments of `Experiment` that hold tables, and the fields of config.data that name their files.
SOURCES = {'log': 'source', 'users': 'users_source', 'items': 'items_source'}


class Experiment:
  """A config, a log and a folder: prepares, trains, evaluates, predicts and exports.

      experiment = Experiment(
        model='din', log=frame, workdir='runs/films', steps=500,
        data=dict(user='user_id', item='film', time='timestamp', label='clicked'),
      )
      report = experiment.train()
      best = experiment.predict(users, top_k=10)

  Each method does what the mode of the command line of that name does, with the same files: a
  training that was ended continues when `train` is called again, also by the command line.

  Attributes:
    config: the whole experiment, a ConfigDict. workdir, stores: folders of the run and of the
      history stores. store: the history store that the last method opened; None before.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict | str | None = None,
    log: Any = None,
    *,
    users: Any = None,
    items: Any = None,
    workdir: str | Path | None = None,
    stores: str | Path | None = None,
    **fields: Any,
  ):
    """Builds the config; nothing is read or trained yet.

    Tables in memory are written to the workdir (log.parquet, users.parquet, items.parquet), so that
    a run can be continued by another process.

    Args:
      config: a ConfigDict; the name or path of a config file, 'FILE:MODEL' for its argument, such
        as 'movielens_next:hstu'; None begins with `config.base(model, task)`.
      log: a path or a glob, a pandas or polars DataFrame, or an Arrow table; None keeps the log of
        the config. users, items: the same for the side files of users and items.
      workdir: folder of the run; by default runs/NAME of the config. stores: folder of the history
        stores; by default `stores` beside the workdir.
      **fields: fields of the config to change, a section as a dict: `steps=500,
        optimizer=dict(dense=dict(rate=1e-3))`. Without a config also `model`, its name ('lmn' by
        default) or a dict with `name`, and `task`, 'click' or 'next_item'.

    Raises:
      UserError: a config, field or table that does not exist or does not fit.
    """
    if isinstance(config, str | Path):
      name, self.config = config_files.run_name(str(config)), config_files.load(str(config))
    elif config is None:
      self.config, fields = _new(fields)
      name = self.config.model.name.rpartition(':')[2]
    else:
      # References between fields are kept: one may follow another that is changed here.
      name, self.config = config.data.name, copy.deepcopy(config)
    _change(self.config, fields, configs.base(self.config.model.name, self.config.task))
    self.workdir = Path(workdir if workdir is not None else Path('runs') / name)
    self.stores = Path(stores if stores is not None else self.workdir.parent / 'stores')
    for argument, table in (('log', log), ('users', users), ('items', items)):
      if table is not None:
        self._set_source(argument, table)
    configs.check_names(self.config)
    self.store: Store | None = None

  def _set_source(self, argument, table):
    """Lets the config read a table, which is written to the workdir unless it is a path."""
    data, field = self.config.data, SOURCES[argument]
    if frames.is_path(table):
      data[field] = str(table)
      return
    path = self.workdir / f'{argument}.parquet'
    frames.write(frames.to_arrow(table, argument), path)
    data[field] = str(path)
    data['format' if argument == 'log' else f'{argument}_format'] = 'parquet'

  def check(self) -> None:
    """Refuses a config that cannot be trained, before anything is read.

    Raises:
      UserError: naming the field, its value and the bound.
    """
    from lmn_jax.training import setup as setups

    setups.check(self.config)

  def prepare(self) -> Store:
    """Reads the log into a history store, or finds the one that it made; a damaged one is rebuilt.

    Returns:
      The store. `lmn_jax.data.counts.table_of(store)` shows what was read.

    Raises:
      UserError: of the log or the config.
    """
    return self._store(lambda config, _, stores: prepare.prepare(config.data, stores, repair=True))

  def train(self) -> dict[str, Any]:
    """Trains, or continues; progress is printed to standard error.

    Returns:
      The report on the best checkpoint, as in WORKDIR/report.json:
      `report['test']['overall']['auc']`.

    Raises:
      UserError: of the log or the config, or a run in use.
      DivergedError: a loss, gradient or score is not finite.
    """
    from lmn_jax.training import loop, run_store

    self.check()
    return loop.train(self.config, self.workdir, self._store(run_store.store_to_train))

  def evaluate(self, output: str | Path | None = None) -> dict[str, Any]:
    """Reports again on the best checkpoint, as in WORKDIR/evaluation.json.

    Args:
      output: a .parquet or .csv for the scores of the test rows; None for none.

    Raises:
      UserError: no checkpoint, a run in use, or an output that cannot be written.
    """
    from lmn_jax.evaluation import part_files
    from lmn_jax.training import trained_run

    self.check()
    output = None if output is None else Path(output)
    if output is not None:
      part_files.check_output(output)
    return trained_run.evaluate_best(self.config, self.workdir, self.trained_store(), output)

  def predict(self, rows: Any, top_k: int | None = None) -> Any:
    """Scores rows, or finds the best items of users, with the best checkpoint.

    Args:
      rows: pairs of a user and an item, for click models with their context, in the columns that
        config.data names; with top_k the users. A path, a DataFrame or an Arrow table.
      top_k: how many items to find for each row; None scores the rows.

    Returns:
      The rows with `score` and the other columns that inference/predict.py lists, in the library of
      `rows`; an Arrow table for a path. `predict_file` writes a file of any size.

    Raises:
      UserError: no checkpoint, a run in use, rows without a column that is needed.
    """
    import pyarrow.parquet as pq

    with frames.as_file(rows, 'rows') as path, tempfile.TemporaryDirectory() as scratch:
      output = Path(scratch) / 'scores.parquet'
      self.predict_file(path, output, top_k)
      return frames.like(pq.read_table(output), rows)

  def predict_file(
    self, rows: str | Path, output: str | Path, top_k: int | None = None
  ) -> dict[str, Any]:
    """Does what `predict` does from a file to a .parquet or .csv, out of core.

    Returns:
      Counts, see inference/predict.py.
    """
    from lmn_jax.inference import predict

    self.check()
    request = predict.Request(str(rows), Path(output), top_k)
    predict.check(request)
    return predict.predict(self.config, self.workdir, self.trained_store(), request)

  def embeddings(self, table: str = 'item') -> pa.Table:
    """Returns the vectors of items, users, values of features, or memory slots by raw id.

    Args:
      table: 'item', 'user', 'memory', or a feature such as 'item.category'; see
        inference/embeddings.py.

    Returns:
      An Arrow table with the columns `id` and `vector`.

    Raises:
      UserError: no checkpoint, a run in use, or a table that the model does not have.
    """
    from lmn_jax.inference import embeddings

    self.check()
    return embeddings.embeddings(self.config, self.workdir, self.trained_store(), table)

  def export(self, to: str | Path | None = None, precision: str = 'float32') -> dict[str, Any]:
    """Writes a folder that scores by itself, and a link to it.

    Args:
      to: the link; by default WORKDIR/export. precision: of the tables: float32, bfloat16 or int8.

    Returns:
      What was written, see export/export.py.

    Raises:
      UserError: no checkpoint, a run in use, or a name that is taken.
    """
    from lmn_jax.export import export

    self.check()
    to = Path(to) if to is not None else self.workdir / 'export'
    return export.export(self.config, self.workdir, self.trained_store(), to, precision)

  def update_states(self, events: str | Path = '') -> dict[str, Any]:
    """Next items: brings the users' states up to date with the store, and with a log of new events.

    Args:
      events: a log of new events, '' for none.

    Returns:
      Counts, see inference/update_states.py.

    Raises:
      UserError: a task without states, no checkpoint, or events that were taken in before.
    """
    from lmn_jax.inference import update_states

    self.check()
    update_states.check(self.config)
    store = self.trained_store()
    return update_states.update_states(self.config, self.workdir, store, str(events))

  def trained_store(self) -> Store:
    """Opens the store that the run was trained on; the log may be gone.

    Raises:
      UserError: there is no checkpoint, or no such store.
    """
    from lmn_jax.training import run_store

    return self._store(run_store.store_to_read)

  def _store(self, open_store) -> Store:
    """Returns `open_store(config, workdir, stores)`, called on host 0 first, equal on all hosts."""
    store = processes.first_then_others(lambda: open_store(self.config, self.workdir, self.stores))
    processes.agree(
      'store', {'fingerprint': store.fingerprint}, prepare.differences,
      'give every host the same log, or --stores on a disk they share',
    )  # fmt: skip
    self.store = store
    return store


def _new(fields: Mapping[str, Any]) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
  """A config of the model and task that the fields name, and the fields that are left."""
  fields = dict(fields)
  model = fields.pop('model', 'lmn')
  if isinstance(model, Mapping):
    fields['model'] = model
    model = model.get('name', 'lmn')
  return configs.base(model, fields.pop('task', 'click')), fields


def _change(
  config: ml_collections.ConfigDict, fields: Mapping[str, Any], known: Any, path: str = 'config'
) -> None:
  """Sets fields of a config, those of sections one by one.

  Args:
    config: to be changed. fields: what to set. known: the config that has all fields that exist; a
      section without any, such as config.data.multi, takes any name. path: of messages.

  Raises:
    UserError: a field that does not exist, or a value of another type.
  """
  for name, value in fields.items():
    if len(known):
      one_of(f'{path} field', name, known)
    if isinstance(known.get(name), ml_collections.ConfigDict):
      if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise UserError(f'{path}.{name}={value!r} must be a dict of fields')
      _change(config[name], value, known[name], f'{path}.{name}')
      continue
    try:
      with config.unlocked():
        config[name] = value
    except (TypeError, ValueError) as error:
      raise UserError(f'{path}.{name}={value!r}: {error}') from None
