"""The rows of accelerator.py: what is measured, with its config, in the order of importance."""

import fnmatch
from typing import Any, NamedTuple

import ml_collections
from step_cost import Goal

from lmn_jax import config as configs
from lmn_jax import config_files
from lmn_jax.errors import UserError
from lmn_jax.models.registry import CLICK, NEXT_ITEM

TASKS = ('click', 'next_item', 'memory', 'export')
AT_LEAST = ('per_s',)  # columns whose goal is a lower bound; other goals are upper bounds


class Row(NamedTuple):
  """What is measured.

  Attributes:
    task: one of TASKS. `memory` is a product-key memory alone, see step_cost.py; `export` answers
      requests.
    model: name in the registry; '' for `memory`. label: model and size, for the table.
    L: events of a history, window or segment; for `memory` K, the rows that a query reads.
    batch: examples, lanes or queries of a step; for `export` candidates of a request.
    fields: of config.model. goals: bound by column of the table.
  """

  task: str
  model: str
  label: str
  L: int
  batch: int
  fields: dict[str, Any] = {}
  goals: dict[str, float] = {}

  @property
  def name(self) -> str:
    return f'{self.task}/{self.label}/{self.L}x{self.batch}'

  @property
  def unit(self) -> str:
    """What `per_s` counts."""
    units = {'click': 'examples', 'next_item': 'targets', 'memory': 'rows', 'export': 'requests'}
    return units[self.task]


def _lmn(axis: int) -> dict[str, int]:
  return dict(slots_per_axis=axis)


WINDOWS = dict(heads=2, dropout=0.2)  # of SASRec and HSTU
SHORT = dict(ratio=1.15)
READY = dict(ready_s=30.0)
GOALS = (
  Row('click', 'lmn', 'lmn-2^16', 50, 512, _lmn(256), SHORT | dict(per_s=800e3)),
  Row('click', 'din', 'din', 50, 512, {}, SHORT),
  Row('next_item', 'dman', 'dman', 20, 1024, dict(width=128), SHORT | dict(per_s=4e6)),
  Row('click', 'sam', 'sam', 1000, 2048, {}, dict(per_s=600e3)),
  Row('next_item', 'sasrec', 'sasrec-64', 200, 256, WINDOWS | dict(width=64), dict(per_s=15e6)),
  Row('click', 'lmn', 'lmn-2^16', 50, 16_384, _lmn(256), dict(per_s=4e6)),
  Row('memory', '', 'memory-2^24', 32, 16_384, _lmn(4096), dict(per_s=500e6)),
  Row('next_item', 'hstu', 'hstu-4x128', 200, 128, WINDOWS | dict(width=128, blocks=4),
      dict(per_s=6e6)),
  Row('next_item', 'sasrec', 'sasrec-128', 200, 256, WINDOWS | dict(width=128), dict(per_s=8e6)),
  Row('click', 'din', 'din', 50, 8192, {}, dict(per_s=4e6)),
  Row('next_item', 'sasrec', 'sasrec-64-bf16', 200, 256, WINDOWS | dict(width=64, bf16=True)),
  Row('next_item', 'sasrec', 'sasrec-128-bf16', 200, 256, WINDOWS | dict(width=128, bf16=True)),
  Row('next_item', 'hstu', 'hstu-4x128-bf16', 200, 128,
      WINDOWS | dict(width=128, blocks=4, bf16=True)),
  Row('export', 'lmn', 'export-lmn-2^20', 50, 200, _lmn(1024), READY | dict(p50_ms=2.0)),
  Row('export', 'sam', 'export-sam', 1000, 200, {}, READY | dict(p50_ms=3.0)),
  Row('click', 'lmn', 'lmn-2^20', 50, 4096, _lmn(1024)),
  Row('click', 'sam', 'sam', 1000, 256),
  Row('click', 'din', 'din', 1000, 2048),
  Row('next_item', 'dman', 'dman', 20, 128, dict(width=128)),
  Row('click', 'sam', 'sam-bf16', 1000, 2048, dict(bf16=True)),
)  # fmt: skip
OTHERS = (
  *[Row('click', name, name, 50, 4096) for name in CLICK if name not in ('lmn', 'din', 'sam')],
  *[
    Row('next_item', name, name, 50, 256)
    for name in NEXT_ITEM
    if name not in ('sasrec', 'hstu', 'dman')
  ],
)
ROWS = GOALS + OTHERS

# Bounds of the slowest row, by column.
COMPILE = dict(cold_s=15.0, second_s=3.0)


def chosen(pattern: str) -> list[Row]:
  """The rows whose name matches a shell pattern, or one of several with commas; all for ''.

  Raises:
    UserError: a pattern that no row matches.
  """
  if not pattern:
    return list(ROWS)
  patterns, matched = pattern.split(','), set()
  for one in patterns:
    names = fnmatch.filter([row.name for row in ROWS], one)
    if not names:
      raise UserError(
        f'--only={one!r} matches none of the {len(ROWS)} rows; a row is TASK/LABEL/LxBATCH, such '
        f"as {ROWS[0].name}, and 'click/sam*' matches several"
      )
    matched.update(names)
  return [row for row in ROWS if row.name in matched]


# Sizes for a CPU: the same programs, so small that each compiles in seconds.
QUICK = dict(
  width=8, hidden=(8,), attention=4, query_width=8, query_hidden=8, blocks=1, heads=1, evolution=4,
  controller=4, horizontal=2, vertical=2, slots=2, top_k=2, positions=1,
)  # fmt: skip
SCALED = ('slots_per_axis', 'width')  # fields of rows that are divided by 16


def quick(row: Row) -> Row:
  """The row at sizes for a CPU."""
  batch = 16 if row.task == 'export' else max(8, row.batch // 64)
  return row._replace(L=max(4, row.L // 10), batch=batch)


def fields_of(row: Row, small: bool, known: Any) -> dict[str, Any]:
  """Fields of config.model: those of the row, at sizes for a CPU if `small`.

  known: the fields that the model has.
  """
  if not small:
    return row.fields
  fields = row.fields | {name: value for name, value in QUICK.items() if name in known}
  return fields | {name: row.fields[name] // 16 for name in SCALED if name in row.fields}


def log_of(row: Row, small: bool) -> ml_collections.ConfigDict:
  """The generated log of a row: a few hundred thousand events, so that it is built in seconds."""
  if row.task == 'next_item':
    # Two events are held out and one is only a target: L whole inputs remain of 200. 3,400 items.
    sizes = dict(users=1500, goods=1700, chatter=1699, length=203)
    if small:
      sizes = dict(users=40, goods=40, chatter=40, length=43, favourites=3)
    return configs.interests_data(**sizes)
  if row.L > 50:
    sizes = dict(users=300, length=1000, recent=100)
    if small:
      sizes = dict(users=20, length=100, recent=10)
    return configs.long_data(**sizes)
  return configs.douyin_data(**(dict(users=40, impressions=60) if small else dict(users=500)))


def config_of(row: Row, small: bool) -> ml_collections.ConfigDict:
  """The experiment of a row, on a generated log.

  Args:
    row: of a registered model. small: whether at sizes for a CPU; `row` is then from `quick`.
  """
  if row.task == 'next_item':
    config = configs.movielens_next(row.model)
    config.optimizer.update(dict(schedule='constant', warmup_steps=0))
  elif row.L > 50:
    config = config_files.load(f'sam_long:{row.model}')
  else:
    config = config_files.load('lmn_douyin' if row.model == 'lmn' else f'douyin:{row.model}')
  config.data = log_of(row, small)
  if row.task == 'export':
    config.data.split.update(dict(valid=0.0, test=0.0))  # nothing is to be scored
  config.model.update(fields_of(row, small, config.model))
  config.history_length = row.L
  config.batch_size = config.eval_batch_size = 32 if row.task == 'export' else row.batch
  return config


def goals(records: dict[str, dict], rows: list[Row]) -> list[Goal]:
  """The goals with the results.

  Args:
    records: of measured rows, by name. rows: whose goals to list.
  """
  found = [
    Goal(
      f'{row.name} {column}', records.get(row.name, {}).get(column), bound, column in AT_LEAST
    )
    for row in rows
    for column, bound in row.goals.items()
  ]  # fmt: skip
  for column, bound in COMPILE.items():
    seconds = [x[column] for x in records.values() if x.get(column) is not None]
    found.append(Goal(f'slowest {column}', max(seconds, default=None), bound, False))
  return found
