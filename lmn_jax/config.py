"""Every field of a configuration, with its default; a config file changes what it needs.

`data()` describes a log and its history store, `base(model)` the whole experiment. The returned
`ConfigDict`s are locked, so that a misspelt field is an error and not a new field.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from lmn_jax.data import synthetic
from lmn_jax.errors import UserError, one_of
from lmn_jax.models import registry


def data(**overrides) -> ml_collections.ConfigDict:
  """The log to read and the history store to make of it.

  Args:
    **overrides: fields to change; a name that is not listed here is an error.

  Returns:
    A locked ConfigDict.

  Raises:
    UserError: for a field that does not exist.
  """
  config = ml_collections.ConfigDict(
    dict(
      # How the names of its stores begin, under the stores' root.
      name='data',
      # 'synthetic', 'synthetic:long', 'synthetic:interests', 'tfds:NAME[/CONFIG]', or a file, a
      # glob, or a folder (format longctr). The files of a glob follow each other in natural order,
      # day_2 before day_10; files without a row are left out and counted. Text may be packed:
      # .csv.gz, .csv.bz2, .csv.zst.
      source='',
      # Split by files, with split.protocol='column': `source` is the training log, these are the
      # others.
      valid_source='',
      test_source='',
      # csv | tsv | jsonl | parquet | recbole | movielens | sequences | longctr | tfds | synthetic,
      # or MODULE:CLASS of a reader of your own; '' takes it from the source's ending.
      format='',
      tfds_data_dir='',  # where TFDS keeps its data sets; '' its own default
      # Reading of text files. header=False needs `fields`, the columns' names in order.
      delimiter='',  # '' takes the format's own
      # About text that holds delimiters, quotes or line ends. 'auto': " where columns are separated
      # by commas and the like, none by tabs and `::`; '' none, '"' one. Where it is 'auto', a quote
      # that is not closed and takes in whole rows is refused.
      quote='auto',
      header=True,
      fields=(),
      encoding='utf-8',  # any codec of Python's, such as 'gbk' or 'latin-1'
      # Column mapping. An empty name means: the log has no such column.
      user='user',
      item='item',
      time='time',  # '' takes the order of the rows
      time_format='',  # strptime pattern of a text time; '' reads numbers and ISO 8601
      # A second column, of numbers or times, that orders rows of one user and time; '' takes the
      # order of the rows.
      order='',
      label='label',
      # label >= threshold is a click; None demands 0 and 1.
      label_threshold=ml_collections.config_dict.placeholder(float),
      behaviour='',  # column of the behaviour's type
      positive_behaviours=(),  # with `behaviour` and no `label`: these types are label 1
      history_behaviours=(),  # with `behaviour`: only these types enter histories; () all
      example_behaviours=(),  # with `behaviour`: only these types are examples; () all
      # Which rows become history events: 'positive' (label 1) or 'all'.
      history='positive',
      split_column='',  # for split.protocol='column' of one log: train | valid | test
      # Sequences, a line a user: the column of items, and a second file aligned line by line
      # with the times, if there is one.
      items_separator=',',
      times_source='',
      # A list of the candidates that were shown, each with its label behind a separator ('' if they
      # bring none), in place of `item` and `label`: MIND's `N7-1 N8-0`.
      candidates='',
      candidates_separator=' ',
      candidates_label_separator='-',
      # A list of the user's history up to the row, oldest first, in place of the log's own events.
      # A user with several has a record of each, with one embedding row; by the id the newest is
      # found.
      row_history='',
      history_separator=' ',
      # Features: columns of the log, or of the two side files (same format as the source unless
      # told otherwise). A name in `multi` holds several tokens joined by the separator given;
      # a name in `bins` is a number, cut into that many quantile bins of the training rows.
      user_features=(),
      item_features=(),
      context_features=(),
      users_source='',
      items_source='',
      side_format='',
      side_encoding='utf-8',
      # Of one side file alone; '' as above. The delimiter is the log's if the format is.
      users_format='',
      items_format='',
      users_delimiter='',
      items_delimiter='',
      users_encoding='',
      items_encoding='',
      users_fields=(),  # columns' names of a side file without a header
      items_fields=(),
      multi=ml_collections.ConfigDict(),
      bins=ml_collections.ConfigDict(),
      # Words that stand for nothing, in capitals or not: rows without a user or an item are dropped
      # and counted, and the line that says so names the words; a feature is unknown. Leave out a
      # word that is an id, such as NA for Namibia.
      missing=('', 'NA', 'N/A', '#N/A', '<NA>', 'NULL', 'None', 'nan', '\\N'),
      # Lines that cannot be read, and rows whose time, label, order or split is no such value:
      # 'refuse' | 'skip', which leaves them out, counts them and says where the first is.
      bad_lines='refuse',
      # Exact duplicate rows (all mapped columns alike): 'keep' | 'drop'; counted either way.
      duplicates='keep',
      # Negatives sampled for each positive example, for logs without a label: uniform over the
      # other items that the user has met as the positive, never or before, so that nothing but the
      # item tells the two apart; the unknown item for a positive outside of the vocabulary. Rows
      # without another such item are no examples; they are counted.
      negatives=0,
      seed=0,
      # Split: global_time | user_ratio | leave_one_out | column. valid and test are shares; 0
      # leaves a split out, and without validation the last checkpoint counts as the best.
      # leave_one_out holds out one positive of each user for each that is not 0, and no label 0.
      # global_time may be cut at given times instead of shares, in the log's form of times:
      # valid_from='2024-05-24', test_from='2024-05-31'; a split without one is left out.
      split=dict(protocol='global_time', valid=0.1, test=0.1, valid_from='', test_from=''),
      min_count=1,  # ids seen less often in training share the out-of-vocabulary row
      # Of each user's newest so many rows (events and examples alike) those that are events make
      # the history; 0 keeps all. What is cut is counted.
      max_history=0,
      # The store is cut into parts of about so many interactions; memory is bounded by this and
      # by DuckDB's limit.
      rows_per_part=2**24,
      memory_limit='2GB',
      # Arguments of the generator of the source, see synthetic.LOGS.
      synthetic=ml_collections.ConfigDict(),
    )
  )
  if isinstance(split := overrides.get('split'), Mapping):
    # Times may be numbers; as fields they are texts.
    overrides['split'] = {k: str(x) if k.endswith('_from') else x for k, x in split.items()}
  return _changed(config, 'data', overrides)


def douyin(model: str) -> ml_collections.ConfigDict:
  """An experiment on the embedded stand-in for the Douyin log: what its models have in common.

  Args:
    model: name of the model, as for `base`.
  """
  config = base(model, steps=1500)
  config.data = douyin_data()
  config.model.scale = 0.2
  config.optimizer.dense.rate = 2e-3
  # Of 0, 1e-7 and 1e-6 the best on validation for Pooling, DIN and LMN (experiments/LOG.md).
  config.optimizer.embedding.initial_accumulator = 1e-7
  return config


def douyin_data(**synthetic_arguments) -> ml_collections.ConfigDict:
  """The embedded stand-in for the Douyin e-commerce search log, which is private.

  Args:
    **synthetic_arguments: of `synthetic.generate`, to change.
  """
  return data(
    name='douyin_standin',
    source='synthetic',
    user_features=('age', 'gender', 'city'),
    item_features=('category',),
    context_features=('query',),
    synthetic=_arguments(synthetic.generate) | synthetic_arguments,
  )


def long_data(**synthetic_arguments) -> ml_collections.ConfigDict:
  """The embedded log of long histories, of which only the far past tells what is clicked.

  Args:
    **synthetic_arguments: of `synthetic.generate_long`, to change.
  """
  return data(
    name='long_histories',
    source='synthetic:long',
    item_features=('category',),
    behaviour='behaviour',
    history_behaviours=('view',),
    example_behaviours=('offer',),
    split=dict(protocol='user_ratio', valid=0.1, test=0.2),
    synthetic=_arguments(synthetic.generate_long) | synthetic_arguments,
  )


def interests_data(**synthetic_arguments) -> ml_collections.ConfigDict:
  """The embedded log of next items that hang on an interest of the whole history.

  Args:
    **synthetic_arguments: of `synthetic.generate_interests`, to change.
  """
  return data(
    name='interests',
    source='synthetic:interests',
    label='',
    split_column='split',
    split=dict(protocol='column'),
    synthetic=_arguments(synthetic.generate_interests) | synthetic_arguments,
  )


# What the columns of MovieLens-1M are called, by the ending of the source.
MOVIELENS = {
  '.dat': dict(format='', user='user', item='item', time='time'),
  '.tsv': dict(format='sequences', user='user_id', item='movie_ids_in_time_order', time=''),
  '': dict(format='', user='user_id', item='movie_id', time='timestamp'),
}


def movielens_data(name: str, **overrides) -> ml_collections.ConfigDict:
  """MovieLens-1M, every rating an event, whatever its stars; columns follow the source.

  The source may be GroupLens' `ratings.dat`, a `.tsv` of one line a user with the films in time
  order, or, by default, TFDS' copy.

  Args:
    name: of the store. **overrides: fields of `data`.
  """
  config = data(name=name, source='tfds:movielens/1m-ratings', label='', **overrides)
  for field in MOVIELENS['']:
    config[field] = derived(
      config,
      'source',
      lambda source, field=field: MOVIELENS.get(Path(source).suffix, MOVIELENS[''])[field],
      str,
    )
  return config


def next_item(model: str, log: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A next-item experiment on a small public log: what those of them share.

  Args:
    model: name of the model, as for `base`. log: of `data`.
  """
  config = base(model, 'next_item')
  config.data = log
  config.model.width = 64
  config.model.scale = 0.1
  config.optimizer.embedding.name = 'adam'
  config.optimizer.dense.rate = config.optimizer.embedding.rate = 2e-2
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_steps = 200
  config.eval_batch_size = 64
  return config


def movielens_next(model: str) -> ml_collections.ConfigDict:
  """An experiment on MovieLens-1M: which film does a user rate next? What its models share.

  The last film of each user is the test, the one before it validates; all films are ranked, but
  those that the user has rated.

  Args:
    model: name of the model, as for `base`.
  """
  log = movielens_data('movielens_1m_next', split=dict(protocol='leave_one_out'))
  return next_item(model, log)


def _arguments(generate):
  """The arguments of a generator with their defaults; of the seed not: data.seed is handed over."""
  parameters = inspect.signature(generate).parameters.values()
  return {one.name: one.default for one in parameters if one.name != 'seed'}


class _Derived(NamedTuple):
  """How a field is computed from the one it refers to; ml_collections asks for these two."""

  fn: Callable[[Any], Any]
  args: tuple = ()


def derived(
  config: ml_collections.ConfigDict, of: str, fn: Callable[[Any], Any], kind: type = object
) -> ml_collections.FieldReference:
  """A value for a field that follows another, also when that is overridden, until it is set itself.

  Args:
    config: the section that holds the other field.
    of: name of the other field.
    fn: the other's value -> this one's.
    kind: type that an override is read as; any for object.
  """
  return ml_collections.FieldReference(config.get_ref(of), kind, _Derived(fn))


def base(model: str, task: str = 'click', **overrides) -> ml_collections.ConfigDict:
  """A whole experiment: data, model, optimizer, run.

  Args:
    model: name of the model, or MODULE:CLASS of a model of your own; its fields and defaults
      become the section `model`.
    task: 'click' or 'next_item'.
    **overrides: top-level fields to change.

  Returns:
    A locked ConfigDict, for a config file to change.

  Raises:
    UserError: for a model or a field that does not exist.
  """
  config = ml_collections.ConfigDict()
  config.task = task
  config.data = data()
  # Clicks: L, newest events a model sees. Next items: T, events of a segment of a history.
  config.history_length = 50

  # Next items: only the newest window of each user is learnt from, and only a window is read.
  config.latest = False

  config.model = ml_collections.ConfigDict(registry.defaults(model, task))
  # NAME_weight of each loss that a model has beside its objective (`loss_weights` of the model).
  config.loss = registry.loss_weights(model, task)

  # Of all devices together: examples, or lanes that read a history each.
  config.batch_size = 512
  config.steps = 1000  # updates in the whole training
  config.optimizer = dict(
    # Each: adam | adagrad | sgd, for the tables also rowwise_adagrad (one accumulator a row), for
    # the dense parameters also any optimizer of optax by its name there, such as lion; its peak
    # rate; decoupled weight decay, of rows only when they are touched; where the sums of squares of
    # the two Adagrads begin: gradients well below its root move a weight little; its other keyword
    # arguments, such as dict(b1=0.9, b2=0.98, eps=1e-9), or on the command line
    # --config.optimizer.dense.arguments="{'b1': 0.8}".
    dense=dict(name='adam', rate=1e-3, decay=0.0, initial_accumulator=0.0, arguments={}),
    # rows: float32 | bfloat16, which are half the bytes to read and to send, rounded from a float32
    # master that the optimizer moves. For GPU and TPU: XLA's CPU backend writes bfloat16 rows by
    # way of a float32 copy of the whole table.
    embedding=dict(
      name='adagrad', rate=0.05, decay=0.0, initial_accumulator=0.0, arguments={}, rows='float32'
    ),
    memory=dict(
      name='adagrad', rate=0.05, decay=0.0, initial_accumulator=0.0, arguments={}, rows='float32'
    ),
    schedule='constant',  # constant | cosine | linear
    warmup_steps=0,
    clip_norm=0.0,  # of all gradients together; 0 does not clip
  )
  config.mesh = dict(model=1)  # devices along the tables' own axis; the rest share the batch

  config.seed = 0
  config.log_every = 50  # steps between lines of metrics
  config.eval_every = 500  # steps between validations
  config.patience = 0  # validations without a better score before training stops; 0 never stops
  config.save_every = 500  # steps between checkpoints
  # So many steps one after the other whose loss or gradient is NaN or infinite are left out, and
  # counted as `skipped`; one more ends the run.
  config.skip_not_finite = 0
  config.eval_batch_size = 2048
  config.buckets = (10, 50, 200)  # history lengths that part the metrics
  config.ranks = (10, 50, 100)  # next items: K of HR@K and NDCG@K
  # Next items: what the user has met is no candidate; False where users come back to items.
  config.exclude_seen = True
  # Metrics of your own, MODULE:FUNCTION each: clicks (label [N], logit [N], user [N]) -> a number,
  # next items (rank [N], from 1 on) -> a number; None where it is undefined.
  config.metrics = ()
  # What chooses the best checkpoint: '' the first metric of the report, a metric of which the
  # highest is the best, '-' and a metric of which the lowest is, or MODULE:FUNCTION of a dict of
  # all metrics, whose highest value is the best.
  config.criterion = ''
  # Next items: metrics among so many sampled negatives as well, under a label of their own.
  config.sampled_negatives = 0
  config.loader_workers = 0  # processes that read batches; 0 reads in threads
  return _changed(config, 'config', overrides)


# The least value of fields; sections with bounds of their own are checked by what reads them.
LEAST = {
  'steps': 1, 'batch_size': 1, 'eval_batch_size': 1, 'history_length': 1, 'log_every': 1,
  'eval_every': 1, 'save_every': 1, 'patience': 0, 'skip_not_finite': 0, 'loader_workers': 0,
  'seed': 0, 'sampled_negatives': 0,
  'optimizer.clip_norm': 0,
}  # fmt: skip


def check_names(config: ml_collections.ConfigDict) -> None:
  """Refuses a config with other fields than `base` has, at any depth.

  A section that is assigned as a dict, `config.data.split = {...}`, replaces the whole section,
  also of a locked config: unknown names are refused, and fields that it lacks have their defaults.

  Raises:
    UserError: naming the field that is unknown, or the section that is missing.
  """
  for name in ('task', 'model'):
    if name not in config:
      raise UserError(f'the config has no field {name!r}; begin with lmn_jax.config.base(MODEL)')
  _same_names(config, base(config.model.name, config.task))
  if config.data.source in synthetic.LOGS:
    known = _arguments(synthetic.LOGS[config.data.source])
    for name in config.data.synthetic:
      one_of('config.data.synthetic field', name, known)


def _same_names(config, known, path=''):
  # A section that is empty by default, such as data.multi, has the user's own names.
  for name in config:
    one_of(f'config{path and f".{path}"} field', name, known)
  for name, section in known.items():
    own = f'{path}.{name}' if path else name
    if own == 'model':
      continue  # registry.build says of which model a field is
    if name not in config:
      if not path:
        raise UserError(f'the config has no field {own!r}; begin with lmn_jax.config.base(MODEL)')
      with config.unlocked():
        config[name] = section
    if isinstance(section, ml_collections.ConfigDict) and len(section):
      if not isinstance(config[name], ml_collections.ConfigDict):
        raise UserError(
          f'config.{own}={config[name]!r} must be a section with the fields {", ".join(section)}'
        )
      _same_names(config[name], section, own)


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses a config that lacks a field, and values out of their bounds.

  Raises:
    UserError: naming the field, its value and the bound.
  """
  check_names(config)
  weights = {f'loss.{name}': 0 for name in config.loss}
  for name, least in (LEAST | weights).items():
    value = _field(config, name)
    if not (isinstance(value, int | float) and value >= least):  # nan is not
      raise UserError(f'config.{name}={value} must be at least {least}')
  for name in ('seed', 'steps'):  # the counter of steps is an int32
    if config[name] >= 2**31:
      raise UserError(f'config.{name}={config[name]} must be below 2147483648')
  lists = {'buckets': 0, 'ranks': 1} | ({'model.hidden': 1} if 'hidden' in config.model else {})
  for name, least in lists.items():
    value = _field(config, name)
    if not all(isinstance(x, int) and x >= least for x in value):
      raise UserError(f'config.{name}={tuple(value)} must be whole numbers from {least} on')
  edges = list(config.buckets)
  if edges != sorted(set(edges)) or not edges:
    raise UserError(f'config.buckets={tuple(edges)} must ascend, such as (10, 50, 200)')


def _field(config, name):
  return functools.reduce(lambda section, key: section[key], name.split('.'), config)


def _changed(config, section, overrides):
  """The config with the overrides, locked; a name that is no field of it is refused."""
  _check_overrides(config, section, overrides)
  config.update(overrides)
  return config.lock()


def _check_overrides(config, section, overrides):
  # At any depth: an update adds unknown names to what is not locked yet.
  for name, value in overrides.items():
    one_of(f'{section} field', name, config)
    known = config[name]
    if isinstance(known, ml_collections.ConfigDict) and len(known):
      if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise UserError(
          f'{section}.{name}={value!r} must be a dict with fields of {", ".join(known)}'
        )
      _check_overrides(known, f'{section}.{name}', value)
