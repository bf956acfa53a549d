"""The counts of a store, as a line and as a table: what it has, and which rows were dropped."""

import functools
from collections.abc import Callable

from lmn_jax.data.splits import SPLITS
from lmn_jax.data.store import Store

SHOWN = 10  # words named in a line

# Notes that count dropped rows, and why these were dropped.
DROPPED = {
  'rows_without_user': 'without a user',
  'rows_without_item': 'without an item',
  'rows_skipped': 'with a bad value',
  'rows_unused': 'neither history nor example',
}

Lines = list[tuple[str, str]]


def line_of(store: Store) -> str:
  """The most important counts, in one line."""
  notes, counts = store.manifest['notes'], store.manifest['counts']
  rows = f'{notes["rows_read"]:,} rows read, ' if 'rows_read' in notes else ''
  dropped = sum(notes.get(name, 0) for name in DROPPED) + _duplicates(store)
  rows += f'{dropped:,} dropped, ' if dropped else ''
  examples = ', '.join(f'{split} {store.examples[split]:,}' for split in SPLITS)
  return (
    f'{rows}{_users(store):,} users, {store.vocabulary["item"] - 1:,} items, '
    f'{counts["events"]:,} events; examples: {examples}'
  )


def table_of(store: Store) -> str:
  """All counts, a line each, and the protocol; counts of dropped rows only if they are not zero."""
  lines = [*_of_rows(store), *_of_contents(store), *_of_unknowns(store)]
  if 'time' in store.manifest['notes']:
    clock = store.clock
    times = clock.expected().rstrip(',') if clock.timed else 'none: the order of the log'
    lines.append(('times', times))
  width = max(len(name) for name, _ in lines)
  return '\n'.join([*(f'{name:<{width}}  {text}' for name, text in lines), store.protocol])


def _of_rows(store: Store) -> Lines:
  """The rows of the log: read, dropped, kept, and all other notes of the reading."""
  notes, duplicates = store.manifest['notes'], _duplicates(store)
  lines = [('rows read', f'{notes["rows_read"]:,}')] if 'rows_read' in notes else []
  for name, reason in DROPPED.items():
    if notes.get(name):
      words = notes.get('missing_words', {}).get(name.removeprefix('rows_without_'), {})
      named = [f'{count:,} with {word!r}' for word, count in list(words.items())[:SHOWN]]
      lines.append((f'dropped, {reason}', ', '.join([f'{notes[name]:,}', *named])))
  if duplicates:
    lines.append(('dropped, duplicates', f'{duplicates:,}'))
  if 'rows' in notes:
    lines.append(('rows kept', f'{notes["rows"]:,}'))
  shown = {'rows_read', 'rows', 'users_of_row_histories', *DROPPED}
  shown |= {'duplicate_rows'} if duplicates else set()
  for name, note in notes.items():
    if name not in shown and type(note) is int and note:
      lines.append((name.replace('_', ' '), f'{note:,}'))
  return lines


def _of_contents(store: Store) -> Lines:
  """The users, items, events and examples of a store."""
  notes, counts = store.manifest['notes'], store.manifest['counts']
  users, items = (f'{store.vocabulary[kind] - 1:,} in the vocabulary' for kind in ('user', 'item'))
  lines = [('users', f'{_users(store):,}, {users}')]
  if counts['users_without_history']:
    records = 'row histories' if 'row_histories' in notes else 'users'
    lines.append((f'{records} without an event', f'{counts["users_without_history"]:,}'))
  lines += [('items', items), ('events', f'{counts["events"]:,}')]
  if store.cold_items:
    lines.append(('cold items', f'{store.cold_items:,} with features or vectors alone'))
  for name, behaviours in store.histories.items():
    events = sum(len(part.events(name)['item']) for part in store.parts)
    lines.append((f'events of the history {name}', f'{events:,}, {", ".join(behaviours)}'))
  for key, entry in store.manifest.get('vectors', {}).items():
    lacking, unused = (f'{entry[name]:,}' for name in ('missing', 'unused'))
    text = f'of {entry["width"]:,} numbers; {lacking} ids without one, {unused} of other ids'
    lines.append((f'vectors {key}', text))
  if counts['cut_events']:
    lines.append(('older events cut off', f'{counts["cut_events"]:,}'))
  for split in SPLITS:
    clicks = f', {counts["clicks"][split]:,} clicks' if 'clicks' in counts else ''
    lines.append((f'examples, {split}', f'{counts["examples"][split]:,}{clicks}'))
  for name, of_label in counts.get('labels', {}).items():
    for split in SPLITS:
      clicks = f', {of_label["clicks"][split]:,} clicks' if 'clicks' in of_label else ''
      lines.append((f'label {name}, {split}', f'{of_label["labelled"][split]:,} labelled{clicks}'))
    if 'mean' in of_label:
      text = f'{of_label["mean"]:.6g}, deviation {of_label["deviation"]:.6g}'
      lines.append((f'label {name}, mean of training', text))
  if counts['negatives']:
    lines.append(('negatives sampled', f'{counts["negatives"]:,}'))
  if counts.get('examples_left_out'):
    text = f'{counts["examples_left_out"]:,} rows are no examples'
    lines.append(('no other item of their kind', text))
  return lines


def _of_unknowns(store: Store) -> Lines:
  """The examples of validation and test with unknown users, items or values of features."""
  lines = [
    (f'unknown {kind}, {split}', _share(store, lambda part, k=kind: part[f'unknown_{k}'], split))
    for kind in ('users', 'items')
    for split in SPLITS[1:]
  ]
  if store.cold_items:
    share = functools.partial(_share, store, lambda part: part['cold_items'])
    lines += [(f'cold items, {split}', share(split)) for split in SPLITS]
  if 'unknown_features' not in store.manifest['parts'][0]:  # a store of an earlier version
    return lines
  return lines + [
    (
      f'{key} unknown or missing, {split}',
      _share(store, lambda part, k=key: part['unknown_features'][k], split),
    )
    for key in (*store.fields('user'), *store.fields('context'))
    for split in SPLITS[1:]
  ]


def _users(store: Store) -> int:
  """The number of users; with `row_history` a user may have several records."""
  return store.manifest['notes'].get('users_of_row_histories', store.manifest['counts']['users'])


def _duplicates(store: Store) -> int:
  """The number of rows that were dropped as duplicates; 0 where duplicates are kept."""
  fields = store.manifest['signature'].get('config.data', {})
  dropped = fields.get('duplicates') == 'drop'
  return store.manifest['notes'].get('duplicate_rows', 0) if dropped else 0


def _share(store: Store, counts_of: Callable[[dict], dict[str, int]], split: str) -> str:
  """A count of a split and its share of the logged examples. counts_of: of a part's entry."""
  parts = store.manifest['parts']
  count = sum(counts_of(part)[split] for part in parts)
  logged = sum(part['logged'][split] for part in parts)
  return f'{count:,} of {logged:,} examples ({count / max(1, logged):.1%})'
