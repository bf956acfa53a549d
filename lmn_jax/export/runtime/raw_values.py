"""Raw ids and raw values of features, as rows and codes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmn_jax.data import texts
from lmn_jax.export.runtime.ids import Ids


class RequestError(ValueError):
  """A request that cannot be answered; the message is one line for the client."""


class RawValues:
  """Reads raw values as the log was read (texts.py)."""

  def __init__(self, manifest: dict[str, Any], ids: dict[str, Ids]):
    """ids: of 'item' and of each feature, by name."""
    self._features, self._ids = manifest['features'], ids
    self._V = manifest['vocabulary']
    # Exports from before texts.py have ids that it did not read, and take texts as they are.
    words = manifest.get('missing')
    self._missing = None if words is None else texts.words(words)

  def keys(self, kind: str) -> list[str]:
    """The features of a kind, 'user', 'item' or 'context'."""
    return [key for key, feature in self._features.items() if feature['kind'] == kind]

  def id(self, raw: Any) -> str:
    """An id as the log has it: ' 8', 8 and 8.0 are '8'; '' is none.

    Raises:
      RequestError: neither a text nor a number.
    """
    try:
      return texts.text_of(raw) if self._missing is None else texts.value(raw, self._missing)
    except ValueError as error:
      raise RequestError(f'{raw!r:.80}: {error}') from None

  def item_rows(self, raw: Sequence | np.ndarray, unknown: int) -> np.ndarray:
    """Rows of raw items: int32 [N], `unknown` for an item that training did not see."""
    rows = self._ids['item'].find([self.id(item) for item in raw])
    # Row 0 has an empty text, and no item is called so.
    return np.where(rows > 0, rows, np.int32(unknown))

  def unknown(self, key: str) -> np.ndarray:
    """The codes of an unknown value of a feature."""
    return self._codes(key, [])[0]

  def given(self, kind: str, values: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, bool]]:
    """Codes of raw values, and whether training saw all of each, by key of the feature.

    Args:
      kind: 'user' or 'context'. values: by name of the feature.

    Raises:
      RequestError: a feature that the model does not have, or a value that cannot be one.
    """
    keys = {self._features[key]['name']: key for key in self.keys(kind)}
    for name in values:
      if name not in keys:
        known = ', '.join(keys) or 'none'
        raise RequestError(f'{kind} feature {name!r} is none of the model, which has: {known}')
    return {keys[name]: self.read(keys[name], raw) for name, raw in values.items()}

  def read(self, key: str, raw: Any) -> tuple[np.ndarray, bool]:
    """The codes of a raw value, () or [M], and whether training saw all of it.

    Raises:
      RequestError: no number for a feature that is cut in bins, more tokens than training saw.
    """
    feature = self._features[key]
    separator = feature['separator']
    if feature['edges'] is not None:
      tokens = _bin(key, self.id(raw), feature['edges'])
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

  def _codes(self, key, tokens):
    """Codes of tokens, filled up, and whether training saw all of them."""
    width = self._features[key]['width']
    if width and len(tokens) > width:
      raise RequestError(f'{key} has {len(tokens)} values; at most {width} are known to the model')
    codes = np.maximum(self._ids[key].find(tokens), 0) if tokens else np.zeros(1, np.int32)
    known = not tokens or bool((codes > 0).all())
    if not width:
      return codes[0, ...], known  # an array still
    filled = np.concatenate([codes, np.full(width - len(codes), self._V[key], np.int32)])
    return filled, known


def _bin(key, text, edges):
  """The token of a number: how many edges are below it."""
  if not text:
    return []
  try:
    value = float(text)
  except ValueError:
    raise RequestError(f'{key}={text!r} is not a number') from None
  below = sum(edge < value for edge in edges)
  return [] if value != value else [str(below).zfill(len(str(len(edges))))]
