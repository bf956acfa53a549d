"""Id dropout: in training, some targets are treated as cold items, which have no row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lmn_jax.data.item_index import is_history


def drop_item_ids(key: Array, batch: dict[str, Array], rate: float, V: int) -> dict[str, Array]:
  """Returns a batch in which some targets have the row of the unknown item, and their features.

      i'   = 0 if d else i                  d ~ Bernoulli(rate), for each target i
      i'_l = 0 if d and i_l = i else i_l    events of the same item in the history

  So row 0 is trained to stand for an item of which only features and vectors are known, as an item
  that training never sees is at prediction (DropoutNet, Volkovs et al., NeurIPS 2017, section 4.1).

  The paper drops the whole vector of preferences of items and of users; here it is the row of the
  item alone, the value in its place is learned and not zero, and an item that is dropped as a
  target is dropped in that history, too, as a cold item is cold in both. [ours]

  Args:
    key: PRNG key. batch: with `item` [B] or [B, Q] and `history` [B, L], and named histories, rows;
      `item_index`, `history_index` and so on, by which vectors are read, stay. rate: in [0, 1]. V:
      the padding.
  """
  item = batch['item']
  drop = (jax.random.uniform(key, item.shape) < rate) & (item < V)
  item_BQ, drop_BQ = (x.reshape(len(item), -1) for x in (item, drop))
  rows = {'item': jnp.where(drop, 0, item)}
  for name in filter(is_history, batch):
    history_BL = batch[name]
    same_BQL = history_BL[:, None, :] == item_BQ[:, :, None]
    dropped_BL = jnp.any(same_BQL & drop_BQ[:, :, None], axis=1)
    rows[name] = jnp.where(dropped_BL, 0, history_BL)
  return {f'{name}_index': batch[name] for name in rows} | batch | rows
