"""An exported model, loaded and asked with JAX and numpy alone: no code of the model is needed.

Copies of this file and of those that it imports (segment_states.py, texts.py) lie in every exported
folder:

    from bundle import Bundle                     # with the folder on sys.path
    model = Bundle('runs/lmn_douyin/export')
    model.score([model.ask('user 7', ['item 1', 'item 2'])])

    manifest.json            what it is: task, model, dims, functions, tables, features, metrics
    functions/<name>.jax     of jax.export, any number of users and candidates, for CPU, GPU and TPU
    dense.npz                dense parameters and statistics, by path
    tables/<name>.npy        rows [V, D]: float32, bfloat16 as its bits in uint16, or int8 with
    tables/<name>.scale.npy  the scale of each row, float32 [V]
    vocabulary/<name>/       raw ids by row, and the rows by hash: see Ids
    items/<feature>.npy      codes of the items, [V + 1] or [V + 1, M], the last for the padding
    users/                   of all users of the log: raw ids, embedding rows, features, the events
                             that the model reads (history, event_time), and the items of those
                             before, each once a user (met); offset and met_offset: where they begin
    seal.json                size and CRC-32 of every file

Large arrays are memory-mapped: a folder of any size opens at once, several processes share one copy
in memory, and on CPU JAX reads the rows where they lie in the map. Reading jax.export's functions
takes the package flatbuffers, which is plain Python.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.export
import numpy as np

if __package__:
  from lmn_jax.data import texts
  from lmn_jax.inference.segment_states import UserStates, all_steps, take_in
else:  # in an exported folder
  import texts
  from segment_states import UserStates, all_steps, take_in

FORMAT = 1  # raised when the folder's layout or the meaning of a file changes
# Histories of models that take any length are padded to a multiple of this.
LENGTH_MULTIPLE = 64
REMEMBERED = 2**17  # raw ids of a vocabulary that a process keeps by row, and rows by raw id


log = logging.getLogger(__name__)


class RequestError(ValueError):
  """What is asked cannot be answered; the message is a line for who asked."""


class FolderError(ValueError):
  """The folder is no export, or not the one that was written; the message is a line."""


@runtime_checkable
class Values(Protocol):
  """Who holds the rows of a table elsewhere."""

  def __call__(self, ids_TK: np.ndarray, weights_TK: np.ndarray) -> tuple[np.ndarray, bool]:
    """Sums float32 [T, D] of rows with weights, and whether some rows were out of reach."""
    ...

  def lost(self) -> list[str]:
    """Names of those who are out of reach now."""
    ...


class Ids:
  """Raw ids by row and rows by raw id, memory-mapped.

  text.bin holds the ids one after the other in UTF-8, offsets.npy int64 [V + 1] where each begins.
  hashes.npy uint64 [V], ascending, are those of `hash_of`, order.npy int32 [V] their rows.
  """

  def __init__(self, folder: Path):
    self._text = _mapped(folder / 'text.bin')
    self._offsets = np.load(folder / 'offsets.npy', mmap_mode='r')
    self._hashes = np.load(folder / 'hashes.npy', mmap_mode='r')
    self._order = np.load(folder / 'order.npy', mmap_mode='r')
    # Of the first ids that are asked for: a history is looked up in microseconds.
    self._row_of: dict[str, int] = {}
    self._raw_of: dict[int, str] = {}

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def raw(self, row: int) -> str:
    """The raw id of a row."""
    found = self._raw_of.get(row)
    if found is None:
      found = self._bytes(row).decode('utf-8')
      if len(self._raw_of) < REMEMBERED:
        self._raw_of[row] = found
    return found

  def _bytes(self, row):
    begin, end = self._offsets[row : row + 2]
    return self._text[begin:end].tobytes()

  def find(self, raw: Sequence[str]) -> np.ndarray:
    """Rows of raw ids: int32 [N], -1 for an id that is not among them."""
    known = self._row_of.get
    found = [known(one) for one in raw]
    if None in found:
      found = [self._find(one) if row is None else row for one, row in zip(raw, found, strict=True)]
    return np.array(found, np.int32)

  def _find(self, raw):
    text = raw.encode('utf-8', 'surrogatepass')
    wanted = np.uint64(hash_of(text))
    at = int(np.searchsorted(self._hashes, wanted))
    while at < len(self._hashes) and self._hashes[at] == wanted:  # ids may share a hash
      row = int(self._order[at])
      if self._bytes(row) == text:
        if len(self._row_of) < REMEMBERED:
          self._row_of[raw] = row
        return row
      at += 1
    return -1


def hash_of(text: bytes) -> int:
  """The first 8 bytes of BLAKE2b."""
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), 'little')


def _mapped(path):
  """A file's bytes; none can be mapped of an empty one."""
  return np.memmap(path, np.uint8, 'r') if path.stat().st_size else np.zeros(0, np.uint8)


class Asked(NamedTuple):
  """A request in rows. C candidates, none where all items are asked; E events known.

  user: embedding row. item int32 [C], of next-item models V where the candidate is unknown.
  history: item rows, oldest first. features: codes by name of context and profile, () or (M,).
  state: of a next-item model. user_known: whether training saw the user. unknown: candidates
  that it did not see. events: E. met: where all items are asked, rows of those that the user has
  met: of the log and of the history. unknown_features: those given with a value that training did
  not see.
  """

  user: int
  item: np.ndarray
  history: np.ndarray
  features: dict[str, np.ndarray]
  state: UserStates | None
  user_known: bool
  unknown: list[str]
  events: int
  met: np.ndarray
  unknown_features: list[str]


class Scores(NamedTuple):
  """values: float32 [C]. degraded: whether some rows were out of reach (see Bundle)."""

  values: np.ndarray
  degraded: bool


class Bundle:
  """An exported model.

  Every array that is asked with has one of a few shapes, so that a few programs are compiled, all
  of them by `warm`. Safe for many threads.

  Attributes:
    folder, manifest: where it lies, and what it says of itself.
    task: 'click' or 'next_item'. model: its name. fingerprint: of weights and vocabulary.
    length: L, the newest events that a click model reads, or T, events of a segment.
    items: how many items there are. whole: whether a next-item model carries the whole past.
    exclude_seen: whether what a user has met is not recommended, where a request does not say.
    candidate_sizes: of the compiled programs, ascending.
  """

  def __init__(
    self,
    folder: str | Path,
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    candidate_sizes: Sequence[int] = (64, 256, 1024),
    values: Values | None = None,
    check: bool = False,
  ):
    """Opens a folder, without reading the large files.

    Args:
      folder: of the export. batch_sizes: users asked together; requests are cut in pieces of these
        sizes. candidate_sizes: of each user; what is asked is filled up to one of them, and cut
        where it is more.
      values: who holds the rows of the table with weighted sums (LMN's memory), if not this
        process; a model without such a table has no use for it.
      check: read every file and compare its CRC-32; sizes always are.

    Raises:
      FolderError: no export, of another format, or spoilt.
    """
    self.folder = Path(folder)
    self.manifest = read_manifest(self.folder, check)
    self.task, self.model = self.manifest['task'], self.manifest['model']
    self.fingerprint: str = self.manifest['fingerprint']
    self.length: int = self.manifest['length']
    self.whole: bool = self.manifest['whole']
    self.exclude_seen: bool = self.manifest['config']['exclude_seen']
    # Exports from before texts.py have ids that it did not read, and take texts as they are.
    words = self.manifest.get('missing')
    self._missing = None if words is None else texts.words(words)
    self._V: dict[str, int] = self.manifest['vocabulary']
    self.items = self._V['item'] - 1
    self._batch_sizes, self.candidate_sizes = sorted(batch_sizes), sorted(candidate_sizes)
    self._lengths = self._history_lengths()
    self._values = values if self.manifest['pooled'] else None
    self._open()

  def _open(self):
    folder = self.folder
    self._ids = {name: Ids(folder / 'vocabulary' / name) for name in ('user', *self._V)}
    self._items = {f: self._load(f'items/{f}.npy') for f in self._features('item')}
    names = ['row', 'offset', 'history', *self._features('user')]
    if (folder / 'users/met.npy').exists():
      names += ['event_time', 'met', 'met_offset']
    else:
      names += ['time']  # of the newest event of each user
      log.warning(
        '%s: an export of an earlier version, which holds the newest %d events of a user alone: '
        'items met before are recommended; export again', folder, self.length,
      )  # fmt: skip
    self._users = {name: self._load(f'users/{name}.npy') for name in names}
    with np.load(folder / 'dense.npz') as dense:
      self._dense = jax.device_put(dict(dense))
    self._tables = {}
    for name, table in self.manifest['tables'].items():
      if name != self.manifest['pooled'] or self._values is None:
        # Where JAX runs on CPU this is the map itself.
        self._tables[name] = {
          part: jax.device_put(self._load(file)) for part, file in table['files'].items()
        }
    wanted = set(self.manifest['functions'])
    if self.manifest['pooled']:
      wanted -= {'score'} if self._values else {'ask', 'finish'}
    self._functions = {
      name: jax.jit(jax.export.deserialize((folder / f'functions/{name}.jax').read_bytes()).call)
      for name in wanted
    }

  def _load(self, name):
    """An array, mapped; an empty one has nothing to map."""
    path = self.folder / name
    array = np.load(path, mmap_mode='r')
    return array if array.size else np.array(array)

  def _features(self, kind):
    return [key for key, feature in self.manifest['features'].items() if feature['kind'] == kind]

  def _history_lengths(self):
    """Lengths that histories are padded to: two, where the model takes any."""
    L = self.length
    if not self.manifest['any_length']:
      return [L]
    sizes = {-(-size // LENGTH_MULTIPLE) * LENGTH_MULTIPLE for size in (L, L // 4) if size}
    return sorted(sizes)

  def lost(self) -> list[str]:
    """Names of those who hold rows elsewhere and are out of reach now."""
    return self._values.lost() if self._values else []

  def ids(self, name: str) -> Ids:
    """The raw ids of 'item', of a feature, or of 'user': of all users of the log."""
    return self._ids[name]

  def id(self, raw: Any) -> str:
    """An id as the log has it: ' 8', 8 and 8.0 are '8'; '' is none.

    Raises:
      RequestError: neither a text nor a number.
    """
    try:
      return texts.text_of(raw) if self._missing is None else texts.value(raw, self._missing)
    except ValueError as error:
      raise RequestError(f'{raw!r:.80}: {error}') from None

  # What is known of users.

  def history_offsets(self) -> np.ndarray:
    """Where the events of each user begin, int64 [U + 1], in the order of `ids('user')`."""
    return self._users['offset']

  def known_history(self, user: Any) -> list[str]:
    """Raw ids of the events of a user that the export holds, oldest first; [] of one unknown."""
    (record,) = self._ids['user'].find([self.id(user)])
    return [] if record < 0 else [self._raw_item(row) for row in self._history(record).tolist()]

  def known_times(self, user: Any) -> list[int | None]:
    """Times of these events, as the store has them.

    None where the log had no times; exports of earlier versions know that of the newest alone.
    """
    (record,) = self._ids['user'].find([self.id(user)])
    if record < 0:
      return []
    begin, end = (int(x) for x in self._users['offset'][record : record + 2])
    if not self.manifest['timed']:
      return [None] * (end - begin)
    if 'event_time' in self._users:
      return self._users['event_time'][begin:end].tolist()
    return [None] * (end - begin - 1) + [int(self._users['time'][record])] * (end > begin)

  def time_span(self) -> tuple[int, int]:
    """The least and the greatest of these times; (0, 0) where there are none."""
    if 'event_time' in self._users:
      times = self._users['event_time']
    else:
      times = self._users['time'][np.diff(self._users['offset']) > 0]
    return (int(times.min()), int(times.max())) if len(times) else (0, 0)

  def _met(self, record, history):
    """Rows of the items that a user of the log has met, and those of the history."""
    found = [history]
    if record >= 0:
      found += [self._history(record)]
      if 'met' in self._users:
        begin, end = self._users['met_offset'][record : record + 2]
        found += [self._users['met'][begin:end]]
    return np.unique(np.concatenate(found))

  def _history(self, record):
    begin, end = self._users['offset'][record : record + 2]
    return self._users['history'][begin:end]

  def _raw_item(self, row):
    # Row 0 is any item that training did not see: no raw id is one of them.
    return self._ids['item'].raw(row) if row else ''

  def _item_rows(self, raw, unknown):
    rows = self._ids['item'].find([self.id(one) for one in raw])
    # Row 0 has an empty text, and no item is called so.
    return np.where(rows > 0, rows, np.int32(unknown))

  def ask(
    self,
    user: Any,
    candidates: Sequence | np.ndarray | None,
    history: Sequence | np.ndarray = (),
    context: Mapping[str, Any] | None = None,
    profile: Mapping[str, Any] | None = None,
    state: UserStates | None = None,
  ) -> Asked:
    """A request in raw ids, as rows.

    An unknown user is the unknown user, with unknown features; an unknown event, or value of a
    feature, is the unknown one; so is a candidate of a click model, where a next-item model has no
    score. Ids and values are texts or numbers, and are read as the log was (texts.py).

    Args:
      user: raw id. candidates: raw ids; None asks for all items. history: raw ids, oldest first.
      context, profile: raw values by name of the feature, of one with several values also a
        sequence; what is not given is the export's own (profile) or unknown. state: of a next-item
        model, instead of the history.

    Raises:
      RequestError: a feature that the model does not have, or a value that cannot be one.
    """
    record, row = self._user(user)
    features = self._profile(record) | {f: self._unknown(f) for f in self._features('context')}
    given = self._given('user', profile or {}) | self._given('context', context or {})
    features |= {key: codes for key, (codes, _) in given.items()}
    asked = [] if candidates is None else list(candidates)
    item = self._item_rows(asked, self._V['item'] if self.task == 'next_item' else 0)
    seen = item if self.task == 'click' else np.where(item < self._V['item'], item, 0)
    unknown = [str(raw) for raw, at in zip(asked, seen, strict=True) if at == 0]
    rows = self._item_rows(history[-self.length :], 0) if self.task == 'click' else item[:0]
    if self.task == 'next_item':
      state = self.state(user, history) if state is None else state._replace(row=_one(row))
      events = int(state.segments[0]) * self.length + int(state.held[0])
    else:
      events = len(rows)
    met = item[:0] if candidates is not None else self._met(record, self._item_rows(history, 0))
    new = [key.partition('.')[2] for key, (_, known) in given.items() if not known]
    return Asked(row, item, rows, features, state, row > 0, unknown, events, met, new)

  def _user(self, user):
    """A user's place among those of the export, -1 for none, and the row of his embedding."""
    (record,) = self._ids['user'].find([self.id(user)])
    return record, 0 if record < 0 else int(self._users['row'][record])

  def _profile(self, record):
    if record < 0:
      return {f: self._unknown(f) for f in self._features('user')}
    return {f: np.asarray(self._users[f][record]) for f in self._features('user')}

  def _unknown(self, key):
    return self._codes(key, [])[0]

  def _given(self, kind, values):
    names = {self.manifest['features'][key]['name']: key for key in self._features(kind)}
    for name in values:
      if name not in names:
        known = ', '.join(names) or 'none'
        raise RequestError(f'{kind} feature {name!r} is none of the model, which has: {known}')
    return {names[name]: self._read(names[name], raw) for name, raw in values.items()}

  def code(self, key: str, raw: Any) -> np.ndarray:
    """The codes of a raw value of a feature: int32 () or, of one with several values, [M].

    Args:
      key: such as 'context.query'. raw: a text or a number; several tokens with the feature's
        separator, or in a sequence.

    Raises:
      RequestError: no number for a feature that is cut in bins, more tokens than training saw.
    """
    return self._read(key, raw)[0]

  def _read(self, key, raw):
    """The codes of a raw value, and whether training saw all of it."""
    feature = self.manifest['features'][key]
    separator = feature['separator']
    if feature['edges'] is not None:
      tokens = self._bin(key, self.id(raw), feature['edges'])
    elif separator and self._missing is None:
      tokens = [token for token in texts.text_of(raw).split(separator) if token]
    elif separator:
      try:
        tokens = texts.tokens(raw, separator, self._missing)
      except ValueError as error:
        raise RequestError(f'{key}: {error}') from None
    else:
      tokens = [value] if (value := self.id(raw)) else []
    return self._codes(key, tokens)

  def _bin(self, key, text, edges):
    """The token of a number: how many edges are below it."""
    if not text:
      return []
    try:
      value = float(text)
    except ValueError:
      raise RequestError(f'{key}={text!r} is not a number') from None
    below = sum(edge < value for edge in edges)
    return [] if value != value else [str(below).zfill(len(str(len(edges))))]

  def _codes(self, key, tokens):
    """Codes of tokens, filled up, and whether training saw all of them."""
    width = self.manifest['features'][key]['width']
    if width and len(tokens) > width:
      raise RequestError(f'{key} has {len(tokens)} values; at most {width} are known to the model')
    codes = np.maximum(self._ids[key].find(tokens), 0) if tokens else np.zeros(1, np.int32)
    known = not tokens or bool((codes > 0).all())
    if not width:
      return codes[0, ...], known  # an array still
    padded = np.concatenate([codes, np.full(width - len(codes), self._V[key], np.int32)])
    return padded, known

  # Scores.

  def score(self, asked: Sequence[Asked]) -> list[Scores]:
    """Scores of each one's candidates: log-odds of a click, or products with a user's vector.

    A next-item model scores 0 for a user without events, and NaN for an unknown candidate.
    """
    return all_steps(self.scoring(asked))

  def scoring(self, asked: Sequence[Asked]) -> Generator[None, None, list[Scores]]:
    """`score` in steps of the candidates of a compiled program."""
    found = [np.zeros(len(one.item), np.float32) for one in asked]
    degraded = [False] * len(asked)
    most = self.candidate_sizes[-1]
    for own in _cut(range(len(asked)), self._batch_sizes):
      some = [asked[n] for n in own]
      vectors = self._vectors(some) if self.task == 'next_item' else None
      for begin in range(0, max((len(one.item) for one in some), default=0), most):
        pieces = [one.item[begin : begin + most] for one in some]
        values, partly = self._score_piece(some, pieces, vectors)
        for n, row, piece in zip(own, values[: len(own)], pieces, strict=True):
          found[n][begin : begin + len(piece)] = row[: len(piece)]
          degraded[n] |= partly
        yield
    if self.task == 'next_item':
      for values, one in zip(found, asked, strict=True):
        values[:] = np.where(one.item < self._V['item'], values if one.events else 0, np.nan)
    return [Scores(*pair) for pair in zip(found, degraded, strict=True)]

  def _score_piece(self, some, pieces, vectors):
    B = _least(self._batch_sizes, len(some))
    C = _least(self.candidate_sizes, max(map(len, pieces)))
    item_BC = _filled(pieces, (B, C), self._V['item'])
    if vectors is not None:
      return self._run('rate', self._tables, vectors, item_BC), False
    batch = self._click_batch(some, item_BC)
    if self._values is None:
      return self._run('score', self._dense, self._tables, batch), False
    ids_TK, weights_TK = self._run('ask', self._dense, self._tables, batch)
    sums_TD, partly = self._values(ids_TK, weights_TK)
    return self._run('finish', self._dense, self._tables, batch, sums_TD), partly

  def _run(self, name, *arguments):
    return jax.tree.map(np.asarray, self._functions[name](*arguments))

  def _click_batch(self, some, item_BC):
    B, V = len(item_BC), self._V['item']
    L = _least(self._lengths, max((len(one.history) for one in some), default=0))
    history_BL = _filled([one.history for one in some], (B, L), V)
    batch = {
      'user': _filled([one.user for one in some], (B,), 0),
      'item': item_BC,
      'history': history_BL,
      'length': _filled([len(one.history) for one in some], (B,), 0),
    }
    for key, codes in self._items.items():
      batch[key] = codes.take(item_BC, axis=0)
      batch[key.replace('item.', 'history.', 1)] = codes.take(history_BL, axis=0)
    for key in (*self._features('user'), *self._features('context')):
      codes = np.stack([one.features[key] for one in some])
      batch[key] = _filled(codes, (B, *codes.shape[1:]), 0)
    return batch

  # Users of a next-item model.

  def state(self, user: str, history: Sequence[str] = ()) -> UserStates:
    """The state of a user with these events, oldest first, and none before them."""
    _, row = self._user(user)
    none, T = np.zeros(1, np.int64), self.length
    carry = [np.zeros((1, *shape), dtype) for shape, dtype in self.manifest['carry']]
    recent_1T = np.full((1, T), self._V['item'], np.int32)
    empty = UserStates(_one(row), none, none.copy(), recent_1T, carry)
    return self.updated(empty, history)

  def updated(self, state: UserStates, events: Sequence[str]) -> UserStates:
    """The state after new events, oldest first: costs what these cost, however long the past."""
    return all_steps(self.updating(state, events))

  def updating(self, state: UserStates, events: Sequence[str]) -> Generator[None, None, UserStates]:
    """`updated` in steps of a segment."""
    rows = self._item_rows(events, 0)
    return take_in(state, [rows], self._fold if self.whole else None)

  def folded(self, state: UserStates) -> tuple[UserStates, int]:
    """A user's state without the events after its last full segment, and how many these are."""
    V, none = self._V['item'], np.zeros_like(state.held)
    empty = state._replace(held=none, recent=np.full_like(state.recent, V))
    return empty, int(state.held[0])

  def _fold(self, states, users):
    batch, carry = self._segment(states, users)
    kept = self._run('fold', self._dense, self._tables, batch, carry)
    for old, new in zip(states.carry, kept, strict=True):
      old[users] = new[: len(users)]
    states.segments[users] += 1
    states.held[users], states.recent[users] = 0, self._V['item']

  def _segment(self, states, users):
    B = _least(self._batch_sizes, len(users))
    batch = {
      'item': _filled(states.recent[users], (B, self.length), self._V['item']),
      'first': _filled(states.segments[users] == 0, (B,), False),
      'user': _filled(states.row[users], (B,), 0),
    }
    return batch, [_filled(x[users], (B, *x.shape[1:]), 0) for x in states.carry]

  def _vectors(self, some):
    """[B, D] of users, each after his newest event."""
    columns = [jax.tree.leaves(one.state) for one in some]
    joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
    states = UserStates(*joined[:4], joined[4:])
    batch, carry = self._segment(states, np.arange(len(some)))
    last = np.maximum(states.held - 1, 0).astype(np.int32)
    batch['asked'] = _filled(last[:, None], (len(batch['user']), 1), 0)
    return self._run('vector', self._dense, self._tables, batch, carry)

  def pack(self, state: UserStates) -> bytes:
    """A user's state as bytes, for `unpack` of the same export."""
    return b''.join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(state))

  def unpack(self, packed: bytes) -> UserStates:
    """The state of `pack`.

    Raises:
      RequestError: bytes of another size than a state has.
    """
    like = self.state('')
    leaves, begin = [], 0
    if len(packed) != sum(x.nbytes for x in jax.tree.leaves(like)):
      raise RequestError(f'a state of {len(packed)} bytes is none of this export')
    for x in jax.tree.leaves(like):
      leaves.append(np.frombuffer(packed, x.dtype, x.size, begin).reshape(x.shape))
      begin += x.nbytes
    return UserStates(*leaves[:4], leaves[4:])

  # The best of all items.

  def recommend(
    self,
    asked: Sequence[Asked],
    k: Sequence[int],
    exclude: Sequence[Sequence[str]],
    exclude_seen: bool | None = None,
  ) -> list[tuple[list[tuple[str, float]], bool]]:
    """The best items of the whole catalogue for each, best first, but those excluded.

    Items go through in blocks; no array of all their scores is made. Among equal scores the item
    of the lower row is first.

    Args:
      asked: without candidates. k: how many for each. exclude: raw ids that are no candidates.
      exclude_seen: whether items that the user has met are none, either; None: as the model's
        config says.

    Returns:
      (raw id, score) pairs for each, fewer than k where there are fewer items, and whether some
      rows were out of reach.
    """
    every = zip(asked, k, exclude, strict=True)
    return [all_steps(self.recommending(*one, exclude_seen)) for one in every]

  def recommending(
    self, asked: Asked, k: int, exclude: Sequence[str], exclude_seen: bool | None = None
  ) -> Generator[None, None, tuple[list[tuple[str, float]], bool]]:
    """`recommend` for one, in steps of a block of items."""
    barred = self._item_rows(list(exclude), 0)
    if self.exclude_seen if exclude_seen is None else exclude_seen:
      barred = np.concatenate([barred, asked.met])
    barred = np.unique(barred)
    rows, values, degraded = np.zeros(0, np.int64), np.zeros(0, np.float32), False
    for block_rows, block_values, partly in self._blocks(asked):
      fine = ~np.isin(block_rows, barred) & (block_rows > 0)
      rows = np.concatenate([rows, block_rows[fine]])
      values = np.concatenate([values, block_values[fine]])
      rows, values = _best(rows, values, k)
      degraded |= partly
      yield
    return list(zip(map(self._raw_item, rows.tolist()), values.tolist(), strict=True)), degraded

  def _blocks(self, one):
    """Rows and scores of all items, a block at a time."""
    V = self._V['item']
    if self.task == 'click':
      size = self.candidate_sizes[-1]
      for begin in range(1, V, size):
        rows = np.arange(begin, min(begin + size, V), dtype=np.int32)
        (values,), partly = self._score_piece([one], [rows], None)
        yield rows, values[: len(rows)], partly
      return
    vector_BD, size = self._vectors([one]), self.manifest['block']
    for begin in range(0, V, size):
      at = min(begin, V - size)  # the last one reaches back into the one before
      values = self._run('block', self._tables, vector_BD, np.int32(at))[0]
      rows = np.arange(at, at + size)
      new = rows >= begin
      yield rows[new], values[new] if one.events else np.zeros(new.sum(), np.float32), False

  # Programs.

  def warm(self) -> None:
    """Compiles every program there is to be."""
    for run in self._shapes():
      run()

  def _shapes(self):
    V = self._V['item']
    for B in self._batch_sizes:
      if self.task == 'next_item':
        asked = [self.ask('', None, [''] * (self.length if self.whole else 1))] * B
        states = jax.tree.map(lambda *x: np.concatenate(x), *[one.state for one in asked])
        yield lambda asked=asked: self._vectors(asked)
        if self.whole:
          yield lambda states=states: self._fold(states, np.arange(len(states.held)))
        vector_BD = self._vectors(asked)
        for C in self.candidate_sizes:
          items = [np.full(C, V, np.int32)] * B
          yield lambda asked=asked, items=items, v=vector_BD: self._score_piece(asked, items, v)
        if B == self._batch_sizes[0]:
          yield lambda v=vector_BD: self._run('block', self._tables, v, np.int32(0))
        continue
      for L in self._lengths:
        asked = [self.ask('', None)._replace(history=np.zeros(L, np.int32))] * B
        for C in self.candidate_sizes:
          items = [np.full(C, V, np.int32)] * B
          yield lambda asked=asked, items=items: self._score_piece(asked, items, None)

  def compiled(self) -> int:
    """How many programs were compiled; after `warm` it grows no more."""
    return sum(function._cache_size() for function in self._functions.values())


def read_manifest(folder: Path, check: bool = False) -> dict:
  """What a folder says of itself, when all its files are there.

  Args:
    folder: of the export. check: whether to compare contents, too (CRC-32).

  Raises:
    FolderError: no export, of another format, or spoilt.
  """
  try:
    manifest = json.loads((folder / 'manifest.json').read_text())
    sealed = json.loads((folder / 'seal.json').read_text())
    found = manifest['format']
  except FileNotFoundError as error:
    raise FolderError(f'{folder}: no export ({error.filename} is missing)') from None
  except (ValueError, KeyError, TypeError) as error:
    raise FolderError(f'{folder}: manifest.json or seal.json is damaged ({error})') from None
  if found != FORMAT:
    raise FolderError(f'{folder}: export of format {found}, this program reads {FORMAT}')
  for name, (size, crc) in sealed.items():
    path = folder / name
    now = path.stat().st_size if path.is_file() else None
    if now != size:
      state = 'is missing' if now is None else f'has {now} bytes and had {size}'
      raise FolderError(f'{path} {state}; export again')
    if check and zlib.crc32(_mapped(path)) != crc:
      raise FolderError(f'{path} is not what was written (CRC-32); export again')
  return manifest


def _one(row):
  return np.array([row], np.int32)


def _best(rows, values, k):
  """The k best, best first; of equal ones the lower rows."""
  below = np.where(np.isnan(values), np.inf, -values)  # as they are sorted, and NaN last
  if len(below) > k:
    own = below <= np.partition(below, k - 1)[k - 1]
    rows, values, below = rows[own], values[own], below[own]
  order = np.lexsort((rows, below))[:k]
  return rows[order], values[order]


def _cut(numbers, sizes):
  """Pieces of these sizes, the largest that fits first: what is left fills up the least of them."""
  while len(numbers):
    size = max((size for size in sizes if size <= len(numbers)), default=len(numbers))
    yield numbers[:size]
    numbers = numbers[size:]


def _least(sizes, n):
  """The least of the sizes that holds n."""
  return next(size for size in sizes if size >= n)


def _filled(rows, shape, fill):
  """Rows, which may be shorter than the shape, and fewer, in an array filled up."""
  first = np.asarray(rows[0])
  array = np.full(shape, fill, np.int32 if first.dtype.kind == 'i' else first.dtype)
  for n, row in enumerate(rows):
    if array.ndim == 1:
      array[n] = row
    else:
      array[n, : len(row)] = row
  return array
