"""An exported model, loaded and asked with JAX and NumPy alone: no code of the model is needed.

Every exported folder has a copy of this folder and of the files that it imports, as a package
`bundle`:

    from bundle import Bundle                     # with the exported folder on sys.path
    model = Bundle('runs/lmn_douyin/export')
    model.score([model.ask('user 7', ['item 1', 'item 2'])])

    bundle/                  this loader
    manifest.json            what it is: task, model, dims, functions, tables, features, metrics
    functions/<name>.jax     of jax.export, any number of users and candidates, for CPU, GPU and TPU
    dense.npz                dense parameters and statistics, by path
    tables/<name>.npy        rows [V, D]: float32, bfloat16 as its bits in uint16, or int8 with
    tables/<name>.scale.npy  the scale of each row, float32 [V]
    vocabulary/<name>/       raw ids by row, and the rows by hash: see ids.py
    items/<feature>.npy      codes of the items, [V + 1] or [V + 1, M], the last for the padding
    users/                   of all users of the log: raw ids, embedding rows, features, the events
                             that the model reads (history, event_time), and the items of those
                             before, each once a user (met); offset and met_offset: where they begin
    seal.json                size and CRC-32 of every file

Folders written before the package have the loader as files beside manifest.json; they are read too.

Large arrays are memory-mapped: a folder of any size opens at once, several processes share one copy
in memory, and on CPU JAX reads the rows where they lie in the map. Reading jax.export's functions
takes the package flatbuffers, which is plain Python.
"""

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmn_jax.export.runtime.click import Clicks, Values
from lmn_jax.export.runtime.ids import Ids
from lmn_jax.export.runtime.manifest import load, read_manifest
from lmn_jax.export.runtime.next_item import NextItems
from lmn_jax.export.runtime.padding import pieces
from lmn_jax.export.runtime.programs import Programs
from lmn_jax.export.runtime.raw_values import RawValues
from lmn_jax.export.runtime.requests import Asked, Scores, Sizes
from lmn_jax.export.runtime.users import Users
from lmn_jax.inference.segment_states import UserStates, all_steps


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
      values: the rows of the table with weighted sums (LMN's memory), if this process does not
        hold them; a model without such a table does not use it.
      check: read every file and compare its CRC-32; sizes always are.

    Raises:
      FolderError: no export, an export of another format, a file that is missing or was changed.
    """
    self.folder = Path(folder)
    self.manifest = manifest = read_manifest(self.folder, check)
    self.task, self.model = manifest['task'], manifest['model']
    self.fingerprint: str = manifest['fingerprint']
    self.length: int = manifest['length']
    self.whole: bool = manifest['whole']
    self.exclude_seen: bool = manifest['config']['exclude_seen']
    self.items: int = manifest['vocabulary']['item'] - 1
    self.candidate_sizes = sorted(candidate_sizes)
    self._values = values if manifest['pooled'] else None
    vocabularies = ('user', *manifest['vocabulary'])
    self._ids = {name: Ids(self.folder / 'vocabulary' / name) for name in vocabularies}
    self._raw = RawValues(manifest, self._ids)
    self._users = Users(self.folder, manifest, self._ids['user'])
    self._programs = self._open_programs()
    self._sizes = Sizes(sorted(batch_sizes), self.candidate_sizes)
    # Of either task the same methods; states of users are of next items alone.
    self._scorer = self._open_scorer()

  def _open_scorer(self):
    if self.task == 'next_item':
      return NextItems(self.manifest, self._programs, self._sizes)
    codes = {key: load(self.folder / f'items/{key}.npy') for key in self._raw.keys('item')}
    return Clicks(self.manifest, self._programs, self._sizes, codes, self._values)

  def _open_programs(self):
    names, absent = set(self.manifest['functions']), None
    if self.manifest['pooled']:
      names -= {'score'} if self._values else {'ask', 'finish'}
      absent = self.manifest['pooled'] if self._values else None
    return Programs(self.folder, self.manifest, names, absent)

  def lost(self) -> list[str]:
    """Names of the holders of rows elsewhere that are out of reach now."""
    return self._values.lost() if self._values else []

  # What is known of ids and users.

  def ids(self, name: str) -> Ids:
    """The raw ids of 'item', of a feature, or of 'user': of all users of the log."""
    return self._ids[name]

  def id(self, raw: Any) -> str:
    """An id as the log has it: ' 8', 8 and 8.0 are '8'; '' is none.

    Raises:
      RequestError: neither a text nor a number.
    """
    return self._raw.id(raw)

  def code(self, key: str, raw: Any) -> np.ndarray:
    """The codes of a raw value of a feature: int32 () or, of one with several values, [M].

    Args:
      key: such as 'context.query'. raw: a text or a number; several tokens with the feature's
        separator, or in a sequence.

    Raises:
      RequestError: no number for a feature that is cut in bins, more tokens than training saw.
    """
    return self._raw.read(key, raw)[0]

  def history_offsets(self) -> np.ndarray:
    """Where the events of each user begin, int64 [U + 1], in the order of `ids('user')`."""
    return self._users.offsets()

  def known_history(self, user: Any) -> list[str]:
    """Raw ids of the events of a user that the export holds, oldest first; [] of an unknown one."""
    record, _ = self._users.find(self.id(user))
    return self._raw_items(self._users.history(record))

  def known_times(self, user: Any) -> list[int | None]:
    """Times of these events, as the store has them.

    None where the log had no times; exports of earlier versions know that of the newest alone.
    """
    record, _ = self._users.find(self.id(user))
    return self._users.times(record)

  def time_span(self) -> tuple[int, int]:
    """The least and the greatest of these times; (0, 0) where there are none."""
    return self._users.time_span()

  def _raw_items(self, rows):
    # Row 0 is any item that training did not see: no raw id is one of them.
    return [self._ids['item'].raw(row) if row else '' for row in rows.tolist()]

  # Requests.

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
    record, row = self._users.find(self.id(user))
    features, unknown_features = self._features(record, context or {}, profile or {})
    candidate_list = [] if candidates is None else list(candidates)
    V = self.items + 1
    item = self._raw.item_rows(candidate_list, V if self.task == 'next_item' else 0)
    unknown = [str(raw) for raw, at in zip(candidate_list, item, strict=True) if at in (0, V)]
    rows = item[:0]
    if self.task == 'next_item':
      if state is None:
        state = self.state(user, history)
      state = state._replace(row=np.array([row], np.int32))
      events = self._scorer.events(state)
    else:
      rows = self._raw.item_rows(history[-self.length :], 0)
      events = len(rows)
    met = item[:0]
    if candidates is None:
      met = np.union1d(self._users.met(record), self._raw.item_rows(history, 0))
    return Asked(row, item, rows, features, state, row > 0, unknown, events, met, unknown_features)

  def _features(self, record, context, profile):
    """Codes by key, and the names of features with a value that training did not see."""
    codes = {key: self._raw.unknown(key) for key in self._raw.keys('context')}
    codes |= {key: self._raw.unknown(key) for key in self._raw.keys('user')}
    if record >= 0:
      codes |= self._users.profile(record)
    given = self._raw.given('user', profile) | self._raw.given('context', context)
    unknown = [key.partition('.')[2] for key, (_, known) in given.items() if not known]
    return codes | {key: code for key, (code, _) in given.items()}, unknown

  # Scores.

  def score(self, asked: Sequence[Asked]) -> list[Scores]:
    """Scores of each one's candidates: log-odds of a click, or products with a user's vector.

    A next-item model scores 0 for a user without events, and NaN for an unknown candidate.
    """
    return all_steps(self.scoring(asked))

  def scoring(self, asked: Sequence[Asked]) -> Generator[None, None, list[Scores]]:
    """`score` in steps of the candidates of a compiled program."""
    scores = [np.zeros(len(request.item), np.float32) for request in asked]
    degraded = [False] * len(asked)
    most = self.candidate_sizes[-1]
    for numbers in pieces(range(len(asked)), self._sizes.batch):
      requests = [asked[n] for n in numbers]
      prepared = self._scorer.prepare(requests)
      for begin in range(0, max(len(request.item) for request in requests), most):
        items = [request.item[begin : begin + most] for request in requests]
        values, lacking = self._scorer.score(requests, items, prepared)
        for n, row, piece in zip(numbers, values[: len(numbers)], items, strict=True):
          scores[n][begin : begin + len(piece)] = row[: len(piece)]
          degraded[n] |= lacking
        yield
    for values, request in zip(scores, asked, strict=True):
      values[:] = self._scorer.finished(request, values)
    return [Scores(*pair) for pair in zip(scores, degraded, strict=True)]

  # States of users of a next-item model.

  def state(self, user: Any, history: Sequence | np.ndarray = ()) -> UserStates:
    """The state of a user with these events, oldest first, and none before them."""
    _, row = self._users.find(self.id(user))
    return self.updated(self._scorer.empty(row), history)

  def updated(self, state: UserStates, events: Sequence | np.ndarray) -> UserStates:
    """The state after new events, oldest first: costs what these cost, however long the past."""
    return all_steps(self.updating(state, events))

  def updating(
    self, state: UserStates, events: Sequence | np.ndarray
  ) -> Generator[None, None, UserStates]:
    """`updated` in steps of a segment."""
    return self._scorer.updating(state, self._raw.item_rows(events, 0))

  def folded(self, state: UserStates) -> tuple[UserStates, int]:
    """A user's state without the events after its last full segment, and how many these are."""
    return self._scorer.folded(state)

  def pack(self, state: UserStates) -> bytes:
    """A user's state as bytes, for `unpack` of the same export."""
    return self._scorer.pack(state)

  def unpack(self, packed: bytes) -> UserStates:
    """The state of `pack`.

    Raises:
      RequestError: bytes of another size than a state has.
    """
    return self._scorer.unpack(packed)

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
    requests = zip(asked, k, exclude, strict=True)
    return [all_steps(self.recommending(*request, exclude_seen)) for request in requests]

  def recommending(
    self, asked: Asked, k: int, exclude: Sequence[str], exclude_seen: bool | None = None
  ) -> Generator[None, None, tuple[list[tuple[str, float]], bool]]:
    """`recommend` for one, in steps of a block of items."""
    barred = self._raw.item_rows(list(exclude), 0)
    if self.exclude_seen if exclude_seen is None else exclude_seen:
      barred = np.concatenate([barred, asked.met])
    barred = np.unique(barred)
    rows, values, degraded = np.zeros(0, np.int64), np.zeros(0, np.float32), False
    for block_rows, block_values, lacking in self._scorer.blocks(asked):
      allowed = ~np.isin(block_rows, barred) & (block_rows > 0)
      rows = np.concatenate([rows, block_rows[allowed]])
      values = np.concatenate([values, block_values[allowed]])
      rows, values = best(rows, values, k)
      degraded |= lacking
      yield
    return list(zip(self._raw_items(rows), values.tolist(), strict=True)), degraded

  # Programs.

  def warm(self) -> None:
    """Compiles every program that requests can take."""
    for run in self._scorer.programs(self.ask('', None)):
      run()

  def compiled(self) -> int:
    """How many programs were compiled; after `warm` the number stays."""
    return self._programs.compiled


def best(rows: np.ndarray, values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """The k best rows and their values, best first; of equal ones the lower rows, NaN last."""
  cost = np.where(np.isnan(values), np.inf, -values)
  if len(cost) > k:
    kept = cost <= np.partition(cost, k - 1)[k - 1]
    rows, values, cost = rows[kept], values[kept], cost[kept]
  order = np.lexsort((rows, cost))[:k]
  return rows[order], values[order]
