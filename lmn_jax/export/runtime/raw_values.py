"""Raw ids and raw values of features, converted to rows and codes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmn_jax.data import texts
from lmn_jax.export.runtime.ids import Ids


class RequestError(ValueError):
  """A request that is wrong; the message is one line for the client."""


class RawValues:
  """Converts raw values by the rules that the log was read with (texts.py)."""

  def __init__(self, manifest: dict[str, Any], ids: dict[str, Ids]):
    """manifest: of the export. ids: the vocabularies of 'item' and of each feature, by name."""
    self._features, self._ids = manifest['features'], ids
    self._V = manifest['vocabulary']
    # Ids of exports of earlier versions were not normalised: texts are then taken as they are.
    missing = manifest.get('missing')
    self._missing = None if missing is None else texts.words(missing)

  def keys(self, kind: str) -> list[str]:
    """Returns the keys of the features of a kind: 'user', 'item' or 'context'."""
    return [key for key, feature in self._features.items() if feature['kind'] == kind]

  def id(self, raw: Any) -> str:
    """Returns an id in the form of the log: ' 8', 8 and 8.0 are '8'; a missing one is ''.

    Raises:
      RequestError: neither a string nor a number.
    """
    try:
      return texts.text_of(raw) if self._missing is None else texts.value(raw, self._missing)
    except ValueError as error:
      raise RequestError(f'{raw!r:.80}: {error}') from None

  def item_rows(self, raw: Sequence | np.ndarray, unknown: int) -> np.ndarray:
    """Returns rows of raw items: int32 [N], `unknown` for an item that training did not see."""
    rows = self._ids['item'].find([self.id(item) for item in raw])
    # Row 0 has an empty text, which is the id of no item.
    return np.where(rows > 0, rows, np.int32(unknown))

  def unknown(self, key: str) -> np.ndarray:
    """Returns the codes of an unknown value of a feature."""
    return self._codes(key, [])[0]

  def codes_of(self, kind: str, values: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, bool]]:
    """Returns (codes, whether training saw all tokens) of raw values, by key of the feature.

    Args:
      kind: 'user' or 'context'. values: by name of the feature.

    Raises:
      RequestError: a feature that the model does not have, or a wrong value.
    """
    keys = {self._features[key]['name']: key for key in self.keys(kind)}
    for name in values:
      if name not in keys:
        names = ', '.join(keys) or 'none'
        raise RequestError(
          f'{kind} feature {name!r} is unknown; {kind} features of the model: {names}'
        )
    return {keys[name]: self.read(keys[name], raw) for name, raw in values.items()}

  def read(self, key: str, raw: Any) -> tuple[np.ndarray, bool]:
    """Returns the codes of a raw value, () or [M], and whether training saw all its tokens.

    Raises:
      RequestError: a binned feature whose value is not a number, or more than M tokens.
    """
    feature = self._features[key]
    separator = feature['separator']
    if feature['edges'] is not None:
      tokens = _bin_tokens(key, self.id(raw), feature['edges'])
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
    """Returns codes of tokens, padded, and whether training saw all of them."""
    width = self._features[key]['width']
    if width and len(tokens) > width:
      raise RequestError(f'{key} has {len(tokens)} values; the model takes at most {width}')
    codes = np.maximum(self._ids[key].find(tokens), 0) if tokens else np.zeros(1, np.int32)
    known = not tokens or bool((codes > 0).all())
    if not width:
      return codes[0, ...], known  # still an array
    filled = np.concatenate([codes, np.full(width - len(codes), self._V[key], np.int32)])
    return filled, known


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
