"""Blocks of every platform's sizes give the results of the plain formulas, losses and gradients."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmn_jax
from lmn_jax.distributed import block_sizes
from lmn_jax.distributed import mesh as meshes
from lmn_jax.evaluation import ranking, top_items
from lmn_jax.layers import losses, product_keys, self_attention, target_attention
from lmn_jax.layers.target_attention import Queries, Unit
from lmn_jax.tables import embedding_bag
from tests.blocks import set_sizes
from tests.runs import mesh_of
from tests.test_architecture import TREES

# Of these, no size divides the shapes of the tests.
SMALL = dict(
  unit_pairs=8, unit_positions=3, unit_floats=7 * 2 * 3 * 5, attention_whole=0,
  attention_block=3 * 2 * 13**2, causal_pieces=3, loss_positions=5, loss_scores=4 * 17,
  ranking_scores=5 * 4, bag_rows=3, bag_floats=2 * 11 * 4, key_group=2,
)  # fmt: skip


@pytest.fixture(params=['gpu', 'tpu', 'small'])
def platform(request, monkeypatch):
  """The sizes of a platform; or, of a GPU, sizes that make several blocks of the tests' shapes."""
  name = 'gpu' if request.param == 'small' else request.param
  set_sizes(monkeypatch, name, **(SMALL if request.param == 'small' else {}))
  return name


def normal(*shape):
  return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def check_equal(function, formula, arguments, rtol=1e-5, atol=1e-5):
  """Compares values and gradients of `sum cos(f(arguments))`."""

  def graded(f):
    def loss(arguments):
      return jnp.sum(jnp.cos(f(*arguments)))

    return jax.jit(jax.value_and_grad(loss))(arguments)

  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol),
    graded(function), graded(formula),
  )  # fmt: skip


@pytest.mark.parametrize('Q', [1, 3])
def test_target_attention(platform, Q):
  B, L, D, H = 16, 13, 4, 5
  queries = Queries(normal(B, Q, D), normal(B, Q, D) + 1)
  unit = Unit(normal(4 * D, H), normal(H), normal(H, 1), normal(1))

  def blocks(v_BLD, queries, unit):
    scores_BLQ, v_BLD = target_attention.unit_scores(v_BLD, queries, unit, 'sigmoid')
    return target_attention.weighted_sum(scores_BLQ, v_BLD)

  def formula(v_BLD, queries, unit):
    q, m = (x[:, None] for x in queries)
    v = v_BLD[:, :, None]
    parts = [jnp.broadcast_to(x, (B, L, Q, D)) for x in (q - v, q * v, m - v, m * v)]
    hidden = jax.nn.sigmoid(jnp.concatenate(parts, axis=-1) @ unit.w1_4DH + unit.b1_H.reshape(H))
    scores_BLQ = (hidden @ unit.w2_H1 + unit.b2_1)[..., 0]
    return jnp.einsum('blq,bld->bqd', scores_BLQ, v_BLD)

  with jax.numpy_rank_promotion('allow'):
    check_equal(blocks, formula, (normal(B, L, D), queries, unit), atol=1e-4)


def test_packed_causal_attention(platform):
  B, T, H, E = 7, 13, 2, 4
  begin_BT = jnp.asarray(np.where(np.arange(T) < 5, 0, 5) * np.ones((B, 1)), jnp.int32)
  begin_BT = begin_BT.at[0].set(0)

  def blocks(q, k, v):
    return self_attention.causal_attention(q, k, v, begin_BT)

  def formula(q, k, v):
    at = jnp.arange(T)
    seen = (at[None, None] <= at[None, :, None]) & (at[None, None] >= begin_BT[:, :, None])
    score = jnp.where(seen[:, None], jnp.einsum('bthe,bshe->bhts', q, k) / E**0.5, -jnp.inf)
    return jnp.einsum('bhts,bshe->bthe', jax.nn.softmax(score), v)

  check_equal(blocks, formula, [normal(B, T, H, E) + x for x in (0, 0.5, 1)])


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-5), ('bfloat16', 0.03)])
def test_softmax_over_all_items(platform, dtype, tolerance):
  """bfloat16 rounds vectors, rows and probabilities, each by at most 2^-8 of its value."""
  B, T, D, V = 3, 7, 4, 17
  rng = np.random.default_rng(0)
  target_BT = jnp.asarray(rng.integers(1, V, (B, T)), jnp.int32)
  weight_BT = jnp.asarray(rng.integers(0, 3, (B, T)), jnp.float32)

  def blocks(v_BTD, rows_VD):
    return losses.softmax_loss(v_BTD, target_BT, weight_BT, rows_VD, jnp.dtype(dtype))

  def formula(v_BTD, rows_VD):
    nats = -jax.nn.log_softmax(v_BTD @ rows_VD[1:].T)
    nats_BT = jnp.take_along_axis(nats, target_BT[:, :, None] - 1, axis=2)[..., 0]
    return jnp.sum(weight_BT * nats_BT) / jnp.sum(weight_BT)

  check_equal(blocks, formula, (normal(B, T, D), normal(V, D)), tolerance, tolerance)


def test_the_products_of_the_loss_are_float32_on_cpu():
  def loss(dtype):
    weight_BT = jnp.ones((2, 3))
    target_BT = jnp.ones((2, 3), jnp.int32)
    return losses.softmax_loss(normal(2, 3, 4), target_BT, weight_BT, normal(7, 4), dtype)

  assert float(loss(jnp.bfloat16)) == float(loss(jnp.float32))


def test_weighted_reads(platform):
  V, D, T, K = 9, 4, 11, 8
  rows_RD = normal(V, D)
  ids_TK = jnp.asarray(np.random.default_rng(0).integers(0, V + 1, (T, K)), jnp.int32)

  def blocks(weights_TK):
    return embedding_bag.read(mesh_of(1), V, rows_RD, ids_TK, weights_TK)

  def formula(weights_TK):
    rows_TKD = jnp.where(ids_TK[:, :, None] < V, rows_RD[jnp.minimum(ids_TK, V - 1)], 0)
    return jnp.einsum('tk,tkd->td', weights_TK, rows_TKD)

  check_equal(blocks, formula, (normal(T, K),))


def test_scores_of_the_product_keys(platform):
  H, Q, E, N, K = 2, 5, 3, 16, 7
  place_H2QK = jnp.asarray(np.random.default_rng(0).integers(0, N, (H, 2, Q, K)), jnp.int32)

  def blocks(query_H2QE, keys_H2NE):
    axis_H2QN = jax.lax.stop_gradient(jnp.einsum('haqe,hane->haqn', query_H2QE, keys_H2NE))
    return product_keys.scores_at(query_H2QE, keys_H2NE, axis_H2QN, place_H2QK)

  def formula(query_H2QE, keys_H2NE):
    axis_H2QN = jnp.einsum('haqe,hane->haqn', query_H2QE, keys_H2NE)
    return jnp.take_along_axis(axis_H2QN, place_H2QK, axis=-1)

  check_equal(blocks, formula, (normal(H, 2, Q, E), normal(H, 2, N, E)))


def test_ranks_and_best_items(platform):
  """Other numbers of items for each platform: compiled functions are shared between calls."""
  V, D, Q, K = 23 + len(meshes.platform()) + block_sizes.sizes().bag_rows, 4, 5, 6
  rows_VD, query_QD = normal(V, D), normal(Q, D)
  target_Q, nothing = jnp.arange(1, Q + 1), jnp.full((Q, 1), V, jnp.int32)
  score_QV = np.asarray(query_QD @ rows_VD.T)
  rank_Q = ranking.ranks(rows_VD, query_QD, target_Q, nothing, mesh_of(1), V)
  none_seen = [np.zeros(0, np.int64)] * Q
  np.testing.assert_array_equal(rank_Q, ranking.ranks_of(score_QV, np.arange(1, Q + 1), none_seen))
  query_P, seen_P = jnp.zeros(1, jnp.int32), jnp.full(1, V, jnp.int32)
  score_QK, _ = top_items.top_items(rows_VD, query_QD, query_P, seen_P, mesh_of(1), V, K)
  np.testing.assert_allclose(score_QK, -np.sort(-score_QV[:, 1:])[:, :K], rtol=1e-5)


@pytest.mark.parametrize('platform', meshes.PLATFORMS)
@pytest.mark.parametrize('L, Q, H', [(1, 1, 1), (50, 1, 32), (1000, 1, 16), (10_000, 200, 64)])
def test_no_block_of_target_attention_grows_with_the_batch(monkeypatch, platform, L, Q, H):
  set_sizes(monkeypatch, platform)
  sizes, D = block_sizes.sizes(), 8
  most = max(2 * sizes.unit_floats, H * max(sizes.unit_pairs, Q * sizes.unit_positions))

  def check(v_BLD, q_BQD, *unit):
    b, T = target_attention.block_shape(v_BLD, Queries(q_BQD, None), Unit(*unit))
    assert 1 <= b <= B and 1 <= T <= L
    assert b * T * Q * H <= most

  for B in (1, 2**10, 2**30):
    shapes = (B, L, D), (B, Q, D), (4 * D, H), (H,), (H, 1), (1,)
    jax.eval_shape(check, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def test_every_platform_has_sizes_and_every_size_is_used():
  assert set(block_sizes.SIZES) == set(meshes.PLATFORMS)
  for sizes in block_sizes.SIZES.values():
    none = dict(fused_positions=1, owner_rows=1, export_chunks=1, export_units=1)  # 0 is none
    assert min(sizes) >= 0 and min(sizes._replace(**none)) >= 1
  read = {
    node.attr
    for module, tree in TREES.items()
    if module != 'distributed.block_sizes'
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute)
  }
  assert set(block_sizes.BlockSizes._fields) <= read


def test_the_documentation_has_every_size():
  page = Path(lmn_jax.__file__).parent.parent / 'docs/how_to/accelerators.md'
  lines = page.read_text(encoding='utf-8').splitlines()
  for name in block_sizes.BlockSizes._fields:
    values = [f'{getattr(block_sizes.SIZES[key], name):,}' for key in meshes.PLATFORMS]
    assert f'| `{name}` | {" | ".join(values)} |' in lines


def test_sizes_of_blocks_are_in_the_table_only():
  """No file of equations has a power of two as a constant of its own, but for rows of a file."""
  constants = {
    f'{module}.{target.id}'
    for module, tree in TREES.items()
    if module.split('.')[0] in ('tables', 'layers', 'models', 'evaluation')
    for node in tree.body
    if isinstance(node, ast.Assign)
    and any(isinstance(x, ast.BinOp) and isinstance(x.op, ast.Pow) for x in ast.walk(node.value))
    for target in node.targets
    if isinstance(target, ast.Name)
  }
  assert constants == {'evaluation.scored_rows.ROWS'}
