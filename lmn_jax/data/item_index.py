"""The index of an item, by which a store has its features and vectors, and the row of its id.

    0               the unknown item
    1 .. V - 1      an item of the vocabulary; the index is its row
    V               no item: the padding
    V + 1 .. V + C  a cold item (config.data.cold_items), which has features or a vector; its row is
                    that of the unknown item, 0

Columns of items in a store, requests and histories of an export hold indices. Batches hold rows,
from 0 to V: features are read by the index before `with_rows` replaces it. So a model, and whatever
else reads `item` and `history` of a batch, never sees the index of a cold item.
"""

from typing import Any

Batch = dict[str, Any]  # arrays of numpy or of JAX by name


def rows_of(index: Any, V: int) -> Any:
  """Returns rows of items, int32: the index, or 0 for a cold item."""
  return index * (index <= V).astype(index.dtype)


def with_rows(batch: Batch, V: int, keeps: bool) -> Batch:
  """Returns a batch with rows in place of indices in `item` and the histories that it has.

  Args:
    batch: with the features of the items. V: the padding. keeps: whether the indices stay as
      `item_index`, `history_index` and so on, for the vectors of items.
  """
  names = [name for name in batch if name == 'item' or is_history(name)]
  indices = {f'{name}_index': batch[name] for name in names} if keeps else {}
  return batch | indices | {name: rows_of(batch[name], V) for name in names}


def is_history(name: str) -> bool:
  """Whether an array has the items of a history, the main or a named one (named_histories.py)."""
  named, _, array = name.rpartition(':')
  return array == 'history' and (not named or named.isidentifier())
