"""`Experiment`: the Python interface. The commands of commands.py call its methods."""

import errno
import functools
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import ml_collections
import pyarrow as pa

from lmn_jax import arguments, config_files
from lmn_jax import config as configs
from lmn_jax.data import frames, prepare
from lmn_jax.data.store import Store
from lmn_jax.distributed import compilation_cache, processes
from lmn_jax.errors import UserError, of_disk

logger = logging.getLogger(__name__)
# Argument of `Experiment` with a table -> field of config.data with the path of its file.
SOURCES = {'log': 'source', 'users': 'users_source', 'items': 'items_source'}


def _in_a_line(method):
  """Lets a method raise a UserError for a full disk, and for a folder that cannot be written."""

  @functools.wraps(method)
  def call(*arguments, **named):
    try:
      return method(*arguments, **named)
    except OSError as error:
      if (line := of_disk(error)) is None:
        raise
      raise UserError(line) from error

  return call


class Experiment:
  """A config, a log and a folder, with methods to prepare, train, evaluate, predict and export.

      experiment = Experiment(
        model='din', log=frame, workdir='runs/films', steps=500,
        data=dict(user='user_id', item='film', time='timestamp', label='clicked'),
      )
      report = experiment.train()
      best = experiment.predict(users, top_k=10)

  Each method does the same as the mode of that name of the command line, with the same files. An
  interrupted training continues if `train` is called again, also from the command line.

  Attributes:
    config: the config of the experiment, a ConfigDict. workdir, stores: folders of the run and of
      the history stores. compilation_cache: folder of compiled programs, or None. store: the
      history store that the last method opened, or None.
  """

  @_in_a_line
  def __init__(
    self,
    config: ml_collections.ConfigDict | str | Path | None = None,
    log: Any = None,
    *,
    users: Any = None,
    items: Any = None,
    workdir: str | Path | None = None,
    stores: str | Path | None = None,
    compilation_cache: str | Path | None = None,
    **fields: Any,
  ):
    """Builds the config, and writes tables in memory to the workdir. Does not read the log.

    The files are log.parquet, users.parquet and items.parquet; another process can continue the run
    with them.

    Args:
      config: a ConfigDict, or the name or path of a config file; 'FILE:MODEL' passes an argument to
        the file, such as 'movielens_next:hstu'. None: `config.base(model, task)`.
      log: a path or a glob, a pandas or polars DataFrame, or an Arrow table; None keeps the log of
        the config. users, items: the same for the features of users and items.
      workdir: folder of the run; by default runs/NAME of the config. stores: folder of the history
        stores; by default `stores` beside the workdir.
      compilation_cache: folder of compiled programs, which later processes load; by default
        `.compiled` in the folder of the stores, for several hosts in the workdir. 'off' stores
        none. The first folder of a process counts, and one that was set in JAX before.
      **fields: fields of the config to change, with sections as dicts: `steps=500,
        optimizer=dict(dense=dict(rate=1e-3))`. Without a config also `model`, a name ('lmn' by
        default) or a dict with `name`, and `task`, 'click' or 'next_item'.

    Raises:
      UserError: a config, field or table does not exist or is not valid; a folder cannot be
        written. All methods raise it for such a folder, and for a full disk.
    """
    if isinstance(config, str | Path):
      name, self.config = config_files.run_name(str(config)), config_files.load(str(config))
    elif config is None:
      self.config, fields = arguments.new_config(fields)
      name = self.config.model.name.rpartition(':')[2]
    else:
      self.config = arguments.copy_of(config)
      name = self.config.data.name
    arguments.change(self.config, fields, configs.base(self.config.model.name, self.config.task))
    self.workdir = arguments.folder_of('workdir', workdir, Path('runs') / name)
    self.stores = arguments.folder_of('stores', stores, self.workdir.parent / 'stores')
    # All hosts have the same workdir; each may have stores of its own.
    beside = self.workdir if processes.count() > 1 else self.stores
    self.compilation_cache = arguments.cache_of(compilation_cache, beside)
    for argument, table in (('log', log), ('users', users), ('items', items)):
      if table is not None:
        self._set_source(argument, table)
    configs.check_names(self.config)
    self.store: Store | None = None

  def _set_source(self, argument, table):
    """Sets the source of a table in the config; a table in memory is written to the workdir."""
    from lmn_jax.training import step_folders, trained_run

    data, field = self.config.data, SOURCES[argument]
    if frames.is_path(table):
      data[field] = str(table)
      return
    path = self.workdir / f'{argument}.parquet'
    replaced = frames.write(frames.to_arrow(table, argument), path)
    if replaced and step_folders.steps_of(self.workdir / trained_run.CHECKPOINTS):
      logger.warning(
        '%s is now another table than the one that the run in this folder began with; the run '
        'keeps its store; to train on the new table use another workdir', path,
      )  # fmt: skip
    data[field] = str(path)
    data['format' if argument == 'log' else f'{argument}_format'] = 'parquet'

  @_in_a_line
  def check(self) -> None:
    """Checks the config without reading data.

    Raises:
      UserError: a field is not valid; the message has its name, value and bound.
    """
    from lmn_jax.training import setup as setups

    setups.check(self.config)

  @_in_a_line
  def prepare(self) -> Store:
    """Returns the history store of the log; builds it if it does not exist or is damaged.

    `lmn_jax.data.counts.table_of(store)` is a table of its counts.

    Raises:
      UserError: the log or the config is not valid.
    """
    return self._store(lambda config, _, stores: prepare.prepare(config.data, stores, repair=True))

  @_in_a_line
  def train(self) -> dict[str, Any]:
    """Trains, or continues a training; prints progress to standard error.

    Returns:
      The report of the best checkpoint, as in WORKDIR/report.json:
      `report['test']['overall']['auc']`.

    Raises:
      UserError: the log or the config is not valid, or the run is in use.
      DivergedError: a loss, gradient or score is not finite.
    """
    from lmn_jax.training import loop, run_store

    self.check()
    if self.workdir.exists() and not self.workdir.is_dir():  # before hours of preparation
      raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.workdir))
    return loop.train(self.config, self.workdir, self._store_to_compute(run_store.store_to_train))

  @_in_a_line
  def evaluate(self, output: str | Path | None = None) -> dict[str, Any]:
    """Evaluates the best checkpoint; returns the report, as in WORKDIR/evaluation.json.

    Args:
      output: path of a .parquet or .csv file for the scores of the test rows, or None.

    Raises:
      UserError: there is no checkpoint, the run is in use, or the output cannot be written.
    """
    from lmn_jax.evaluation import part_files
    from lmn_jax.training import trained_run

    self.check()
    output = arguments.path_of('output', output)
    if output is not None:
      part_files.check_output(output)
    return trained_run.evaluate_best(self.config, self.workdir, self.trained_store(), output)

  @_in_a_line
  def predict(self, rows: Any, top_k: int | None = None) -> Any:
    """Returns scores of rows, or the best items of users, by the best checkpoint.

    Args:
      rows: pairs of a user and an item, for click models with their context, in the columns of
        config.data; with top_k the users. A path, a DataFrame or an Arrow table.
      top_k: number of items for each row; None scores the rows.

    Returns:
      The rows with `score` and the other columns of inference/predict.py, as a table of the library
      of `rows`; an Arrow table for a path. `predict_file` writes results of any size to a file.

    Raises:
      UserError: there is no checkpoint, the run is in use, or a column is missing.
    """
    import pyarrow.parquet as pq

    with frames.as_file(rows, 'rows') as path, tempfile.TemporaryDirectory() as scratch:
      output = Path(scratch) / 'scores.parquet'
      self.predict_file(path, output, top_k)
      return frames.like(pq.read_table(output), rows)

  @_in_a_line
  def predict_file(
    self, rows: str | Path, output: str | Path, top_k: int | None = None
  ) -> dict[str, Any]:
    """Writes the results of `predict` for a file to a .parquet or .csv file, in parts.

    Returns:
      Counts, see inference/predict.py.
    """
    from lmn_jax.inference import predict

    self.check()
    request = predict.Request(
      arguments.text_of('rows', rows), Path(arguments.text_of('output', output)), top_k
    )
    predict.check(request)
    return predict.predict(self.config, self.workdir, self.trained_store(), request)

  @_in_a_line
  def embeddings(self, table: str = 'item') -> pa.Table:
    """Returns the vectors of items, users, feature values or memory slots, by raw id.

    Args:
      table: 'item', 'user', 'memory', or a feature such as 'item.category'; see
        inference/embeddings.py.

    Returns:
      An Arrow table with the columns `id` and `vector`.

    Raises:
      UserError: there is no checkpoint, the run is in use, or the model does not have the table.
    """
    from lmn_jax.inference import embeddings

    self.check()
    return embeddings.embeddings(self.config, self.workdir, self.trained_store(), table)

  @_in_a_line
  def export(self, to: str | Path | None = None, precision: str = 'float32') -> dict[str, Any]:
    """Writes a folder that scores without lmn_jax, and a symlink to it.

    Args:
      to: path of the symlink; by default WORKDIR/export. precision: that of the tables: float32,
        bfloat16 or int8.

    Returns:
      The report, see export/export.py.

    Raises:
      UserError: there is no checkpoint, the run is in use, or `to` exists and is not an export.
    """
    from lmn_jax.export import export

    self.check()
    to = arguments.path_of('to', to) or self.workdir / 'export'
    return export.export(self.config, self.workdir, self.trained_store(), to, precision)

  @_in_a_line
  def update_states(self, events: str | Path = '') -> dict[str, Any]:
    """Updates the users' states of a next-item model with the store and a log of new events.

    Args:
      events: path of a log of new events, or ''.

    Returns:
      Counts, see inference/update_states.py.

    Raises:
      UserError: the task has no states, there is no checkpoint, or the events were read before.
    """
    from lmn_jax.inference import update_states

    self.check()
    path = arguments.text_of('events', events)
    update_states.check(self.config)
    store = self.trained_store()
    return update_states.update_states(self.config, self.workdir, store, path)

  @_in_a_line
  def trained_store(self) -> Store:
    """Returns the store of the training; does not read the log.

    Raises:
      UserError: there is no checkpoint, or the store does not exist.
    """
    from lmn_jax.training import run_store

    return self._store_to_compute(run_store.store_to_read)

  def _store_to_compute(self, open_store) -> Store:
    """Returns the store as `_store` does; programs that are compiled from now on are stored."""
    store = self._store(open_store)
    compilation_cache.enable(self.compilation_cache)
    return store

  def _store(self, open_store) -> Store:
    """Returns `open_store(config, workdir, stores)`, called on host 0 first, equal on all hosts."""
    store = processes.first_then_others(lambda: open_store(self.config, self.workdir, self.stores))
    processes.agree(
      'store', {'fingerprint': store.fingerprint}, prepare.differences,
      'give every host the same log, or --stores on a disk they share',
    )  # fmt: skip
    self.store = store
    return store
