"""Raw ids and raw values of features, converted to rows, codes and numbers."""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmn_jax.data import texts, times
from lmn_jax.export.runtime.ids import CACHED, Ids

LARGEST = float(np.finfo(np.float32).max)


class RequestError(ValueError):
  """A request that is wrong; the message is one line for the client."""


def shown(raw: Any) -> str:
  """Returns a raw value for a message, on one line."""
  try:
    text = repr(raw)
  except ValueError:  # a whole number of thousands of digits
    text = f'a value of the type {type(raw).__name__}'
  return ' '.join(text.split())[:80]


def listed(name: str, raw: Any) -> Sequence:
  """Returns ids or events as a list. name: for the message.

  Raises:
    RequestError: a text, whose letters would be taken for ids, or no sequence.
  """
  if isinstance(raw, list | tuple):
    return raw
  if not isinstance(raw, str | bytes | Mapping):
    with contextlib.suppress(TypeError):
      return list(raw)
  raise RequestError(f'{name}={shown(raw)} is not a list; give a list')


class Value(NamedTuple):
  """A value of a feature, or those of N events.

  codes: int32 () or, for a list feature, [M]; of a number float32 (), NaN if it is missing; with a
  first axis N of events. known: whether training saw all tokens. missing: whether there is no
  value, or of events whether any has none.
  """

  codes: np.ndarray
  known: bool
  missing: bool


class Features(NamedTuple):
  """Features of the user and the impression of a request.

  values: codes and numbers by key. unknown: names of those whose value training did not see.
  missing: keys of those without a value.
  """

  values: dict[str, np.ndarray]
  unknown: list[str]
  missing: list[str]


class RawValues:
  """Converts raw values by the rules that the log was read with (texts.py)."""

  def __init__(self, manifest: dict[str, Any], ids: dict[str, Ids]):
    """manifest: of the export. ids: the vocabularies of 'item' and of each feature, by name."""
    self._features, self._ids = manifest['features'], ids
    self._V = manifest['vocabulary']
    # Ids of exports of earlier versions were not normalised: texts are then taken as they are.
    missing = manifest.get('missing')
    self._missing = None if missing is None else texts.words(missing)
    self._row_of: dict[str, int] = {}  # of raw texts of known items: converting them takes longest

  def keys(self, kind: str) -> list[str]:
    """Returns the keys of the features of a kind: 'user', 'item', 'context' or 'event'."""
    return [key for key, feature in self._features.items() if feature['kind'] == kind]

  def id(self, raw: Any, name: str = '') -> str:
    """Returns an id in the form of the log: ' 8', 8 and 8.0 are '8'; a missing one is ''.

    Args:
      raw: a string or a number. name: of the field, for the message.

    Raises:
      RequestError: neither a string nor a number.
    """
    try:
      return texts.text_of(raw) if self._missing is None else texts.value(raw, self._missing)
    except ValueError as error:
      raise RequestError(f'{name}{"=" * bool(name)}{shown(raw)}: {error}') from None

  def item_rows(self, raw: Sequence | np.ndarray, unknown: int) -> np.ndarray:
    """Returns indices of raw items (item_index.py), int32 [N]; `unknown` for any other."""
    # A number is no key: 1 and True are equal, and not the same id.
    are_texts = set(map(type, raw)) <= {str}
    rows = list(map(self._row_of.get, raw)) if are_texts else [None] * len(raw)
    if None in rows:
      new = [n for n, row in enumerate(rows) if row is None]
      found = self._ids['item'].find([self.id(raw[n]) for n in new]).tolist()
      for n, row in zip(new, found, strict=True):
        rows[n] = row
        if row > 0 and are_texts and len(self._row_of) < CACHED:
          self._row_of[raw[n]] = row
    row_N = np.array(rows, np.int32)
    # Row 0 has an empty text, which is the id of no item, and so has the padding of cold items.
    return np.where(row_N > 0, row_N, np.int32(unknown))

  def unknown(self, key: str) -> np.ndarray:
    """Returns the codes of an unknown value of a feature; NaN for a number."""
    return np.array(np.nan, np.float32) if self._is_number(key) else self._codes(key, [])[0]

  def padding(self, key: str) -> np.ndarray:
    """Returns the value of a feature where there is no event or item: V, or NaN of a number."""
    return (
      self.unknown(key) if self._is_number(key) else np.full_like(self.unknown(key), self._V[key])
    )

  def _is_number(self, key):
    return 'number' in self._features[key]

  def raw(self, key: str, value: np.ndarray | np.generic) -> Any:
    """Returns a raw value that `read` converts to these codes or this number; None for none."""
    if self._is_number(key):
      return None if np.isnan(value) else float(value)
    tokens = [
      self._ids[key].raw(code) for code in np.atleast_1d(value).tolist() if 0 < code < self._V[key]
    ]
    if edges := self._features[key]['edges']:
      bins = [int(token) for token in tokens]
      tokens = [edges[k] if k < len(edges) else math.nextafter(edges[-1], math.inf) for k in bins]
    if not tokens:
      return None
    return tokens if self._features[key]['width'] else tokens[0]

  def values_of(self, kind: str, values: Mapping[str, Any]) -> dict[str, Value]:
    """Returns raw values, by key of the feature.

    Args:
      kind: 'user' or 'context'. values: by name of the feature.

    Raises:
      RequestError: a feature that the model does not have, or a wrong value.
    """
    if not isinstance(values, Mapping):
      raise RequestError(f'{kind} features: {shown(values)} is not a dict; give values by name')
    keys = {self._features[key]['name']: key for key in self.keys(kind)}
    for name in values:
      if name not in keys:
        names = ', '.join(keys) or 'none'
        raise RequestError(
          f'{kind} feature {name!r} is unknown; {kind} features of the model: {names}'
        )
    return {keys[name]: self.read(keys[name], raw) for name, raw in values.items()}

  def features(
    self, stored: Mapping[str, np.ndarray], profile: Mapping[str, Any], context: Mapping[str, Any]
  ) -> Features:
    """Returns the features of a request.

    Args:
      stored: of the user in the export, by key. profile, context: raw values by name.

    Raises:
      RequestError: as `values_of`.
    """
    keys = [*self.keys('context'), *self.keys('user')]
    given = self.values_of('user', profile) | self.values_of('context', context)
    values = {key: self.unknown(key) for key in keys} | dict(stored)
    return Features(
      values | {key: value.codes for key, value in given.items()},
      [key.partition('.')[2] for key, value in given.items() if not value.known],
      [key for key in keys if (given[key].missing if key in given else key not in stored)],
    )

  def read(self, key: str, raw: Any) -> Value:
    """Returns a raw value.

    Raises:
      RequestError: a number or a binned feature whose value is not a number, or more than M tokens.
    """
    if self._is_number(key):
      number = _number(key, self.id(raw, key))
      return Value(np.array(number, np.float32), True, number != number)
    tokens = self._tokens(key, raw)
    return Value(*self._codes(key, tokens), not tokens)

  def column(self, key: str, raws: Sequence) -> Value:
    """Returns `read` of N raw values as one Value.

    Raises:
      RequestError: as `read`.
    """
    if self._is_number(key):
      numbers_N = np.array([_number(key, self.id(raw, key)) for raw in raws], np.float32)
      return Value(numbers_N, True, bool(np.isnan(numbers_N).any()))
    # Texts are often the same, and each is split once. Numbers are not, as True equals 1.
    texts_of = {raw: self._tokens(key, raw) for raw in set(filter(_is_text, raws))}
    lists = [texts_of[raw] if _is_text(raw) else self._tokens(key, raw) for raw in raws]
    width = self._features[key]['width']
    size_N = np.array([len(tokens) for tokens in lists], np.int64)
    self._check_width(key, size_N.max(initial=0))
    codes_NM = np.full((len(lists), max(1, width)), self._V[key], np.int32)
    codes_NM[:, 0] = 0
    row = np.repeat(np.arange(len(lists)), size_N)
    place = np.arange(len(row)) - np.repeat(np.cumsum(size_N) - size_N, size_N)
    found = self._ids[key].find([token for tokens in lists for token in tokens])
    codes_NM[row, place] = np.maximum(found, 0)
    codes = codes_NM if width else codes_NM[:, 0]
    return Value(codes, bool((found > 0).all()), bool((size_N == 0).any()))

  def _check_width(self, key, size):
    width = self._features[key]['width']
    if width and size > width:
      raise RequestError(f'{key} has {size} values; the model takes at most {width}')

  def _tokens(self, key, raw):
    feature = self._features[key]
    separator = feature['separator']
    if feature['edges'] is not None:
      return _bin_tokens(key, self.id(raw, key), feature['edges'])
    if separator and self._missing is None:
      return [token for token in texts.text_of(raw).split(separator) if token]
    if separator:
      try:
        return texts.tokens(raw, separator, self._missing)
      except ValueError as error:
        raise RequestError(f'{key}: {error}') from None
    return [value] if (value := self.id(raw, key)) else []

  def _codes(self, key, tokens):
    """Returns codes of tokens, padded, and whether training saw all of them."""
    self._check_width(key, len(tokens))
    width = self._features[key]['width']
    codes = np.maximum(self._ids[key].find(tokens), 0) if tokens else np.zeros(1, np.int32)
    known = not tokens or bool((codes > 0).all())
    if not width:
      return codes[0, ...], known  # still an array
    filled = np.concatenate([codes, np.full(width - len(codes), self._V[key], np.int32)])
    return filled, known


def _is_text(raw):
  return isinstance(raw, str)


def _number(key, text):
  """Returns the number of a text, NaN for none; by the rule of numeric.py for columns of a log."""
  if not text:
    return float('nan')
  if not re.fullmatch(times.NUMBER, text, re.ASCII) or abs(number := float(text)) > LARGEST:
    raise RequestError(f'{key}={text!r:.80} is not a number of float32; give a number')
  return number


def _bin_tokens(key, text, edges):
  """Returns the token of a number, which is how many edges are below it; [] for no number."""
  if not text:
    return []
  try:
    value = float(text)
  except ValueError:
    raise RequestError(f'{key}={text!r} is not a number; give a number') from None
  below = sum(edge < value for edge in edges)
  return [] if value != value else [str(below).zfill(len(str(len(edges))))]
