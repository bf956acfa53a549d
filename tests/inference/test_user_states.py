"""States updated piece by piece score like the whole history."""

import functools

import jax
import numpy as np
import pytest

from lmn_jax import config as configs
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.inference.user_states import StatefulModel
from lmn_jax.layers.basic import Schema
from lmn_jax.models import registry
from lmn_jax.training import program
from lmn_jax.training.trainer import compile_program
from tests.runs import but_slow, mesh_of

V, U, T, LANES, C = 30, 6, 4, 4, 5
SCHEMA = Schema((('user', U), ('item', V)))


@functools.cache
def built(name, mesh_shape=(1, 1)):
  """Returns (model, trainer, state, stateful model), with weights that distinguish events."""
  config = configs.base(name, 'next_item', steps=1)
  config.model.update(dict(width=6, scale=1.0))
  model = registry.build(config.model.to_dict(), SCHEMA, 'next_item')
  shapes = {name: jax.ShapeDtypeStruct((LANES, T), np.int32) for name in ('item', 'target')}
  shapes['first'] = jax.ShapeDtypeStruct((LANES,), bool)
  shapes['user'] = jax.ShapeDtypeStruct((LANES,), np.int32)
  mesh = mesh_of(*mesh_shape)
  trainer = compile_program(program.make(config, model, shapes, mesh))
  return model, trainer, trainer.init(0), StatefulModel(model, trainer, mesh, T, LANES)


def slow_scores(name, items, row, candidates):
  """Returns scores of one user: their history in segments, or its newest window, in lane 0."""
  model, trainer, state, _ = built(name)
  if not len(items):
    return np.zeros(len(candidates), np.float32)
  if not model.whole:
    items = items[-T:]
  carry = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype),
    jax.eval_shape(model.carry, {'item': jax.ShapeDtypeStruct((LANES, T), np.int32)}),
  )
  for begin in range(0, len(items), T):
    piece = items[begin : begin + T]
    item_BT = np.full((LANES, T), V, np.int32)
    item_BT[0, : len(piece)] = piece
    batch = dict(item=item_BT, first=np.full(LANES, begin == 0), user=np.full(LANES, row, np.int32))
    vectors, carry = trainer.stream(state, carry, meshes.place(mesh_of(1), batch))
  rows = np.asarray(state.tables['item'].rows_RD)
  return rows[candidates] @ np.asarray(vectors)[0, len(piece) - 1]


def events_of(*users):
  return [{'item': np.array(items, np.int64)} for items in users]


def histories(seed=0):
  """Returns each user's history, and the same cut at random into pieces, some of them empty."""
  rng = np.random.default_rng(seed)
  whole = [rng.integers(0, V, n) for n in (0, 1, T, T + 1, 2 * T, 3 * T + 2, 2)]
  cuts = [np.sort(rng.integers(0, len(x) + 1, 2)) for x in whole]
  return whole, [np.split(x, cut) for x, cut in zip(whole, cuts, strict=True)]


@pytest.mark.parametrize('name', but_slow(['dman', 'gru4rec', 'shan', 'hpmn', 'sasrec'], {0, 2, 4}))
def test_updates_in_pieces_score_like_the_whole_history(name):
  _, _, state, stateful = built(name)
  whole, pieces = histories()
  row = np.arange(len(whole)) % U
  states = stateful.empty(row)
  for turn in range(3):
    states = stateful.update(state, states, [{'item': piece[turn]} for piece in pieces])
  candidates = np.random.default_rng(1).integers(1, V, (len(whole), C))
  scores = stateful.score(state, states, candidates)
  expected = [
    slow_scores(name, items, int(r), some)
    for items, r, some in zip(whole, row, candidates, strict=True)
  ]
  np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
  assert np.all(scores[0] == 0) and np.ptp(scores[5]) > 1e-3


@pytest.mark.slow
def test_scores_on_a_mesh_equal_those_on_one_device():
  scores = []
  whole, _ = histories()
  candidates = np.random.default_rng(1).integers(1, V, (len(whole), C))
  for mesh_shape in ((1, 1), (2, 4)):
    _, _, state, stateful = built('dman', mesh_shape)
    states = stateful.update(
      state, stateful.empty(np.zeros(len(whole))), [{'item': x} for x in whole]
    )
    scores.append(stateful.score(state, states, candidates))
  np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5, atol=1e-5)


def test_update_does_not_change_its_arguments():
  _, _, state, stateful = built('dman')
  states = stateful.update(state, stateful.empty(np.zeros(2)), events_of(range(1, 7), range(1, 3)))
  before = jax.tree.map(np.copy, states)
  after = stateful.update(state, states, events_of(range(1, 9), range(0)))
  jax.tree.map(np.testing.assert_array_equal, states, before)
  assert after.segments.tolist() == [3, 0] and after.held.tolist() == [2, 2]
  # The second user has no new event.
  same = jax.tree.map(lambda new, old: np.array_equal(new[1], old[1]), after, before)
  assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
  'bad, message', [(V, '30 is not in the vocabulary; give rows 0 to 29'), (-1, '-1 is')]
)
def test_events_outside_the_vocabulary_are_refused(bad, message):
  _, _, state, stateful = built('dman')
  with pytest.raises(UserError, match=message):
    stateful.update(state, stateful.empty(np.zeros(1)), events_of([1, bad]))


@pytest.mark.parametrize(
  'bad, message', [(V, '30 is not in'), (0, '0 is not in the vocabulary; give rows 1 to')]
)
def test_candidates_outside_the_vocabulary_are_refused(bad, message):
  _, _, state, stateful = built('dman')
  with pytest.raises(UserError, match=f'candidate: item row {message}'):
    stateful.score(state, stateful.empty(np.zeros(1)), np.array([[1, bad]]))


def test_candidates_that_are_not_integers_are_refused():
  _, _, state, stateful = built('dman')
  with pytest.raises(UserError, match='must be integers, not float64'):
    stateful.score(state, stateful.empty(np.zeros(1)), np.array([[1.5]]))
