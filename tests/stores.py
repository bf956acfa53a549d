"""Small logs as lists of dicts, their stores, and a slow computation of the same stores."""

import math
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from lmn_jax import config
from lmn_jax.data import prepare, vocabulary
from lmn_jax.data.build import build
from lmn_jax.data.named_histories import staged_column
from lmn_jax.data.store import Store


def tables(
  rows: list[dict], users: list[dict] = (), items: list[dict] = (), columns: tuple = ()
) -> duckdb.DuckDBPyConnection:
  """Returns a DuckDB connection with the three tables of a staged log.

  columns: those of features, that of an event feature f is `event.f`; and those of named histories.
  """
  db = duckdb.connect()
  fields = {
    'row': pa.int64(),
    'user': pa.string(),
    'item': pa.string(),
    'time': pa.int64(),
    'label': pa.float32(),
    'history': pa.bool_(),
    'example': pa.bool_(),
    'split': pa.int8(),
  } | {name: pa.bool_() if name.startswith('@') else pa.string() for name in columns}
  sides = {'users': ('user', users), 'items': ('item', items)}
  arrow_tables = {'interactions': pa.Table.from_pylist(rows, pa.schema(list(fields.items())))}
  for table, (key, side) in sides.items():
    names = [key] + sorted({name for row in side for name in row} - {key})
    arrow_tables[table] = pa.Table.from_pylist(
      list(side), pa.schema([(name, pa.string()) for name in names])
    )
  for name, table in arrow_tables.items():
    db.register('arrow', table)
    db.execute(f'CREATE TABLE {name} AS SELECT * FROM arrow')
    db.unregister('arrow')
  return db


def event(
  row: int,
  user: str,
  item: str,
  time: int,
  label: float = 1.0,
  history: bool = True,
  example: bool = True,
  split: int | None = None,
  **context: str | None,
) -> dict:
  """Returns one row of `interactions`."""
  fixed = dict(row=row, user=user, item=item, time=time, label=float(label), history=history)
  return fixed | dict(example=example, split=split) | context


def make_store(
  folder: Path,
  rows: list[dict],
  users: list[dict] = (),
  items: list[dict] = (),
  **fields,
) -> Store:
  """Builds the store of a log and opens it."""
  data = config.data(**fields)
  columns = *data.context_features, *map(vocabulary.event_column, data.event_features)
  columns += tuple(map(staged_column, data.histories))
  build(data, tables(rows, users, items, columns), {}, folder)
  return Store(folder)


def slow_splits(rows: list[dict], protocol: str, valid: float, test: float) -> dict[int, int]:
  """Returns row number -> split of each example; None if the row is not an example."""
  examples = sorted((r for r in rows if r['example']), key=lambda r: (r['time'], r['row']))
  if protocol == 'column':
    return {r['row']: r['split'] for r in examples}
  if protocol == 'global_time':
    times = [r['time'] for r in examples]

    def first(share: float, among: list) -> float:
      enough = [t for t in among if sum(x < t for x in times) >= share * len(times) - 1e-9]
      # Rows of one time are in one split; a requested split has at least one time.
      return min(enough, default=max(among, default=math.inf))

    cut_test = first(1 - test, times) if test else math.inf
    earlier = [t for t in times if t < cut_test]
    cuts = first(1 - valid - test, earlier) if valid and earlier else cut_test, cut_test
    return {r['row']: sum(r['time'] >= cut for cut in cuts) for r in examples}
  splits = {}
  for user in {r['user'] for r in examples}:
    mine = [r for r in examples if r['user'] == user]
    if protocol == 'user_ratio':
      n = len(mine)
      held = [math.ceil(n * share - 1e-9) for share in (1 - valid - test, 1 - test)]
      splits |= {r['row']: (i >= held[0]) + (i >= held[1]) for i, r in enumerate(mine)}
    else:
      held = [number for number, share in ((1, valid), (2, test)) if share]
      clicks = [i for i, r in enumerate(mine) if r['label'] > 0]
      if len(clicks) <= len(held):
        clicks = held = []
      last = clicks[len(clicks) - len(held) :]
      behind = clicks[-len(held) - 1] if held else len(mine)
      for i, r in enumerate(mine):
        # A row with label 0 after the last click of training is not an example.
        splits[r['row']] = dict(zip(last, held, strict=True)).get(i, 0 if i <= behind else None)
  return splits


def kept_events(rows: list[dict], longest: int) -> dict[str, list[dict]]:
  """Returns user -> the events among their newest `longest` rows, or among all rows for 0."""
  events = {}
  for user in {r['user'] for r in rows}:
    mine = [r for r in rows if r['user'] == user and (r['history'] or r['example'])]
    mine.sort(key=lambda r: (r['time'], r['row']))
    events[user] = [r for r in mine[-longest:] if r['history']]
  return events


def slow_store(rows: list[dict], data) -> tuple[list[tuple], set[str], set[str]]:
  """Computes the content of a store from the definition.

  Returns:
    Examples as sorted (split, user, time, row, item, label, history: list of (time, item)), and
    the raw ids of the user and item vocabularies.
  """
  splits = slow_splits(rows, data.split.protocol, data.split.valid, data.split.test)
  events, seen = kept_events(rows, data.max_history), {'user': [], 'item': []}
  rows = [dict(r, example=r['example'] and splits[r['row']] is not None) for r in rows]
  cuts = [r['time'] for r in rows if r['example'] and splits[r['row']] > 0]
  latest = max((r['time'] for r in rows if r['example']), default=0)
  for r in rows:
    if r['example']:
      train = splits[r['row']] == 0
    elif data.split.protocol == 'global_time':
      train = r['time'] < min(cuts, default=latest + 1)
    elif r['split'] is not None:
      train = r['split'] == 0
    else:
      train = any(
        x['user'] == r['user'] and x['time'] > r['time']
        for x in rows
        if x['example'] and splits[x['row']] == 0
      )
    if train and (r['history'] or r['example']):
      seen['user'].append(r['user'])
      seen['item'].append(r['item'])
  vocabulary = {
    kind: {x for x in ids if ids.count(x) >= max(1, data.min_count)} for kind, ids in seen.items()
  }
  examples = [
    (
      splits[r['row']],
      r['user'],
      r['time'],
      r['row'],
      r['item'],
      r['label'],
      [(x['time'], x['item']) for x in events[r['user']] if x['time'] < r['time']],
    )
    for r in rows
    if r['example']
  ]
  return sorted(examples), vocabulary['user'], vocabulary['item']


def decoded(store: Store) -> list[tuple]:
  """Returns examples as (split, user, time, item, label, [(time, item)...]) with raw ids.

  Unknown ids are None.
  """
  item_ids = store.raw_ids('item').to_pylist()
  examples = []
  for number, part in enumerate(store.parts):
    user_ids = store.user_ids(number).to_pylist()
    e, h = part.examples, part.history
    for i in range(len(e['user'])):
      user = e['user'][i]
      first = part.users['offset'][user]
      events = slice(first, first + e['end'][i])
      history = list(
        zip(h['time'][events].tolist(), [item_ids[x] for x in h['item'][events]], strict=True)
      )
      examples.append(
        (
          int(e['split'][i]),
          user_ids[user],
          int(e['time'][i]),
          item_ids[e['item'][i]],
          float(e['label'][i]),
          history,
        )
      )
  return examples


def store_of_features(folder, rows_per_part=90):
  """A store with short, long and empty histories, unknown ids, and features of every kind."""
  rng = np.random.default_rng(0)
  rows = [
    event(
      i,
      f'u{rng.integers(30):02d}',
      f'i{rng.integers(60):02d}',
      int(rng.integers(80)),
      int(rng.integers(2)),
      query=f'q{rng.integers(5)}',
    )
    for i in range(700)
  ]
  rows += [event(700 + i, f'w{i}', 'i00', 5, 0.0, history=False, query=None) for i in range(9)]
  items = [
    dict(item=f'i{i:02d}', category=f'c{i % 4}', tags='|'.join('xyz'[: i % 4])) for i in range(60)
  ]
  users = [dict(user=f'u{i:02d}', age=str(i), likes='a|b' if i % 2 else 'c') for i in range(30)]
  return make_store(
    folder / 'store',
    rows,
    users,
    items,
    user_features=('age', 'likes'),
    item_features=('category', 'tags'),
    context_features=('query',),
    multi={'tags': '|', 'likes': '|'},
    numeric={'age': 'bins:3'},
    min_count=8,
    rows_per_part=rows_per_part,
  )


def store_of_fields(folder, rows_per_part=90, notes=None, **fields):
  """A store with codes, lists and numbers of users, items, impressions and events.

  Some events are no examples and some clicks no events.
  notes: of the reading, such as the clock as `time`; None has numbers without a unit.
  """
  rng = np.random.default_rng(2)

  def number(scale):
    return None if rng.random() < 0.2 else f'{rng.normal() * scale:.3f}'

  rows = []
  for i in range(600):
    rows.append(
      event(i, f'u{rng.integers(25):02d}', f'i{rng.integers(40):02d}', int(rng.integers(2000)))
      | dict(label=float(rng.integers(2)), hour=f'{rng.integers(24)}', price=number(50))
      | dict(history=bool(rng.random() < 0.8), example=i % 9 > 0)
    )
    rows[-1] |= {
      'event.kind': f'k{rng.integers(4)}', 'event.dwell': number(1e4), 'event.price': number(50),
      'event.tags': '|'.join('abc'[: rng.integers(4)]) or None,
    }  # fmt: skip
  items = [dict(item=f'i{i:02d}', category=f'c{i % 4}', cost=number(9)) for i in range(40)]
  users = [dict(user=f'u{i:02d}', age=number(30), city=f'c{i % 3}') for i in range(25)]
  data = config.data(
    user_features=('age', 'city'),
    item_features=('category', 'cost'),
    context_features=('hour', 'price'),
    event_features=('kind', 'dwell', 'price', 'tags'),
    multi={'tags': '|'},
    numeric={'age': 'standard', 'cost': 'log', 'price': 'standard', 'dwell': 'log'},
    min_count=3,
    rows_per_part=rows_per_part,
    **fields,
  )
  columns = *data.context_features, *map(vocabulary.event_column, data.event_features)
  build(data, tables(rows, users, items, columns), notes or {}, folder / 'store')
  return Store(folder / 'store')


def store_of_labels(folder, rows_per_part=90, **fields):
  """A store of a file with two labels, the second one often missing, and a weight in each row."""
  rng = np.random.default_rng(2)
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / 'log.csv').open('w') as file:
    file.write('user,item,time,click,order,price,page\n')
    for k in range(403):
      click, order = rng.integers(2), rng.choice(['0', '1', '', 'NA'])
      price = rng.choice(['0', '0.1', '1', '2.5', '1e-9'])
      user, item, page = f'u{rng.integers(40)}', f'i{rng.integers(30)}', f'p{rng.integers(3)}'
      file.write(f'{user},{item},{k // 2},{click},{order},{price},{page}\n')
  source = dict(source=str(folder / 'log.csv'), name='log', rows_per_part=rows_per_part)
  source |= dict(labels=('click', 'order'), weight='price', context_features=('page',))
  return prepare.prepare(config.data(**source | fields), folder / 'stores')


def store_of_histories(folder, rows_per_part=90, users=20, **fields):
  """A store of a file of views, carts and orders, with a named history of all and one of orders."""
  rng = np.random.default_rng(5)
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / 'log.csv').open('w') as file:
    file.write('user,item,time,label,behaviour,dwell,genre\n')
    for k in range(420):
      kind, dwell = rng.choice(['view', 'view', 'view', 'cart', 'buy']), rng.integers(100)
      user, item, label = rng.integers(users), rng.integers(30), rng.integers(2)
      file.write(f'u{user},i{item},{k // 3},{label},{kind},{dwell},g{item % 4}\n')
  fields = fields_of_histories(folder) | dict(rows_per_part=rows_per_part) | fields
  return prepare.prepare(config.data(**fields), folder / 'stores')


def fields_of_histories(folder):
  """The fields of the data config of `store_of_histories`."""
  return dict(
    source=str(folder / 'log.csv'), name='log', behaviour='behaviour', history='all',
    event_features=('behaviour', 'dwell'), numeric={'dwell': 'log'}, item_features=('genre',),
    histories={'all': ('view', 'cart', 'buy'), 'orders': ('cart', 'buy')},
  )  # fmt: skip
