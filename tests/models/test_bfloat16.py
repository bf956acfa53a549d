"""Every model of both tasks in bfloat16 against float32: loss, gradients, learning, types."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from lmn_jax.data import prepare
from lmn_jax.distributed import mesh as meshes
from lmn_jax.models.registry import CLICK, NEXT_ITEM
from lmn_jax.training import program as programs
from lmn_jax.training import setup as setups
from lmn_jax.training import update
from tests.runs import promotion_of, tiny_config, tiny_next

STEPS, BATCHES = 30, 4
FIRST, LAST = slice(BATCHES), slice(-BATCHES, None)  # one pass over the batches
RATE = 0.3  # of SGD, whose first step is proportional to the gradient
# Bound on |gradient in bfloat16 - gradient| / |gradient|. A unit of a ReLU or a hit of a search
# that changes sides in one of 32 examples changes the whole gradient of that example.
GRADIENTS = dict.fromkeys(('pooling', 'sasrec', 'caser'), 0.2)
# Least share of multiplications in bfloat16. The softmax over items and the policy of UBR4CTR, most
# of its products, are float32.
SHARE = dict(ubr4ctr=0.05)
FAST = {('click', 'pooling'), ('next_item', 'gru4rec')}
EVERY = [
  pytest.param(task, name, marks=() if (task, name) in FAST else pytest.mark.slow)
  for task, models in (('click', CLICK), ('next_item', NEXT_ITEM))
  for name in models
]


class Training(NamedTuple):
  """losses: the objective at each step. moved: the first step of all weights, one vector.

  types: of the state. shapes: of the gradients (update.Gradients). products: for each product of a
  step, (types of both factors, multiplications).
  """

  losses: np.ndarray
  moved: np.ndarray
  types: dict
  shapes: update.Gradients
  products: list


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  folder = tmp_path_factory.mktemp('stores')
  return {
    task: prepare.prepare(make().data, folder)
    for task, make in (('click', tiny_config), ('next_item', tiny_next))
  }


def train(task, name, store, bf16):
  make = tiny_config if task == 'click' else tiny_next
  config = make(name, width=8, scale=0.5, bf16=bf16)
  for group in ('dense', 'embedding', 'memory'):
    config.optimizer[group].update(dict(name='sgd', rate=RATE))
  with promotion_of(config):
    setup = setups.set_up(config, store, jax.devices()[:1])
    batches = [meshes.place(setup.mesh, setup.sources['train'][k]) for k in range(BATCHES)]
    state = setup.trainer.init(0)
    program = programs.make(config, setup.model, batches[0], setup.mesh)
    with meshes.use_mesh(setup.mesh):
      step = jax.make_jaxpr(update.loss_and_gradients, static_argnums=0, return_shape=True)
      jaxpr, shapes = step(program, state, batches[0])
    losses, weights = [], [weights_of(state)]
    for k in range(STEPS):
      state, metrics = setup.trainer.update(state, batches[k % BATCHES])
      losses.append(float(metrics[f'loss/{setup.model.objective}']))
      if k == 0:
        weights.append(weights_of(state))
  types = {jax.tree_util.keystr(path): x.dtype for path, x in jax.tree.leaves_with_path(state)}
  moved = weights[1] - weights[0]
  return Training(np.array(losses), moved, types, shapes, list(products_of(jaxpr.jaxpr)))


def weights_of(state):
  arrays = state.params, {name: t.rows_RD for name, t in state.tables.items()}
  return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(arrays)])


def products_of(jaxpr):
  """Yields (types of both factors, multiplications) of each product, also those within loops."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (summed, _), _ = equation.params['dimension_numbers']
      left = equation.invars[0].aval
      size = np.prod(equation.outvars[0].aval.shape) * np.prod([left.shape[k] for k in summed])
      yield {x.aval.dtype.name for x in equation.invars}, size
    inner = list(equation.params.values())
    for value in jax.tree.leaves(inner, is_leaf=lambda x: hasattr(x, 'eqns')):
      if hasattr(value, 'eqns'):
        yield from products_of(value)


@pytest.mark.parametrize('task, name', EVERY)
def test_a_model_learns_as_in_float32(task, name, stores):
  exact, rounded = (train(task, name, stores[task], bf16) for bf16 in (False, True))
  assert rounded.losses[0] == pytest.approx(exact.losses[0], rel=2e-3)
  assert rounded.losses[0] != exact.losses[0]
  error = np.linalg.norm(rounded.moved - exact.moved) / np.linalg.norm(exact.moved)
  assert error < GRADIENTS.get(name, 0.05)
  first, last = (exact.losses[part].mean() for part in (FIRST, LAST))
  assert last < 0.99 * first
  assert abs(rounded.losses[LAST].mean() - last) < 0.1 * (first - last)

  # Weights, optimizer, statistics and carried states; scores and losses; gradients.
  assert rounded.types == exact.types
  outputs, dense, taps = rounded.shapes.outputs, rounded.shapes.dense, rounded.shapes.taps
  float32 = outputs.value, outputs.losses, outputs.monitors, dense, taps
  assert {x.dtype.name for x in jax.tree.leaves(float32)} == {'float32'}
  types = {'float32', 'int32', 'bool'}
  assert {x.dtype.name for x in jax.tree.leaves(outputs.carry)} <= types

  share = sum(size for kinds, size in rounded.products if kinds == {'bfloat16'})
  share /= sum(size for _, size in rounded.products)
  assert share > SHARE.get(name, 0.2)
  assert all(kinds == {'float32'} for kinds, _ in exact.products)
