"""Target attention in blocks against the plain [B, L, 4D] forms of DIN and SAM."""

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers import target_attention
from lmn_jax.layers.target_attention import TargetAttention
from tests.blocks import set_sizes
from tests.runs import but_slow


def plain(params, q, v, mask, m, gate, bias=None):
  """The formulas of Zhou et al. 2018, or with a memory those of a pass of SAM: [B, D].

  bias: [B, L], added to the activations.
  """
  q = jnp.broadcast_to(q[:, None], v.shape)
  x = [q, v, q - v, q * v]
  if m is not None:
    m = jnp.broadcast_to(m[:, None], v.shape)
    x = [q - v, q * v, m - v, m * v]
  hidden = jax.nn.sigmoid(jnp.concatenate(x, axis=-1) @ params['w1'] + params['b1'][None, None])
  w = (hidden @ params['Dense_0']['kernel'] + params['Dense_0']['bias'][None, None])[..., 0]
  if bias is not None:
    w = w + bias
  if gate == 'softmax':
    w = jnp.exp(w) * mask
    w = w / jnp.maximum(w.sum(1, keepdims=True), 1e-9)
  if gate == 'sigmoid':
    w = 1 / (1 + jnp.exp(-w))
  return jnp.sum((w * mask)[..., None] * v, axis=1)


# Histories of all, two and no behaviours.
MASK = np.arange(5)[None] < np.array([5, 2, 0])[:, None]


@pytest.mark.parametrize(
  'block', but_slow([((3, 5),), ((3, 3),), ((2, 5),), ((2, 2),), ((1, 1),)], {3})
)
@pytest.mark.parametrize('gate, memory', [('none', False), ('softmax', False), ('sigmoid', True)])
def test_blocks_equal_the_plain_form(monkeypatch, gate, memory, block):
  """Two queries for each example, without blocks and in blocks with and without overlap."""
  monkeypatch.setattr(target_attention, 'block_shape', lambda *_: block)
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.normal(size=(3, 2, 6)), jnp.float32)
  v = jnp.asarray(rng.normal(size=(3, 5, 6)), jnp.float32)
  m = jnp.asarray(rng.normal(size=(3, 2, 6)), jnp.float32) if memory else None
  unit = TargetAttention(4, gate=gate)
  params = unit.init(jax.random.key(0), q, v, jnp.asarray(MASK), m)['params']
  params = jax.tree.map(lambda x: x + 0.1, params)  # no bias is 0

  def ours(params, q, v, m):
    return unit.apply({'params': params}, q, v, jnp.asarray(MASK), m)[0]

  def theirs(params, q, v, m):
    mask = jnp.asarray(MASK, jnp.float32)
    each = [plain(params, q[:, c], v, mask, m if m is None else m[:, c], gate) for c in range(2)]
    return jnp.stack(each, axis=1)

  chex.assert_trees_all_close(ours(params, q, v, m), theirs(params, q, v, m), atol=1e-5)
  grads = [
    jax.grad(lambda *a, f=f: jnp.sum(jnp.cos(f(*a))), (0, 1, 2, 3) if memory else (0, 1, 2))(
      params, q, v, m
    )
    for f in (ours, theirs)
  ]
  chex.assert_trees_all_close(*grads, atol=1e-5, rtol=1e-4)
  assert not np.asarray(ours(params, q, v, m))[2].any(), 'an empty history must give zeros'


@pytest.mark.parametrize('length', ['64*l', '130'])
@pytest.mark.parametrize('platform', meshes.PLATFORMS)
def test_exports_for_every_platform_equal_the_formula(monkeypatch, platform, length):
  set_sizes(monkeypatch, platform)
  L = 128 if 'l' in length else int(length)
  rng = np.random.default_rng(1)
  q, v = (jnp.asarray(rng.normal(size=(2, n, 6)), jnp.float32) for n in (3, L))
  mask = jnp.arange(L)[None] < jnp.asarray([[L - 1], [5]])
  unit = TargetAttention(4, gate='softmax')
  variables = unit.init(jax.random.key(0), q, v, mask, None)
  scope = jax.export.SymbolicScope()
  shapes = [
    jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), x.dtype)
    for shape, x in (('b,q,6', q), (f'b,{length},6', v), (f'b,{length}', mask))
  ]
  exported = jax.export.export(jax.jit(lambda *x: unit.apply(variables, *x, None)[0]))(*shapes)
  expected = unit.apply(variables, q, v, mask, None)[0]
  chex.assert_trees_all_close(exported.call(q, v, mask), expected, atol=1e-6)


@pytest.mark.parametrize('gate', ['none', 'softmax', 'sigmoid'])
def test_a_bias_is_added_to_the_activations(gate):
  rng = np.random.default_rng(0)
  q, v, bias = (
    jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 1, 6), (3, 5, 6), (3, 5))
  )
  mask, unit = jnp.asarray(MASK), TargetAttention(4, gate=gate)
  params = unit.init(jax.random.key(0), q, v, mask)['params']

  def ours(v, bias):
    return unit.apply({'params': params}, q, v, mask, bias_BL=bias)[0][:, 0]

  def theirs(v, bias):
    return plain(params, q[:, 0], v, mask.astype(jnp.float32), None, gate, bias)

  graded = [
    jax.value_and_grad(lambda *a, f=f: jnp.sum(jnp.cos(f(*a))), (0, 1))(v, bias)
    for f in (ours, theirs)
  ]
  chex.assert_trees_all_close(*graded, atol=1e-5, rtol=1e-4)


def test_blocks_equal_the_plain_form_for_fifty_thousand_events():
  """A pass of SAM in 25 chunks, the last of which overlaps, and its gradients."""
  L, D = 50_000, 4
  rng = np.random.default_rng(0)
  q, m = jnp.asarray(rng.normal(size=(2, 1, 1, D)), jnp.float32)
  v = jnp.asarray(rng.normal(size=(1, L, D)), jnp.float32)
  mask = jnp.arange(L)[None] < L - 700
  unit = TargetAttention(8, gate='sigmoid')
  params = unit.init(jax.random.key(0), q, v, mask, m)['params']

  def ours(params, v):
    return jnp.sum(jnp.cos(unit.apply({'params': params}, q, v, mask, m)[0] / 100))

  def theirs(params, v):
    out_BD = plain(params, q[:, 0], v, mask.astype(jnp.float32), m[:, 0], 'sigmoid')
    return jnp.sum(jnp.cos(out_BD / 100))

  result, reference = (jax.jit(jax.value_and_grad(f, (0, 1)))(params, v) for f in (ours, theirs))
  # Both forms have rounding errors in sums of so many terms.
  np.testing.assert_allclose(result[0], reference[0], atol=1e-3)
  for a, b in zip(jax.tree.leaves(result[1]), jax.tree.leaves(reference[1]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(b))))


def test_padding_has_no_effect():
  rng = np.random.default_rng(1)
  q = jnp.asarray(rng.normal(size=(1, 1, 4)), jnp.float32)
  v = jnp.asarray(rng.normal(size=(1, 3, 4)), jnp.float32)
  mask = jnp.array([[True, True, False]])
  unit = TargetAttention(4)
  variables = unit.init(jax.random.key(0), q, v, mask)
  a = unit.apply(variables, q, v, mask)[:2]
  b = unit.apply(variables, q, v.at[0, 2].set(100.0), mask)[:2]
  chex.assert_trees_all_equal(a, b)
