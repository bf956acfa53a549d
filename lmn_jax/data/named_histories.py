"""Named histories: the events of some behaviours, each list beside the main history of all events.

`config.data.histories = {'clicks': ('view',), 'orders': ('cart', 'buy')}` names them. A named
history has the rows of the main one with its behaviours, in the same order: (user record, time,
row). In a store and in batches it has the arrays of the main history under its own name:

  store    history.orders.arrow; offset.orders, count.orders of users; end.orders of examples
  batch    orders:history, orders:history.<item feature>, orders:event.<f>, orders:time_gap,
           orders:length, orders:total
"""

from typing import Any

import ml_collections

from lmn_jax.data import texts
from lmn_jax.errors import UserError, one_of

MAIN = ''  # the name of the main history in functions of this package


def array_of(history: str, name: str) -> str:
  """The name of an array of a batch, or of a plan; MAIN has those of batches.py."""
  return f'{history}:{name}' if history else name


def column_of(history: str, name: str) -> str:
  """The name of a column of a store; MAIN has those of store.py."""
  return f'{name}.{history}' if history else name


def staged_column(history: str) -> str:
  """The column of `interactions` that is true on rows with a behaviour of a history."""
  return f'@history.{history}'


def of_history(batch: dict[str, Any], history: str) -> dict[str, Any]:
  """The batch with a named history in place of the main one, and without the others."""
  named, plain = {}, {}
  for key, x in batch.items():
    prefix, _, name = key.partition(':')
    if prefix == history:
      named[name] = x
    elif not prefix.isidentifier() or prefix == key:  # a column of the log may have a colon
      plain[key] = x
  return plain | named


def behaviours_of(data: ml_collections.ConfigDict) -> dict[str, tuple[str, ...]]:
  """Returns named history -> its behaviours, {} if there are none.

  Raises:
    UserError: a name that is no identifier, no behaviours, or a field that contradicts.
  """
  field, named = 'config.data.histories', {}
  if len(data.histories) and not data.behaviour:
    raise UserError(
      f'{field}={dict(data.histories)!r:.80} needs config.data.behaviour, the column of types'
    )
  if len(data.histories) and data.row_history:
    raise UserError(
      f'{field}={dict(data.histories)!r:.80} contradicts '
      f'config.data.row_history={data.row_history!r}, whose events have no behaviours; remove one'
    )
  for name, behaviours in data.histories.items():
    if not name.isidentifier() or hasattr(ml_collections.ConfigDict, name):
      raise UserError(
        f'{field} has the name {name!r}; it must be letters, digits and _, and no name of a method '
        "of ConfigDict, such as 'orders'"
      )
    if isinstance(behaviours, str) or not behaviours:
      raise UserError(
        f'{field}.{name}={behaviours!r} must be a tuple of one or more behaviours, such as '
        "('cart', 'buy')"
      )
    named[name] = tuple(texts.value(behaviour, frozenset()) for behaviour in behaviours)
  for name, behaviours in named.items():
    for behaviour in behaviours if data.history_behaviours else ():
      of_main = [texts.value(x, frozenset()) for x in data.history_behaviours]
      one_of(f'{field}.{name}, of config.data.history_behaviours,', behaviour, of_main)
  return named
