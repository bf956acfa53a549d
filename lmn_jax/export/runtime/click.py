"""Scores of an exported click model."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lmn_jax.data import item_index
from lmn_jax.export.runtime.padding import least, padded
from lmn_jax.export.runtime.programs import Programs
from lmn_jax.export.runtime.requests import Request, Sizes

# Histories of models that take any length are padded to a multiple of this.
LENGTH_MULTIPLE = 64
GAP = 'time_gap'


@runtime_checkable
class Values(Protocol):
  """Sums of rows of a table that other processes hold."""

  def __call__(self, ids_TK: np.ndarray, weights_TK: np.ndarray) -> tuple[np.ndarray, bool]:
    """Returns weighted sums of rows, float32 [T, D], and whether some rows were not available."""
    ...

  def lost(self) -> list[str]:
    """Returns the names of the holders that do not answer now."""
    ...


class ClickScorer:
  """Computes scores of candidates from the history and the features of a request."""

  def __init__(
    self,
    manifest: dict[str, Any],
    programs: Programs,
    sizes: Sizes,
    padding: dict[str, np.ndarray],
    items: dict[str, np.ndarray],
    values: Values | None,
  ):
    """Prepares the arrays.

    Args:
      manifest: of the export. programs: its functions. sizes: that requests are padded to.
      padding: by name the value of a missing event, see `Histories`.
      items: codes of each item feature by index (item_index.py), [V + 1 + C] or [V + 1 + C, M], or
        numbers [V + 1 + C].
      values: the embedding bag, if this process does not hold its table.
    """
    self._programs, self._sizes, self._items, self._values = programs, sizes, items, values
    self._V: int = manifest['vocabulary']['item']
    self._C: int = manifest.get('cold_items', 0)
    self._indexed = bool(self._C) and 'item_index' in manifest['functions']['score'][2]
    self._lengths = _lengths(manifest['length'], manifest['any_length'])
    kinds = {key: feature['kind'] for key, feature in manifest['features'].items()}
    self._request_keys = [key for key, kind in kinds.items() if kind in ('user', 'context')]
    # The gap of time of padding is 0, as the time.
    self._padding = {GAP if name == 'time' else name: x for name, x in padding.items()}

  def prepare(self, requests: Sequence[Request]) -> None:
    """Does nothing: a click model reads user and candidates together."""

  def score(
    self, requests: Sequence[Request], candidates: Sequence[np.ndarray], prepared: None = None
  ) -> tuple[np.ndarray, bool]:
    """Scores some candidates of each request.

    Args:
      requests: at most the largest batch size. candidates: int32 indices for each request, at most
        the largest number of candidates. prepared: result of `prepare`.

    Returns:
      float32 [B, C] or, of K labels, [B, C, K], of sizes of a compiled program, and whether some
      rows were not available.
    """
    del prepared
    run, dense, tables = self._programs.run, self._programs.dense, self._programs.tables
    B = least(self._sizes.batch, len(requests))
    C = least(self._sizes.candidates, max(map(len, candidates)))
    batch = self._batch(requests, padded(candidates, (B, C), self._V))
    if self._values is None:
      return run('score', dense, tables, batch), False
    ids_TK, weights_TK = run('ask', dense, tables, batch)
    sums_TD, degraded = self._values(ids_TK, weights_TK)
    return run('finish', dense, tables, batch, sums_TD), degraded

  def _batch(self, requests, item_BC):
    B = len(item_BC)
    L = least(self._lengths, max((x.events for x in requests), default=0))
    events = {
      name: padded([x.history[name] for x in requests], (B, L, *fill.shape), fill)
      for name, fill in self._padding.items()
    }
    history_BL = events.pop('item')
    batch = {
      'user': padded([x.user for x in requests], (B,), 0),
      'item': item_BC,
      'history': history_BL,
      'length': padded([x.events for x in requests], (B,), 0),
      **events,
    }
    for key, codes in self._items.items():
      batch[key] = codes.take(item_BC, axis=0)
      batch[key.replace('item.', 'history.', 1)] = codes.take(history_BL, axis=0)
    for key in self._request_keys:
      codes = np.stack([x.features[key] for x in requests])
      batch[key] = padded(codes, (B, *codes.shape[1:]), 0)
    return item_index.with_rows(batch, self._V, self._indexed) if self._C else batch

  def blocks(self, request: Request) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yields (indices, scores, whether some rows were not available) of all items, in blocks."""
    size = self._sizes.candidates[-1]
    end = self._V + 1 + self._C if self._C else self._V
    for begin in range(1, end, size):
      rows = np.arange(begin, min(begin + size, end), dtype=np.int32)
      rows = rows[rows != self._V]
      values, degraded = self.score([request], [rows])
      yield rows, values[0, : len(rows)], degraded  # the other users are padding

  def finished(self, request: Request, values: np.ndarray) -> np.ndarray:
    """Returns the scores [C] or [C, K] of the answer."""
    del request
    return values

  def programs(self, empty: Request) -> Iterator[Callable[[], Any]]:
    """Yields functions that compile all programs. empty: a request of an unknown user."""
    for B in self._sizes.batch:
      for L in self._lengths:
        events = {name: np.zeros((L, *x.shape[1:]), x.dtype) for name, x in empty.history.items()}
        requests = [empty._replace(history=events, events=L)] * B
        for C in self._sizes.candidates:
          items = [np.full(C, self._V, np.int32)] * B
          yield lambda requests=requests, items=items: self.score(requests, items)


def _lengths(length, any_length):
  """Returns the lengths that histories are padded to: two, if the model takes any length."""
  if not any_length:
    return [length]
  multiples = {
    -(-size // LENGTH_MULTIPLE) * LENGTH_MULTIPLE for size in (length, length // 4) if size
  }
  return sorted(multiples)
