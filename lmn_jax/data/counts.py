"""What went into a store and what did not, as a line and as a table."""

from lmn_jax.data.splits import SPLITS
from lmn_jax.data.store import Store

SHOWN = 10  # words named in a line

# Notes of the reading that are rows which were left out, and why.
DROPPED = {
  'rows_without_user': 'without a user',
  'rows_without_item': 'without an item',
  'rows_skipped': 'with a bad value',
  'rows_unused': 'neither history nor example',
}


def line_of(store: Store) -> str:
  """The counts that matter most, in one line."""
  notes, counts = store.manifest['notes'], store.manifest['counts']
  rows = f'{notes["rows_read"]:,} rows read, ' if 'rows_read' in notes else ''
  left = sum(notes.get(name, 0) for name in DROPPED) + _doubles(store)
  rows += f'{left:,} dropped, ' if left else ''
  examples = ', '.join(f'{split} {store.examples[split]:,}' for split in SPLITS)
  return (
    f'{rows}{_users(store):,} users, {store.vocabulary["item"] - 1:,} items, '
    f'{counts["events"]:,} events; examples: {examples}'
  )


def table_of(store: Store) -> str:
  """All counts that are known, a line each; of rows that were dropped where there are any."""
  notes, counts = store.manifest['notes'], store.manifest['counts']
  lines: list[tuple[str, str]] = []

  def say(name, *values):
    lines.append((name, ', '.join(values)))

  if 'rows_read' in notes:
    say('rows read', f'{notes["rows_read"]:,}')
  for name, why in DROPPED.items():
    if notes.get(name):
      words = notes.get('missing_words', {}).get(name.removeprefix('rows_without_'), {})
      named = [f'{count:,} with {word!r}' for word, count in list(words.items())[:SHOWN]]
      say(f'dropped, {why}', f'{notes[name]:,}', *named)
  if _doubles(store):
    say('dropped, duplicates', f'{_doubles(store):,}')
  if 'rows' in notes:
    say('rows kept', f'{notes["rows"]:,}')
  said = {
    'rows_read',
    'rows',
    'users_of_row_histories',
    'duplicate_rows' if _doubles(store) else '',
    *DROPPED,
  }
  for name, note in notes.items():
    if name not in said and type(note) is int and note:
      say(name.replace('_', ' '), f'{note:,}')
  known = {kind: f'{store.vocabulary[kind] - 1:,} in the vocabulary' for kind in ('user', 'item')}
  say('users', f'{_users(store):,}', known['user'])
  if counts['users_without_history']:
    empty = 'row histories' if 'row_histories' in notes else 'users'
    say(f'{empty} without an event', f'{counts["users_without_history"]:,}')
  say('items', known['item'])
  say('events', f'{counts["events"]:,}')
  if counts['cut_events']:
    say('older events cut off', f'{counts["cut_events"]:,}')
  for split in SPLITS:
    clicks = f'{counts["clicks"][split]:,} clicks'
    say(f'examples, {split}', f'{counts["examples"][split]:,}', clicks)
  if counts['negatives']:
    say('negatives sampled', f'{counts["negatives"]:,}')
  if counts.get('examples_left_out'):
    say('no other item of their kind', f'{counts["examples_left_out"]:,} rows are no examples')
  for kind in ('users', 'items'):
    for split in SPLITS[1:]:
      say(f'unknown {kind}, {split}', _of(store, lambda p, kind=kind: p[f'unknown_{kind}'], split))
  for key in (*store.features['user'], *store.features['context']):
    for split in SPLITS[1:] if 'unknown_features' in store.manifest['parts'][0] else ():
      found = _of(store, lambda p, key=key: p['unknown_features'][key], split)
      say(f'{key} unknown or missing, {split}', found)
  if 'time' in notes:
    say(
      'times',
      store.clock.expected().rstrip(',') if store.clock.timed else 'none: the order of the log',
    )
  width = max(len(name) for name, _ in lines)
  return '\n'.join([*(f'{name:<{width}}  {said}' for name, said in lines), store.protocol])


def _users(store):
  """How many users there are; with `row_history` each may have several records."""
  return store.manifest['notes'].get('users_of_row_histories', store.manifest['counts']['users'])


def _doubles(store):
  """Rows that were left out as duplicates: none where they are kept."""
  fields = store.manifest['signature'].get('config.data', {})
  dropped = fields.get('duplicates') == 'drop'
  return store.manifest['notes'].get('duplicate_rows', 0) if dropped else 0


def _of(store, counts_of, split):
  """How many of a split's logged examples, and their share. counts_of: a part's entry -> counts."""
  parts = store.manifest['parts']
  found = sum(counts_of(part)[split] for part in parts)
  logged = sum(part['logged'][split] for part in parts)
  return f'{found:,} of {logged:,} examples ({found / max(1, logged):.1%})'
