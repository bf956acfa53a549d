"""Every field of a configuration with its default; a config file changes the fields it needs.

`data()` describes a log and its history store, `base(model)` a whole experiment. Both return a
locked `ConfigDict`: a misspelt field is an error and not a new field. The fields stand below in
sections, each with a comment; the reference of the documentation is generated from them.
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

# Fields of `data`.


def _log():
  """Source."""
  return dict(
    # First part of the names of its stores.
    name='data',
    # 'synthetic', 'synthetic:long', 'synthetic:interests', 'tfds:NAME[/CONFIG]', a file, a glob, or
    # a folder (format longctr). Files of a glob are read in natural order, day_2 before day_10;
    # files without a row are skipped and counted. Text files may be compressed: .csv.gz, .csv.bz2,
    # .csv.zst.
    source='',
    # Validation log, for split.protocol='column' with one log for each split; `source` is then the
    # training log.
    valid_source='',
    test_source='',  # test log, as valid_source
    # csv | tsv | jsonl | parquet | recbole | movielens | sequences | longctr | tfds | synthetic, or
    # MODULE:CLASS of a reader outside of the package; '' chooses by the ending of the source.
    format='',
    tfds_data_dir='',  # folder of the TFDS data sets; '' is the default of TFDS
    # Arguments of the generator of a synthetic source, see `lmn_jax/data/synthetic.py`.
    synthetic=ml_collections.ConfigDict(),
  )


def _text_files():
  """Text files."""
  return dict(
    delimiter='',  # text between two columns; '' is the one of the format
    # Character that encloses text with delimiters, quotes or line ends. 'auto': " where commas and
    # the like separate the columns, none where tabs or `::` do; '' none; '"' always. With 'auto', a
    # quote that is not closed and would include whole rows is an error.
    quote='auto',
    header=True,  # whether the first line names the columns; if not, `fields` names them
    fields=(),  # names of the columns in order, of files without a header
    encoding='utf-8',  # any codec of Python, such as 'gbk' or 'latin-1'
    # Lines that cannot be read, and rows with an invalid time, label, order or split: 'refuse' is
    # an error, 'skip' skips and counts them and names the first.
    bad_lines='refuse',
  )


def _columns():
  """Columns. An empty name means that the log has no such column."""
  return dict(
    user='user',  # id of the user
    item='item',  # id of the item
    time='time',  # time of the row; '' takes the order of the rows
    time_format='',  # strptime pattern of a text time; '' reads numbers and ISO 8601
    # A second column, of numbers or times, which orders rows of the same user and time; '' takes
    # the order of the rows.
    order='',
    label='label',  # 1 for a click, 0 for none; a number with label_threshold
    # Several labels, such as ('click', 'order'), in place of `label`. The first is the main one: it
    # decides which rows are history events and which get negatives. The others may be missing in
    # some rows, which then do not count for them.
    labels=(),
    # 'click': labels are 0 and 1. 'number': labels are numbers to predict, such as a dwell time; it
    # needs history='all', and 'mse' or 'huber' as config.model.loss.
    label_kind='click',
    # A label of at least this value is a click, of each label; None requires labels 0 and 1.
    label_threshold=ml_collections.config_dict.placeholder(float),
    weight='',  # sample weight of the row as an example in training, a number of at least 0
    behaviour='',  # type of the event, such as view or buy
    positive_behaviours=(),  # types with label 1, in place of `label`
    history_behaviours=(),  # types that are history events; () all
    example_behaviours=(),  # types that are examples; () all
    split_column='',  # train | valid | test, for split.protocol='column' with one log
    # Texts that mean a missing value, in any letter case. Rows without a user or an item are
    # dropped, and the line that counts them names these texts; a feature is then unknown. Leave out
    # a text that is an id, such as NA for Namibia.
    missing=('', 'NA', 'N/A', '#N/A', '<NA>', 'NULL', 'None', 'nan', '\\N'),
    duplicates='keep',  # rows equal in all mapped columns: 'keep' | 'drop'; both count them
  )


def _lists():
  """Columns of lists."""
  return dict(
    items_separator=',',  # text between two items of a line, for format='sequences'
    # A second file with the times of format='sequences', aligned line by line.
    times_source='',
    # Column of the candidates of an impression, each with its label after a separator, in place of
    # `item` and `label`, such as `N7-1 N8-0` in MIND.
    candidates='',
    candidates_separator=' ',  # text between two candidates
    candidates_label_separator='-',  # text between candidate and label; '' has no labels
    # Column of the history of the user up to the row, oldest first, in place of the events of the
    # log. A user with several histories has a record for each and one embedding row; the id finds
    # the newest.
    row_history='',
    history_separator=' ',  # text between two items of row_history
  )


def _features():
  """Features. Columns of the log, or of the side files."""
  return dict(
    user_features=(),  # columns that describe the user
    # Columns that describe the item, also in histories; next items read them with
    # config.model.item_fields=True.
    item_features=(),
    context_features=(),  # columns that describe the impression
    # Columns of the log that each event of a history has, such as its behaviour, dwell time or
    # label. The value must be known by the user's next request.
    event_features=(),
    # {name: 'FILE.parquet:COLUMN' or 'FILE.npy:IDS'}, one vector for each user, such as that
    # of a text; the file has the ids of the log.
    user_vectors=ml_collections.ConfigDict(),
    item_vectors=ml_collections.ConfigDict(),  # as user_vectors, one for each item
    # Clicks: whether items outside of the vocabulary keep their features and vectors. Such a cold
    # item has only the row of the unknown item; config.model.id_dropout trains this row.
    cold_items=False,
    multi=ml_collections.ConfigDict(),  # {column: separator}, columns of several tokens
    # {column: how it enters}, columns of numbers: 'standard' (zero mean and unit variance), 'log'
    # (the same of sign(x) log(1 + |x|)), 'bins:N' (quantile bins as tokens) or 'autodis:N' (N
    # meta-embeddings). Fitted on training rows; a missing value has a row of its own.
    numeric=ml_collections.ConfigDict(),
  )


def _side_files():
  """Side files of users and items."""
  return dict(
    users_source='',  # file with the columns of user_features; '' takes them from the log
    items_source='',  # file with the columns of item_features; '' takes them from the log
    side_format='',  # format of both; '' is the format of the log
    side_encoding='utf-8',  # encoding of both
    users_format='',  # format of users_source; '' is side_format
    items_format='',  # format of items_source; '' is side_format
    users_delimiter='',  # '' is the delimiter of the log if the format is, else of the format
    items_delimiter='',  # as users_delimiter
    users_encoding='',  # encoding of users_source; '' is side_encoding
    items_encoding='',  # encoding of items_source; '' is side_encoding
    users_fields=(),  # names of the columns of users_source without a header
    items_fields=(),  # names of the columns of items_source without a header
  )


def _histories():
  """Histories and vocabularies."""
  return dict(
    history='positive',  # rows that are history events: 'positive' (label 1) | 'all'
    # Only the newest rows of each user, this many, count as events or examples; 0 keeps all. What
    # is cut is counted.
    max_history=0,
    # {name: (behaviour, ...)}, such as {'clicks': ('view',), 'orders': ('cart', 'buy')}: named
    # histories of the events with these values of `behaviour`, beside the history of all events.
    # The click model `histories` reads each by an encoder of its own.
    histories=ml_collections.ConfigDict(),
    min_count=1,  # ids that are rarer in training share the row of the unknown id
  )


def _examples():
  """Examples and splits."""
  return dict(
    # Negatives drawn for each positive example of a log without labels, uniformly over the other
    # items that the user has met as the positive was, never or before, so that nothing except the
    # item separates them. A positive outside of the vocabulary has the unknown item as negative.
    # Rows without such an item are no examples and are counted.
    negatives=0,
    seed=0,  # seed of drawn negatives and of generated logs
    split=_split(),
  )


def _split():
  return dict(
    # global_time | user_ratio | leave_one_out | column. leave_one_out holds out one positive of
    # each user for each share that is not 0, and no row with label 0.
    protocol='global_time',
    valid=0.1,  # share for validation; with 0 the last checkpoint is the best one
    test=0.1,  # share for the test; 0 has no test
    # Time from which examples of global_time validate, in place of a share, in the form of the log:
    # '2024-05-24'. Without it, and with test_from, there is no validation.
    valid_from='',
    test_from='',  # time from which examples test, as valid_from
  )


def _store():
  """The history store."""
  return dict(
    rows_per_part=2**24,  # about as many interactions in a part of the store; bounds the memory
    memory_limit='2GB',  # memory limit of DuckDB, which reads the log
  )


DATA = (
  _log, _text_files, _columns, _lists, _features, _side_files, _histories, _examples, _store,
)  # fmt: skip


def data(**overrides) -> ml_collections.ConfigDict:
  """The log to read and the history store to build from it.

  Args:
    **overrides: fields to change, of the sections above.

  Returns:
    A locked ConfigDict.

  Raises:
    UserError: for a field that does not exist.
  """
  if isinstance(split := overrides.get('split'), Mapping):
    # Times may be numbers; as fields they are texts.
    overrides['split'] = {k: str(x) if k.endswith('_from') else x for k, x in split.items()}
  return _changed(_filled(DATA), 'data', overrides)


# Fields of an experiment beside `task`, `data`, `model` and `loss`.


def _batches():
  """Batches."""
  return dict(
    # Clicks: the newest events that a model reads. Next items: events of a segment or window.
    history_length=50,
    # Clicks: {name: length}, the newest events that a model reads of each of config.data.histories.
    history_lengths=ml_collections.ConfigDict(),
    latest=False,  # next items: train on and read only the newest window of each user
    # Examples, or next items: lanes, of all devices together.
    batch_size=512,
    # Clicks: most training examples of a user that are trained together and share one history, that
    # of the earliest, see docs/how_to/train_long.md. With more than 1, batch_size counts such
    # requests; evaluation and prediction stay as they are.
    targets_per_request=1,
    # Clicks: most of its newest events that a target of a request may lack, because the history is
    # that of the earliest target. 0 groups only targets with the same history.
    stale_events=0,
    # Clicks: how many of the newest events a step of training reads. 'full': history_length;
    # 'suffix': at most that, uniform at random, anew every 8 steps; 'beta': by a U-shaped Beta law,
    # mostly few or all. Validation, test and prediction always read history_length.
    train_length='full',
    train_length_mean=0.5,  # 'beta': mean of the law, as a share of history_length
    eval_batch_size=2048,  # examples, or next items: lanes, of an evaluation batch
    loader_workers=0,  # processes that read batches on the host; 0 reads in threads
    # Where the history store is: 'host' cuts batches from the files and sends them; 'device' puts
    # it into the memory of the devices, which cut the same batches; 'auto' is 'device' on GPU and
    # TPU if the store takes at most a quarter of the memory that the state leaves.
    store_on='auto',
    # Steps that the host sends at once, at most up to the next line, save or validation; 0 is 1 on
    # CPU and otherwise as many as that, with inputs of at most 64 MiB.
    steps_per_dispatch=0,
  )


def _optimizer():
  """Optimizers."""
  return dict(
    optimizer=dict(
      dense=_dense_optimizer(),
      embedding=_table_optimizer(),
      memory=_table_optimizer(),
      schedule='constant',  # schedule of the rates after the warm-up: constant | cosine | linear
      warmup_steps=0,  # steps in which the rates rise from 0
      clip_norm=0.0,  # bound on the norm of all gradients together; 0 does not clip
    )
  )


def _dense_optimizer():
  return dict(
    # For the dense parameters: adam | adagrad | sgd, or the name of any optimizer of optax, such as
    # lion.
    name='adam',
    rate=1e-3,  # peak learning rate
    decay=0.0,  # decoupled weight decay of adam, adagrad and sgd; others have it in arguments
    # Where the sums of squares of adagrad begin: gradients well below its root move a weight in
    # proportion to their size.
    initial_accumulator=0.0,
    # Other keyword arguments of the optimizer: `dict(b1=0.9, b2=0.98, eps=1e-9)`, or on the command
    # line `--config.optimizer.dense.arguments="{'b1': 0.8}"`.
    arguments={},
  )


def _table_optimizer():
  return dict(
    # For the rows of these tables: adam | adagrad | sgd | rowwise_adagrad, which has one
    # accumulator for each row.
    name='adagrad',
    rate=0.05,  # peak learning rate
    decay=0.0,  # decoupled weight decay, of rows only when they are touched
    initial_accumulator=0.0,  # where the sums of squares of the two Adagrads begin
    arguments={},  # other keyword arguments of the optimizer
    # float32 | bfloat16: half the bytes to read and to send, rounded from a float32 master copy
    # that the optimizer updates. For GPU and TPU: the CPU backend of XLA writes bfloat16 rows
    # through a float32 copy of the whole table.
    rows='float32',
  )


def _run():
  """The run."""
  return dict(
    steps=1000,  # updates in the whole training
    mesh=dict(model=1),  # devices along the axis of the tables; the others share the batch
    seed=0,  # seed of initial weights, batches and dropout
    log_every=50,  # steps between lines of metrics
    eval_every=500,  # steps between validations
    save_every=500,  # steps between checkpoints
    patience=0,  # validations without a better score before training stops; 0 never stops
    # Steps in a row with a NaN or infinite loss or gradient that are skipped, and counted as
    # `skipped`; one more ends the run.
    skip_not_finite=0,
  )


def _evaluation():
  """The evaluation."""
  return dict(
    buckets=(10, 50, 200),  # clicks: history lengths that divide the rows for metrics by length
    ranks=(10, 50, 100),  # next items: K of HR@K and NDCG@K
    # Next items: items that the user has met are no candidates; False where users return to items.
    exclude_seen=True,
    # Next items: with N > 0, also the metrics among N sampled negatives, in a table of their own.
    sampled_negatives=0,
    # Metrics outside of the package, MODULE:FUNCTION each. Clicks: (label [N], logit [N], user [N])
    # -> a number; next items: (rank [N], from 1 on) -> a number; None where it is undefined.
    metrics=(),
    # What chooses the best checkpoint: '' the first metric of the report; a metric, whose highest
    # value is the best; '-' and a metric, whose lowest value is; or MODULE:FUNCTION of a dict of
    # all metrics, whose highest value is. With several labels 'order/auc' is the AUC of `order`.
    criterion='',
  )


EXPERIMENT = (_batches, _optimizer, _run, _evaluation)


def base(model: str, task: str = 'click', **overrides) -> ml_collections.ConfigDict:
  """A whole experiment: data, model, optimizer, run.

  Args:
    model: name of a model, or MODULE:CLASS of a model outside of the package; its fields and
      defaults become the section `model`.
    task: 'click' or 'next_item'.
    **overrides: top-level fields to change.

  Returns:
    A locked ConfigDict, for a config file to change.

  Raises:
    UserError: for a model or a field that does not exist.
  """
  config = _filled(EXPERIMENT)
  config.task = task  # click | next_item
  config.data = data()
  config.model = ml_collections.ConfigDict(registry.defaults(model, task))
  config.loss = registry.loss_weights(model, task)
  return _changed(config, 'config', overrides)


def _filled(sections):
  """An unlocked ConfigDict of the fields of sections."""
  fields = [field for section in sections for field in section().items()]
  return ml_collections.ConfigDict(dict(fields))


# Experiments and logs that several config files share.


def douyin(model: str) -> ml_collections.ConfigDict:
  """An experiment on the generated stand-in for the Douyin log; its models share these settings.

  Args:
    model: name of the model, as for `base`.
  """
  config = base(model, steps=1500)
  config.data = douyin_data()
  config.model.scale = 0.2
  config.optimizer.dense.rate = 2e-3
  # The best of 0, 1e-7 and 1e-6 on validation, for Pooling, DIN and LMN (experiments/LOG.md).
  config.optimizer.embedding.initial_accumulator = 1e-7
  return config


def douyin_data(**synthetic_arguments) -> ml_collections.ConfigDict:
  """The generated stand-in for the Douyin e-commerce search log, which is private.

  Args:
    **synthetic_arguments: of `synthetic.generate`, to change.
  """
  return data(
    name='douyin_standin',
    source='synthetic',
    user_features=('age', 'gender', 'city'),
    item_features=('category',),
    context_features=('query',),
    synthetic=_arguments(synthetic.generate, synthetic_arguments),
  )


def long_data(**synthetic_arguments) -> ml_collections.ConfigDict:
  """The generated log of long histories: only old events predict the clicks.

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
    synthetic=_arguments(synthetic.generate_long, synthetic_arguments),
  )


def interests_data(**synthetic_arguments) -> ml_collections.ConfigDict:
  """The generated log of next items that depend on an interest in the whole history.

  Args:
    **synthetic_arguments: of `synthetic.generate_interests`, to change.
  """
  return data(
    name='interests',
    source='synthetic:interests',
    label='',
    split_column='split',
    split=dict(protocol='column'),
    synthetic=_arguments(synthetic.generate_interests, synthetic_arguments),
  )


def _arguments(generate, changes):
  """The arguments of a generator, with their defaults or changes.

  The seed is not among them: `data.seed` sets it. The name of a method of ConfigDict, such as
  `items`, is a field by index, `synthetic['items']`, but config_flags would take the method for
  the default of its flag. The type `object` has no such default; `check_names` checks the value.
  """
  parameters = inspect.signature(generate).parameters.values()
  values = {x.name: x.default for x in parameters if x.name != 'seed'} | changes
  return {
    name: ml_collections.FieldReference(value, object)
    if hasattr(ml_collections.ConfigDict, name)
    else value
    for name, value in values.items()
  }


# The columns of MovieLens-1M, by the ending of the source.
MOVIELENS = {
  '.dat': dict(format='', user='user', item='item', time='time'),
  '.tsv': dict(format='sequences', user='user_id', item='movie_ids_in_time_order', time=''),
  '': dict(format='', user='user_id', item='movie_id', time='timestamp'),
}


def movielens_data(name: str, **overrides) -> ml_collections.ConfigDict:
  """MovieLens-1M: every rating is an event, whatever its stars; columns follow the source.

  The source is `ratings.dat` of GroupLens, a `.tsv` with one line for each user and the films in
  time order, or, by default, the copy of TFDS.

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
  """A next-item experiment on a small public log; its models share these settings.

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
  """An experiment on MovieLens-1M: which film does a user rate next?

  The last film of each user is the test, the one before it validates; all films are ranked except
  those that the user has rated.

  Args:
    model: name of the model, as for `base`.
  """
  log = movielens_data('movielens_1m_next', split=dict(protocol='leave_one_out'))
  return next_item(model, log)


class _Derived(NamedTuple):
  """How a field is computed from another one; ml_collections reads these two attributes."""

  fn: Callable[[Any], Any]
  args: tuple = ()


def derived(
  config: ml_collections.ConfigDict, of: str, fn: Callable[[Any], Any], kind: type = object
) -> ml_collections.FieldReference:
  """The value of a field that follows another field until it is set itself.

  Args:
    config: the section that holds the other field.
    of: name of the other field.
    fn: computes this value from the other one, also after an override of that.
    kind: type that an override is read as; any for object.
  """
  return ml_collections.FieldReference(config.get_ref(of), kind, _Derived(fn))


# The least values of fields. Sections with other bounds are checked by the code that reads them.
LEAST = {
  'steps': 1, 'batch_size': 1, 'eval_batch_size': 1, 'history_length': 1, 'log_every': 1,
  'eval_every': 1, 'save_every': 1, 'patience': 0, 'skip_not_finite': 0, 'loader_workers': 0,
  'seed': 0, 'sampled_negatives': 0, 'steps_per_dispatch': 0, 'targets_per_request': 1,
  'stale_events': 0,
  'optimizer.clip_norm': 0,
}  # fmt: skip

NUMBERS = {'buckets': 0, 'ranks': 1}  # fields of several numbers, with the least value


def check_names(config: ml_collections.ConfigDict) -> None:
  """Refuses a config with other fields than `base` has, at any depth.

  A section that is assigned as a dict, `config.data.split = {...}`, replaces the whole section,
  also of a locked config. Its unknown names are errors, and fields that it lacks are set to their
  defaults.

  Raises:
    UserError: for an unknown field, a missing section, or an invalid argument of a generator.
  """
  check_sections(config)
  _check_section(config, base(config.model.name, config.task))
  if config.data.source in synthetic.LOGS:
    _check_arguments(config.data.synthetic, synthetic.LOGS[config.data.source])


def check_sections(config: ml_collections.ConfigDict) -> None:
  """Refuses a config that was not begun with `base`.

  Raises:
    UserError: it has no task, or no section `data` or `model` with a name.
  """
  for name in ('task', 'model', 'data'):
    if name not in config:
      raise UserError(_missing(name))
    if name != 'task' and not isinstance(config[name], ml_collections.ConfigDict):
      raise UserError(f'config.{name}={config[name]!r:.80} must be a section')
    if name != 'task' and 'name' not in config[name]:
      raise UserError(_missing(f'{name}.name'))


def _missing(field):
  return f'the config has no field {field!r}; begin with lmn_jax.config.base(MODEL)'


def _check_section(config, defaults, path=''):
  # A section that is empty by default, such as data.multi, holds names of the user.
  for name in config:
    one_of(f'config{path and f".{path}"} field', name, defaults)
  for name, default in defaults.items():
    field = f'{path}.{name}' if path else name
    if field == 'model':
      continue  # registry.build names the model that has no such field
    if name not in config:
      if not path:
        raise UserError(_missing(field))
      with config.unlocked():
        config[name] = default
    if isinstance(default, tuple) and field not in NUMBERS:
      texts = config[name]
      if isinstance(texts, str) or not all(isinstance(x, str) for x in texts):
        raise UserError(f'config.{field}={texts!r:.80} must be a tuple of texts')
    if isinstance(default, ml_collections.ConfigDict) and len(default):
      if not isinstance(config[name], ml_collections.ConfigDict):
        raise UserError(
          f'config.{field}={config[name]!r} must be a section with the fields {", ".join(default)}'
        )
      _check_section(config[name], default, field)


def _check_arguments(section, generate):
  defaults = ml_collections.ConfigDict(_arguments(generate, {}))
  for name in section:
    one_of('config.data.synthetic field', name, defaults)
    value = section[name]
    # Flags check the type of every other argument.
    if hasattr(ml_collections.ConfigDict, name) and type(value) is not type(defaults[name]):
      raise UserError(f'config.data.synthetic.{name}={value!r} must be a whole number')


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses a config that lacks a field, and values out of their bounds.

  Raises:
    UserError: with the field, its value and the bound.
  """
  check_names(config)
  weights = {f'loss.{name}': 0 for name in config.loss}
  for name, least in (LEAST | weights).items():
    value = _field(config, name)
    if not (isinstance(value, int | float) and value >= least):  # also refuses nan
      raise UserError(f'config.{name}={value} must be at least {least}')
  for name in ('seed', 'steps'):  # the step counter is an int32
    if config[name] >= 2**31:
      raise UserError(f'config.{name}={config[name]} must be below 2147483648')
  lists = NUMBERS | {f'model.{name}': 1 for name in ('hidden', 'tower') if name in config.model}
  for name, least in lists.items():
    values = _field(config, name)
    if not all(isinstance(x, int) and x >= least for x in values):
      raise UserError(f'config.{name}={tuple(values)} must be whole numbers from {least} on')
  _check_model_lists(config.model)
  one_of('config.store_on', config.store_on, ('auto', 'host', 'device'))
  edges = list(config.buckets)
  if edges != sorted(set(edges)) or not edges:
    raise UserError(f'config.buckets={tuple(edges)} must ascend, such as (10, 50, 200)')


def _check_model_lists(model):
  weights, tuned = tuple(model.get('label_weights', ())), tuple(model.get('tuned', ()))
  if not all(isinstance(x, int | float) and x >= 0 for x in weights):  # also refuses nan
    raise UserError(f'config.model.label_weights={weights!r:.80} must be numbers of at least 0')
  if not all(isinstance(x, str) for x in tuned):
    raise UserError(f'config.model.tuned={tuned!r:.80} must be a tuple of texts')


def _field(config, name):
  return functools.reduce(lambda section, key: section[key], name.split('.'), config)


def _changed(config, section, overrides):
  """The config with the overrides, locked; refuses unknown fields."""
  _check_overrides(config, section, overrides)
  config.update(overrides)
  return config.lock()


def _check_overrides(config, section, overrides):
  # At any depth: update() adds unknown names to a config that is not locked yet.
  for name, value in overrides.items():
    one_of(f'{section} field', name, config)
    default = config[name]
    if isinstance(default, ml_collections.ConfigDict) and len(default):
      if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise UserError(
          f'{section}.{name}={value!r} must be a dict with fields of {", ".join(default)}'
        )
      _check_overrides(default, f'{section}.{name}', value)
