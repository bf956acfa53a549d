"""Runs with fields of every kind: a log with codes, lists and numbers of users, items, impressions
and events, and times."""

import csv

import numpy as np

from lmn_jax import config as configs
from tests.runs import untrained

USERS, ITEMS, EVENTS, FIRST, L = 10, 16, 13, 1_700_000_000, 4
TAGS = ('x|y', 'z', '')  # of items
COLUMNS = ('user', 'item', 'time', 'label', 'hour', 'query', 'kind', 'marks', 'dwell', 'price')


def log_rows():
  """The rows of the log by time, as dicts of texts; some values are missing, no two times equal."""
  rng, rows = np.random.default_rng(4), []
  for n in range(USERS * EVENTS):
    row = dict(
      user=f'u{rng.integers(USERS)}',
      item=f'i{rng.integers(ITEMS)}',
      time=str(FIRST + 7 * n + 40 * int(rng.exponential(50)) * (n % 3 == 0) + n**3),
      label=str(int(rng.random() < 0.8)),
      hour=str(rng.integers(24)),
      query=f'q{rng.integers(5)}',
      kind=f'k{rng.integers(4)}',
      marks='|'.join(rng.choice(['a', 'b', 'c'], rng.integers(0, 3), replace=False)),
      dwell=str(round(float(rng.exponential(30)), 2)),
      price=str(round(float(rng.normal(10, 4)), 3)),
    )
    rows.append(row | {name: '' for name in COLUMNS[4:] if rng.random() < 0.1})
  rows.sort(key=lambda row: int(row['time']))
  assert len({row['time'] for row in rows}) == len(rows)
  return rows


def write(path, rows, columns=COLUMNS):
  with path.open('w', newline='') as file:
    csv.DictWriter(file, columns, extrasaction='ignore').writeheader()
    csv.DictWriter(file, columns, extrasaction='ignore').writerows(rows)
  return str(path)


def rich_config(folder, name, task, **fields):
  """Writes the log and its side files; returns a config of a small model. fields: of the model."""
  rng = np.random.default_rng(5)
  users = [dict(user=f'u{n}', age=rng.integers(20, 60), city=f'c{n % 3}') for n in range(USERS - 2)]
  items = [
    dict(
      item=f'i{n}', cost=round(float(rng.exponential(9)), 2), genre=f'g{n % 4}', tags=TAGS[n % 3]
    )
    for n in range(ITEMS - 2)
  ]
  config = configs.base(name, task, steps=2)
  config.update(history_length=L, batch_size=8, eval_batch_size=8, seed=3)
  config.data.update(
    source=write(folder / 'log.csv', log_rows()), name='rich', rows_per_part=60, max_history=0,
    users_source=write(folder / 'users.csv', users, ('user', 'age', 'city')),
    items_source=write(folder / 'items.csv', items, ('item', 'cost', 'genre', 'tags')),
    event_features=('kind', 'marks', 'dwell', 'price'),
  )  # fmt: skip
  config.data.multi = {'marks': '|'}
  config.data.numeric = {'dwell': 'log', 'price': 'bins:4'}
  with config.unlocked():  # the encoders of `histories` are new names
    config.model.update(dict(width=4, scale=1.0) | fields)
  if task == 'click':
    config.data.update(
      user_features=('age', 'city'), item_features=('cost', 'genre'),
      context_features=('hour', 'query', 'price'),
    )  # fmt: skip
    config.data.numeric = {'dwell': 'log', 'price': 'standard', 'hour': 'autodis:3'}
    config.data.numeric.update(age='standard', cost='log')
    config.model.hidden = (8,)
    if name == 'histories':
      config.data.behaviour, config.history_lengths = 'kind', {'all': L, 'some': 2}
      config.data.histories = {'all': ('k0', 'k1', 'k2', 'k3'), 'some': ('k1', 'k2')}
    config.data.split.update(valid=0.15, test=0.2)
  else:
    config.data.split.protocol, config.exclude_seen = 'leave_one_out', False
    if config.model.item_fields:
      config.data.item_features = ('cost', 'genre', 'tags')
      config.data.numeric = dict(config.data.numeric, cost='log')
      config.data.multi = dict(config.data.multi, tags='|')
  return config


def rich_run(folder, name, task, **fields):
  """(config, workdir, store) of a run with fields of every kind, whose weights are initial."""
  return untrained(rich_config(folder, name, task, **fields), folder)
