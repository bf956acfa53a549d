"""The two tasks: their batches, the evaluation of a split, and the columns of a report.

All differences between tasks are here; other files use a Task and do not compare names.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from lmn_jax.data import labels, named_histories
from lmn_jax.data.batches import BatchSource
from lmn_jax.data.lanes import LaneSource
from lmn_jax.data.reads import Reads
from lmn_jax.data.splits import SPLITS, held_out
from lmn_jax.data.store import Store
from lmn_jax.data.targets import training_items
from lmn_jax.data.train_lengths import MEAN, TrainLengths
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError, one_of
from lmn_jax.evaluation import click_evaluation, custom_metrics, ranking
from lmn_jax.models import registry
from lmn_jax.models.base import Model
from lmn_jax.training.program import Batch, State
from lmn_jax.training.trainer import Trainer

Config = ml_collections.ConfigDict
Metrics = dict[str, Any]
Sources = dict[str, Any]
# Fields of the batches of clicks -> the value without effect.
EVERY_EVENT = 'are learnt from every event of a lane'
ONE_LABEL = 'have no sample weights and one label, a click'
ONE_HISTORY = 'read one history, whose behaviours are config.data.history_behaviours'
# Field that next items refuse -> (its default, what next items do instead).
CLICK_FIELDS = {
  'targets_per_request': (1, EVERY_EVENT), 'stale_events': (0, EVERY_EVENT),
  'train_length': ('full', EVERY_EVENT), 'train_length_mean': (MEAN, EVERY_EVENT),
  'history_lengths': ({}, ONE_HISTORY), 'data.histories': ({}, ONE_HISTORY),
  'data.row_history': ('', 'are learnt from the events of the log'),
  'data.cold_items': (False, 'have no score for an item without a row'),
  'data.weight': ('', ONE_LABEL),
  'data.labels': ((), ONE_LABEL),
  'data.label_kind': ('click', ONE_LABEL),
}  # fmt: skip
Batches = Iterator[tuple[np.ndarray | None, Batch]]


class Task(NamedTuple):
  """The functions of a task that training and reports call.

  check: raises UserError for a config that the task does not support. doubts: lines of warnings,
  see config_warnings.py. notes: lines on the batches of training, for the log and the report.
  protocol: a description of the metrics for the report, by config, beside that of the splits; may
  be ''. columns: metrics of a table, by config; the first chooses the best checkpoint unless
  config.criterion is set.
  sources: batches by split; those of training have no end. Held-out splits only if they exist.
  score: one number for each example or target of a split, on every host; the batches are those of
  `feed.held_out`.
  report: {'overall': metrics, 'by_history': {bucket: metrics}} of the scores of a split, and of a
  store with cold items 'cold_items': metrics of the examples with one, and their share.
  baselines: the same for untrained baselines, by name.
  rows: the rows of a split with their scores, for `scored_rows.write`.
  context: whether a row has context features beside user and item. probability: whether a score is
  a log-odds, by config. states: whether a user's history is read step by step, into a state.
  """

  check: Callable[[Config], None]
  doubts: Callable[[Config, Store], list[str]]
  notes: Callable[[Sources], list[str]]
  protocol: Callable[[Config], str]
  columns: Callable[[Config], tuple[str, ...]]
  sources: Callable[[Config, Store, Mesh], Sources]
  score: Callable[[Trainer, State, Model, Batches, Any, Mesh], np.ndarray]
  report: Callable[[Config, Store, Sources, str, np.ndarray], Metrics]
  baselines: Callable[[Config, Store, Sources, str], dict[str, Metrics]]
  rows: Callable[[Store, Sources, str, np.ndarray], Iterator[dict[str, np.ndarray]]]
  context: bool
  probability: Callable[[Config], bool]
  states: bool


def _splits(config, store):
  """Returns training and the held-out splits: those of the config, or of the log's split column."""
  if config.data.split.protocol == 'column':
    return ['train', *(name for name in SPLITS[1:] if store.examples[name])]
  return ['train', *held_out(config.data.split)]


def _sizes(config, store, mesh):
  """Returns by split (size of a global batch, the rows of it that this host reads)."""
  sizes = dict.fromkeys(_splits(config, store), config.eval_batch_size)
  sizes['train'] = config.batch_size
  return {split: (size, meshes.share(mesh, size)) for split, size in sizes.items()}


def reads_of(config: Config, store: Store) -> Reads:
  """Returns what a model reads of events: times if it asks for them, and all event features.

  Of named histories it is those that have an encoder.
  """
  histories = tuple((name, config.history_lengths[name]) for name in _encoders(config))
  return Reads(config.model.get('time', 'none') != 'none', store.fields('event'), histories)


def _encoders(config):
  """Returns the encoder of each named history that the model reads, {} if it reads none."""
  return dict(config.model.get('encoders', {}))


def _check_histories(config):
  """Checks the named histories of the data, the model and their lengths against each other."""
  named, encoders = named_histories.behaviours_of(config.data), _encoders(config)
  lengths, field = dict(config.history_lengths), 'config.history_lengths'
  if lengths and not encoders:
    raise UserError(
      f"{field}={lengths!r:.80} has no effect: only the model 'histories' reads named histories; "
      'leave it {}, or use that model'
    )
  if encoders and not named:
    raise UserError(
      f'config.model.encoders={encoders!r:.80} needs config.data.histories, which name the '
      "behaviours of each history, such as {'clicks': ('view',)}"
    )
  for name in encoders:
    one_of('config.model.encoders: history', name, named)
    if name not in lengths:
      raise UserError(f'{field} has no {name!r}; set the number of events to read of this history')
  for name, length in lengths.items():
    one_of(f'{field}: history', name, encoders)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
      raise UserError(f'{field}.{name}={length!r:.80} must be a whole number of at least 1')


def _click_doubts(config, store):
  return [*_cold_doubts(config, store), *_label_doubts(config, store)]


def _cold_doubts(config, store):
  counts = store.manifest['counts']
  if not store.cold_items or config.model.id_dropout:
    return []
  if counts['cold_items']['train'] or counts['out_of_vocabulary']['item']['train']:
    return []
  return [
    f'{store.cold_items:,} cold items have the row of the unknown item, which no training example '
    'reads; set config.model.id_dropout, such as 0.1, to train it'
  ]


def _label_doubts(config, store):
  counts, examples = store.manifest['counts'], store.examples['train']
  if store.label_kind == 'number':
    return [
      f'all labels {name!r} of training are {of_label["mean"]:g}, so there is nothing to learn'
      for name, of_label in counts['labels'].items()
      if not of_label['deviation']
    ]
  numbers = {'training': (counts['clicks']['train'], examples)} | {
    f'the label {name!r} in training': (of['clicks']['train'], of['labelled']['train'])
    for name, of in counts.get('labels', {}).items()
    if name != store.labels[0]
  }
  return [
    f'{what} has {clicks} clicks in {examples} examples, so there is only one class; see '
    'config.data.label, or sample config.data.negatives'
    for what, (clicks, examples) in numbers.items()
    if not 0 < clicks < examples
  ]


def _click_check(config):
  _check_histories(config)
  if config.stale_events and config.targets_per_request == 1:
    raise UserError(
      f'config.stale_events={config.stale_events} has no effect with targets_per_request=1; set it '
      'to 0, or raise config.targets_per_request'
    )

  any_length = [name for name, model in registry.CLICK.items() if model.any_length]
  if config.train_length != 'full' and not registry.any_length(config.model):
    raise UserError(
      f'config.train_length={config.train_length!r} needs a model of any length, and '
      f"{config.model.name} has weights for each position; use 'full', or one of "
      f'{", ".join(any_length)}'
    )
  TrainLengths(config.train_length, config.train_length_mean, config.history_length, config.seed)


def _click_notes(sources):
  source, notes = sources['train'], []
  if source.requests is not None:
    notes.append(source.requests.describe())
  if len(source.lengths.ladder) > 1:
    notes.append(source.lengths.describe())
  return notes


def _check_validation(config, store):
  """Refuses a validation split with one class only, which has no AUC to choose a checkpoint."""
  counts, rows, of_label = store.manifest['counts'], store.examples['valid'], ''
  clicks = counts['clicks']['valid']
  name = config.criterion.removeprefix('-').partition('/')[0]
  if name in store.labels[1:]:
    of_label, chosen = f' of the label {name!r}', counts['labels'][name]
    rows, clicks = chosen['labelled']['valid'], chosen['clicks']['valid']
  if not 0 < clicks < rows:
    remedy = (
      f'raise config.data.split.valid={config.data.split.valid} until it has both classes'
      if clicks < rows or not rows
      else 'sample config.data.negatives, or choose another config.data.split.protocol'
    )
    raise UserError(
      f'{store.path}: the validation split has {clicks} clicks in {rows} examples{of_label}, so it '
      f'has no AUC; {remedy}'
    )


def _click_sources(config, store, mesh):
  if 'valid' in _splits(config, store) and store.label_kind == 'click':
    _check_validation(config, store)
  training = dict(
    targets=config.targets_per_request, stale_events=config.stale_events,
    train_length=config.train_length, train_length_mean=config.train_length_mean,
  )  # fmt: skip
  return {
    split: BatchSource(
      store.path,
      split,
      size,
      config.history_length,
      config.seed,
      split == 'train',
      rows,
      reads_of(config, store),
      **(training if split == 'train' else {}),
    )
    for split, (size, rows) in _sizes(config, store, mesh).items()
  }  # fmt: skip


def _click_score(trainer, state, model, batches, source, mesh):
  predict = functools.partial(trainer.predict, state)
  return click_evaluation.score(predict, batches, source.examples)


def _click_report(config, store, sources, split, scores):
  examples = click_evaluation.examples_of(store, split)
  names, metrics = labels.names(config.data), _config_metrics(config)
  return click_evaluation.report(examples, scores, config.buckets, names, metrics, store.label_kind)


def _click_baselines(config, store, sources, split):
  counts = click_evaluation.count_training(store)
  return click_evaluation.report_baselines(
    counts, click_evaluation.examples_of(store, split), config.buckets, _config_metrics(config),
    store.label_kind,
  )  # fmt: skip


def _click_rows(store, sources, split, scores):
  return click_evaluation.rows_of(store, split, scores)


def _lane_doubts(config, store):
  keys = (*store.fields('item'), *(key for key in store.vectors if key.startswith('item.')))
  if config.model.item_fields or not keys:
    return []
  return [
    f'the model does not read {", ".join(keys)}, the features of the items, since '
    'config.model.item_fields=False; with True it does'
  ]


def _lane_check(config):
  fields = config.to_dict()
  for name, (default, instead) in CLICK_FIELDS.items():
    value = functools.reduce(lambda section, field: section[field], name.split('.'), fields)
    if value != default:
      raise UserError(
        f"config.{name}={value!r:.80} is for config.task='click'; next items {instead}, so leave "
        f'it {default!r}'
      )


def _lane_sources(config, store, mesh):
  model = registry.model_class(config.model.name, config.task)
  return {
    split: LaneSource(
      store.path, split, size, config.history_length, config.seed, split == 'train', rows,
      *_sampled(config.model, split), model.whole, config.latest, model.packs,
      config.exclude_seen, reads_of(config, store),
    )
    for split, (size, rows) in _sizes(config, store, mesh).items()
  }  # fmt: skip


def _sampled(model, split):
  """Returns the sampler and the number of negatives of the batches."""
  if split != 'train' or model.loss == 'softmax':
    return '', 0
  return model.sampler, model.negatives


def _lane_score(trainer, state, model, batches, source, mesh):
  shapes = jax.eval_shape(model.carry, source[0])
  carry = meshes.place(mesh, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
  stream = functools.partial(trainer.stream, state)
  rows_RD = state.tables['item'].rows_RD
  return ranking.rank_split(stream, rows_RD, carry, batches, source, mesh, model.items)


def _lane_report(config, store, sources, split, scores):
  return ranking.report(
    scores, sources[split], config.ranks, config.buckets, store.vocabulary['item'],
    config.sampled_negatives, _config_metrics(config),
  )  # fmt: skip


def _lane_baselines(config, store, sources, split):
  ranks = ranking.rank_baselines(training_items(store), sources[split], store.vocabulary['item'])
  return {name: _lane_report(config, store, sources, split, rank) for name, rank in ranks.items()}


def _lane_rows(store, sources, split, scores):
  return iter([ranking.rows_of(store, sources[split], scores)])


def _lane_protocol(config):
  but = ' but those the user has met' if config.exclude_seen else ''
  return f'all items are ranked{but}; ties count against the model'


def _click_columns(config):
  if config.data.label_kind == 'number':
    return ('rmse', 'mae')
  return ('auc', 'gauc', 'log_loss', 'normalised_entropy', 'calibration')


def _lane_columns(config):
  return tuple(f'{name}@{k}' for k in config.ranks for name in ('ndcg', 'hr')) + ('mrr',)


# Columns of built-in metrics, by task.
COLUMNS = {'click': _click_columns, 'next_item': _lane_columns}


def _config_metrics(config):
  return custom_metrics.load(config.metrics, COLUMNS[config.task](config))


def columns_of(config: Config) -> tuple[str, ...]:
  """Returns the metrics of a table: those of the task and of config.metrics.

  With several labels each label has them, by names such as 'order/auc'.

  Raises:
    UserError: an entry of config.metrics is not a function, or its name is taken.
  """
  columns = (*COLUMNS[config.task](config), *_config_metrics(config))
  names = labels.names(config.data)
  return columns if len(names) == 1 else tuple(f'{n}/{column}' for n in names for column in columns)


TASKS = {
  'click': Task(
    check=_click_check,
    doubts=_click_doubts,
    notes=_click_notes,
    protocol=lambda config: '',
    columns=columns_of,
    sources=_click_sources,
    score=_click_score,
    report=_click_report,
    baselines=_click_baselines,
    rows=_click_rows,
    context=True,
    probability=lambda config: config.data.label_kind == 'click',
    states=False,
  ),
  'next_item': Task(
    check=_lane_check,
    doubts=_lane_doubts,
    notes=lambda sources: [],
    protocol=_lane_protocol,
    columns=columns_of,
    sources=_lane_sources,
    score=_lane_score,
    report=_lane_report,
    baselines=_lane_baselines,
    rows=_lane_rows,
    context=False,
    probability=lambda config: False,
    states=True,
  ),
}
