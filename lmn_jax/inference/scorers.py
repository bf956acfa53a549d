"""Scores of users and items of a store by a trained model: of pairs, and the best of all items.

A row is scored on the first `end` events of its user's history in the store: those strictly before
the time of the row, or all. A click model reads the newest L of them, a next-item model all. A
next-item model continues from a state that --mode=states keeps, if all events of this state are
before the row. The states keep no times of events newer than the store's, so a row whose time is
among these is scored on the store's events only. A user of the store that training did not see has
embedding row 0 and their history; a user that is not in the store has row 0, unknown features and
no history.

Candidates are all items of the vocabulary but row 0 and, with config.exclude_seen, the items that
the user has met: those of the events above, and those that the state holds. Items with equal scores
are in the order of their rows.
"""

import ml_collections

from lmn_jax.data.store import Store
from lmn_jax.inference.click_scorer import ClickScorer
from lmn_jax.inference.next_item_scorer import NextItemScorer
from lmn_jax.inference.state_table import StateTable
from lmn_jax.training.program import State
from lmn_jax.training.setup import Setup

Scorer = ClickScorer | NextItemScorer
SCORERS = {'click': ClickScorer, 'next_item': NextItemScorer}


def make_scorer(
  config: ml_collections.ConfigDict,
  store: Store,
  setup: Setup,
  state: State,
  table: StateTable | None,
) -> Scorer:
  """Returns the scorer of the config's task.

  Args:
    config: of the run. store: its data. setup: its model and functions. state: the weights.
    table: the users' states, for next-item models; None computes them from the store's histories.
  """
  return SCORERS[config.task](config, store, setup, state, table)
