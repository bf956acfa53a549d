"""The loader of an exported model, with JAX and NumPy only: the code of the model is not needed.

Every exported folder has a copy of this folder, and of the modules that it imports, as a package
`bundle`:

    from bundle import Bundle                     # with the exported folder on sys.path
    model = Bundle('runs/lmn_douyin/export')
    model.score([model.ask('user 7', ['item 1', 'item 2'])])

manifest.py describes the folder.

Folders of an earlier version, with the loader as single files beside manifest.json, are read too.

Large arrays are memory-mapped: on CPU a folder of any size opens at once, processes share one copy
in memory, and JAX reads the rows from the map. To another device the tables are copied when the
folder is opened. Reading the functions of jax.export needs the package flatbuffers, which is pure
Python.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lmn_jax.export.runtime.click import ClickScorer, Values
from lmn_jax.export.runtime.histories import Histories, History, KnownEvent
from lmn_jax.export.runtime.ids import Ids
from lmn_jax.export.runtime.labels import Labels
from lmn_jax.export.runtime.manifest import load, read_manifest
from lmn_jax.export.runtime.next_item import NextItemScorer
from lmn_jax.export.runtime.padding import pieces
from lmn_jax.export.runtime.platforms import JOINING
from lmn_jax.export.runtime.programs import Programs, device_of, platform_of
from lmn_jax.export.runtime.raw_values import RawValues, listed
from lmn_jax.export.runtime.requests import Request, Scores, Sizes, best
from lmn_jax.export.runtime.users import Users
from lmn_jax.inference.segment_states import UserStates, all_steps


class Bundle:
  """An exported model.

  Requests are padded to a few shapes, so that a few programs are compiled, all of them by `warm`.
  Threads may share it.

  Attributes:
    folder, manifest: path of the export, and its description.
    device, platform: that compute, such as 'cuda'.
    task: 'click' or 'next_item'. model: its name. fingerprint: of weights and vocabulary.
    length: L, the newest events that a click model reads, or T, events of a segment.
    items: number of items. whole: whether a next-item model reads whole histories.
    exclude_seen: whether items that a user has met are not recommended, by default.
    labels: that it scores, and whether scores are log-odds of a click.
    rich: whether the model reads times or features of events. timed: whether it reads times.
    candidate_sizes: of the compiled programs, ascending.
  """

  def __init__(
    self,
    folder: str | Path,
    batch_sizes: Sequence[int] | None = None,
    candidate_sizes: Sequence[int] | None = None,
    values: Values | None = None,
    check: bool = False,
    platform: str = '',
  ):
    """Opens a folder; on CPU without reading the large files.

    Args:
      folder: of the export. batch_sizes: users scored together; lists of requests are cut into
        pieces of these sizes, on an accelerator padded to one of them. candidate_sizes: of each
        user; candidates are padded to one of these sizes, and cut into pieces of the largest. None:
        those of the platform, see platforms.py.
      values: computes the embedding bag (LMN's memory), if other processes hold its table; a model
        without an embedding bag does not use it.
      check: whether to read every file and compare its CRC-32; sizes are always compared.
      platform: that computes: 'cpu', 'cuda' or 'tpu'; '' is the one that JAX prefers.

    Raises:
      FolderError: not an export, another format, a file that is missing or was changed, or
        functions for other platforms. PlatformError: JAX has no device of the platform.
    """
    self.device = device_of(platform)
    self.platform = platform_of(self.device)
    self.folder = Path(folder)
    self.manifest = manifest = read_manifest(self.folder, check)
    self.task, self.model = manifest['task'], manifest['model']
    self.fingerprint: str = manifest['fingerprint']
    self.length: int = manifest['length']
    self.whole: bool = manifest['whole']
    self.exclude_seen: bool = manifest['config']['exclude_seen']
    self.items: int = manifest['vocabulary']['item'] - 1
    self.labels = Labels(manifest)
    joining = JOINING[self.platform]
    self.candidate_sizes = sorted(candidate_sizes or joining.candidate_sizes)
    self._values = values if manifest['pooled'] else None
    vocabularies = ('user', *manifest['vocabulary'])
    self._ids = {name: Ids(self.folder / 'vocabulary' / name) for name in vocabularies}
    self._raw = RawValues(manifest, self._ids)
    self._histories = Histories(manifest, self._raw)
    self.rich, self.timed = self._histories.rich, self._histories.timed
    self._users = Users(self.folder, manifest, self._ids['user'])
    self._programs = self._open_programs()
    users = sorted(batch_sizes or joining.batch_sizes)
    self._sizes = Sizes(users, self.candidate_sizes, joining.pads)
    # Both have the same methods; those about states of users are of next-item models only.
    self._scorer = self._open_scorer()

  def _open_scorer(self):
    parts = self.manifest, self._programs, self._sizes, self._histories.padding
    if self.task == 'next_item':
      return NextItemScorer(*parts)
    codes = {key: load(self.folder / f'items/{key}.npy') for key in self._raw.keys('item')}
    return ClickScorer(*parts, codes, self._values)

  def _open_programs(self):
    names, absent = set(self.manifest['functions']), None
    if self.manifest['pooled']:
      names -= {'score'} if self._values else {'ask', 'finish'}
      absent = self.manifest['pooled'] if self._values else None
    return Programs(self.folder, self.manifest, names, absent, self.device)

  def lost(self) -> list[str]:
    """Returns the names of the holders of `values` that do not answer now."""
    return self._values.lost() if self._values else []

  # Ids and users.

  def ids(self, name: str) -> Ids:
    """Returns the raw ids of 'item', of a feature, or of 'user' (all users of the log)."""
    return self._ids[name]

  def id(self, raw: Any) -> str:
    """Returns an id in the form of the log: ' 8', 8 and 8.0 are '8'; a missing one is ''.

    Raises:
      RequestError: neither a string nor a number.
    """
    return self._raw.id(raw)

  def code(self, key: str, raw: Any) -> np.ndarray:
    """Returns a raw value of a feature: codes, int32 () or for a list [M]; or a number, float32 ().

    Args:
      key: such as 'context.query'. raw: a string or a number; several tokens with the feature's
        separator between them, or in a sequence.

    Raises:
      RequestError: a number or a binned feature whose value is not a number, or more than M tokens.
    """
    return self._raw.read(key, raw).codes

  def history_offsets(self) -> np.ndarray:
    """Returns where the events of each user begin, int64 [U + 1], in the order of `ids('user')`."""
    return self._users.offsets()

  def known_history(self, user: Any) -> list[str]:
    """Returns raw ids of a user's events in the export, oldest first; [] for an unknown user."""
    record, _ = self._users.find(self.id(user))
    return self._raw_items(self._users.history(record))

  def known_times(self, user: Any) -> list[int | None]:
    """Returns the times of these events, as integers of the store; None where they are not known.

    A log may have no times; exports of earlier versions hold the time of the newest event only.
    """
    record, _ = self._users.find(self.id(user))
    return self._users.times(record)

  def known_events(self, user: Any) -> list[KnownEvent]:
    """Returns these events with their times and the features that the model reads."""
    record, _ = self._users.find(self.id(user))
    columns = self._users.event_features(record)
    features: list[dict[str, Any]] = [{} for _ in range(len(self._users.history(record)))]
    for key, values in columns.items():
      for event, value in zip(features, values, strict=True):
        event[key.partition('.')[2]] = self._raw.raw(key, value)
    return list(map(KnownEvent, self.known_history(user), self.known_times(user), features))

  def exported(self, user: Any) -> History:
    """Returns these events as a history for `ask`, without converting them."""
    record, _ = self._users.find(self.id(user))
    times = np.array(self._users.times(record) if self.timed else [], np.int64)
    features = self._users.event_features(record)
    return self._histories.exported(self._users.history(record), features, times)

  def check_event(self, features: Mapping[str, Any], time: int | None) -> None:
    """Refuses a new event that the model cannot read, see `Histories.check`."""
    self._histories.check(features, time)

  def time_span(self) -> tuple[int, int]:
    """Returns the first and the last time of all users' events; (0, 0) if there are none."""
    return self._users.time_span()

  def _raw_items(self, rows):
    # Row 0 stands for all items that training did not see, so it has no raw id.
    return [self._ids['item'].raw(row) if row else '' for row in rows.tolist()]

  # Requests.

  def ask(
    self,
    user: Any,
    candidates: Sequence | np.ndarray | None,
    history: Sequence | np.ndarray | History = (),
    context: Mapping[str, Any] | None = None,
    profile: Mapping[str, Any] | None = None,
    state: UserStates | None = None,
    time: Any = None,
  ) -> Request:
    """Converts a request in raw ids to rows and codes.

    Users, events and feature values that training did not see take the rows and codes of the
    unknown ones. So does a candidate of a click model; a next-item model gives it no score. Cold
    items have their features. Ids and values are strings or numbers, read as in the log (texts.py).

    Args:
      user: raw id. candidates: raw ids; None for all items. history: events, oldest first: raw ids,
        or dicts with `item`, `time` and event features (histories.py); or `known_events`, or,
        faster, `exported`.
      context, profile: raw values by name of the feature, for a list feature also a sequence.
        Missing values of the profile are those of the export, missing ones of the context unknown.
      state: of a next-item model, after `history`, or after events that are not given.
      time: of the request, in the form of the log's times; None is the newest time of the history,
        and of the export if the history has no times or is known.

    Raises:
      RequestError: a feature that the model does not have, a wrong value, or an event after the
        request.
    """
    record, row = self._users.find(self.id(user))
    stored = self._users.profile(record) if record >= 0 else {}
    features = self._raw.features(stored, profile or {}, context or {})
    next_items = self.task == 'next_item'
    candidate_list = [] if candidates is None else listed('candidates', candidates)
    V = self.items + 1
    item = self._raw.item_rows(candidate_list, V if next_items else 0)
    unknown = [str(candidate_list[n]) for n in np.flatnonzero((item == 0) | (item == V))]
    cold = [str(candidate_list[n]) for n in np.flatnonzero(item > V)]
    if state is not None and not (self.rich and len(history)):
      read = self._histories.of_state(self._scorer.newest(state))
    else:
      read = self._histories.read(history, None if next_items else self.length)
    if next_items and state is None:
      state = all_steps(self._scorer.updating(self._scorer.empty(row), read.events))
    seconds = self._histories.request(read, time)
    events = len(read.events['item'])
    if next_items:  # such a model reads no features of users and impressions
      state = state._replace(row=np.array([row], np.int32))
      events, features = self._scorer.events(state), features._replace(missing=[])
    met = item[:0]
    if candidates is None:
      met = np.union1d(self._users.met(record), self._histories.rows(history))
    return Request(
      row, item, read.at(seconds), features.values, state, seconds, row > 0, unknown, events, met,
      [*features.unknown, *read.unknown], [*features.missing, *read.missing], cold,
    )  # fmt: skip

  # Scores.

  def score(self, asked: Sequence[Request]) -> list[Scores]:
    """Scores the candidates of each request.

    Scores are log-odds of a click, predicted numbers in the unit of the label, or products with
    user vectors; of several labels there are those of each. A next-item model gives 0 to a user
    without events, and NaN to an unknown candidate.
    """
    return all_steps(self.scoring(asked))

  def scoring(self, asked: Sequence[Request]) -> Generator[None, None, list[Scores]]:
    """`score` in steps: one call of a compiled program each."""
    scores = [self.labels.empty(len(request.item)) for request in asked]
    degraded = [False] * len(asked)
    most = self.candidate_sizes[-1]
    for numbers in pieces(range(len(asked)), self._sizes.batch, self._sizes.pads):
      requests = [asked[n] for n in numbers]
      prepared = self._scorer.prepare(requests)
      for begin in range(0, max(len(request.item) for request in requests), most):
        items = [request.item[begin : begin + most] for request in requests]
        values, incomplete = self._scorer.score(requests, items, prepared)
        for n, row, piece in zip(numbers, values[: len(numbers)], items, strict=True):
          scores[n][begin : begin + len(piece)] = row[: len(piece)]
          degraded[n] |= incomplete
        yield
    for values, request in zip(scores, asked, strict=True):
      values[:] = self._scorer.finished(request, values)
    return [self.labels.scores(*pair) for pair in zip(scores, degraded, strict=True)]

  # States of users of a next-item model.

  def state(self, user: Any, history: Sequence | np.ndarray | History = ()) -> UserStates:
    """Returns the state of a user whose events are `history`, as for `ask`."""
    _, row = self._users.find(self.id(user))
    return self.updated(self._scorer.empty(row), history)

  def updated(self, state: UserStates, events: Sequence | np.ndarray | History) -> UserStates:
    """Returns the state after new events, oldest first; the cost depends on these events only."""
    return all_steps(self.updating(state, events))

  def updating(
    self, state: UserStates, events: Sequence | np.ndarray | History
  ) -> Generator[None, None, UserStates]:
    """`updated` in steps: one segment each."""
    return self._scorer.updating(state, self._histories.read(events).events)

  def folded(self, state: UserStates) -> tuple[UserStates, int]:
    """Returns a state without the events after its last full segment, and their number."""
    return self._scorer.folded(state)

  def pack(self, state: UserStates) -> bytes:
    """Returns a user's state as bytes, for `unpack` of the same export."""
    return self._scorer.pack(state)

  def unpack(self, packed: bytes) -> UserStates:
    """Returns the state that `pack` wrote.

    Raises:
      RequestError: a wrong number of bytes.
    """
    return self._scorer.unpack(packed)

  # The best of all items.

  def recommend(
    self,
    asked: Sequence[Request],
    k: Sequence[int],
    exclude: Sequence[Sequence[str]],
    exclude_seen: bool | None = None,
    by: str | Mapping[str, Any] | None = None,
  ) -> list[tuple[list[tuple[str, float]], bool]]:
    """Returns the best items of the vocabulary for each request, best first.

    Items are scored in blocks; there is no array of all scores. Of equal scores the item with the
    lower row is first.

    Args:
      asked: requests without candidates. k: number of items for each. exclude: raw ids of items to
        leave out, for each. exclude_seen: whether to leave out items that the user has met; None:
        the `exclude_seen` of the export. by: of several labels, the one whose score orders, or
        weights by name, see `Labels.order`; None: the main one.

    Returns:
      For each, (raw id, score) pairs, fewer than k if there are fewer items, and whether some rows
      were not available.

    Raises:
      RequestError: `k`, `exclude` or `by` is wrong.
    """
    requests = zip(asked, k, exclude, strict=True)
    return [all_steps(self.recommending(*request, exclude_seen, by)) for request in requests]

  def recommending(
    self,
    asked: Request,
    k: int,
    exclude: Sequence[str],
    exclude_seen: bool | None = None,
    by: str | Mapping[str, Any] | None = None,
  ) -> Generator[None, None, tuple[list[tuple[str, float]], bool]]:
    """`recommend` for one request, in steps: one block of items each."""
    excluded = self._raw.item_rows(listed('exclude', exclude), 0)
    if self.exclude_seen if exclude_seen is None else exclude_seen:
      excluded = np.concatenate([excluded, asked.met])
    excluded = np.unique(excluded)
    rows, values, degraded = np.zeros(0, np.int64), np.zeros(0, np.float32), False
    for block_rows, scores, incomplete in self._scorer.blocks(asked):
      block_values = self.labels.order(scores, by)
      allowed = ~np.isin(block_rows, excluded) & (block_rows > 0)
      rows = np.concatenate([rows, block_rows[allowed]])
      values = np.concatenate([values, block_values[allowed]])
      rows, values = best(rows, values, k)
      degraded |= incomplete
      yield
    return list(zip(self._raw_items(rows), values.tolist(), strict=True)), degraded

  # Programs.

  def warm(
    self, threads: int = 1, note: Callable[[int, int], None] = lambda done, count: None
  ) -> None:
    """Compiles all programs that requests can use, and runs each once.

    Args:
      threads: that compile. note: called with the number of programs that are done and of all,
        first with 0 done.
    """
    runs = list(self._scorer.programs(self.ask('', None)))
    note(0, len(runs))
    with ThreadPoolExecutor(threads, thread_name_prefix='warm') as pool:
      for done, _ in enumerate(pool.map(lambda run: run(), runs), 1):
        note(done, len(runs))

  def compiled(self) -> int:
    """Returns the number of compiled programs, which does not grow after `warm`."""
    return self._programs.compiled
