"""Reads, taps and summed duplicates against numpy; padding reads zeros and writes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmn_jax import table
from lmn_jax.models.ctr import TableSpec

SPEC = TableSpec(10, 3, 0.1)


def fresh():
  return table.init(SPEC, jax.random.key(0), optax.sgd(1.0), devices=8)


def test_rows_are_padded_for_any_mesh():
  assert table.padded_rows(10, 8) == 512
  assert table.padded_rows(512, 8) == 512
  assert table.padded_rows(513, 8) == 1024
  assert table.padded_rows(10, 6) % 6 == 0


def test_values_do_not_depend_on_the_padding():
  a = table.init(SPEC, jax.random.key(0), optax.sgd(1.0), devices=1).rows_RD[:10]
  b = table.init(SPEC, jax.random.key(0), optax.sgd(1.0), devices=3).rows_RD[:10]
  np.testing.assert_array_equal(a, b)


def test_padding_ids_read_zeros():
  rows = jnp.ones((512, 3))
  found = table.gather(rows, jnp.array([[0, 9], [10, 511]]), 10)
  np.testing.assert_array_equal(found, np.array([[[1] * 3, [1] * 3], [[0] * 3, [0] * 3]]))


def test_gradient_of_the_tap_is_the_gradient_of_the_rows():
  ids = jnp.array([[1, 4, 4], [10, 0, 4]])
  weights = jnp.array([[0.5, 1.0, 2.0], [1.0, -1.0, 3.0]])
  t = fresh()

  def plain(rows):
    one = jnp.where((ids < 10)[..., None], rows[jnp.minimum(ids, 9)], 0)
    return jnp.sum(jnp.sin(one)) + jnp.sum(jnp.cos(jnp.einsum('bk,bkd->bd', weights, one)))

  def tapped(taps):
    read = table.Reader({'t': t}, {'t': SPEC}, taps)
    return jnp.sum(jnp.sin(read('t', ids))) + jnp.sum(jnp.cos(read('t', ids, weights))), read.used

  asked = jax.ShapeDtypeStruct(ids.shape, ids.dtype)
  taps = table.zero_taps({'t': [asked, asked]}, {'t': SPEC})
  (value, used), grads = jax.value_and_grad(tapped, has_aux=True)(taps)
  assert float(value) == pytest.approx(float(plain(t.rows_RD[:10])), rel=1e-6)
  flat_ids = jnp.concatenate([x.reshape(-1) for x in used['t']])
  flat = jnp.concatenate([g.reshape(-1, 3) for g in grads['t']])
  summed = table.sum_duplicates(flat_ids, flat, 10, 512)
  dense = np.zeros((513, 3), np.float32)
  np.add.at(dense, np.asarray(summed.ids_N), np.asarray(summed.grads_ND))
  np.testing.assert_allclose(dense[:10], jax.grad(plain)(t.rows_RD[:10]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('R', [16, 64 * 40 + 512])  # through an array of R integers; by a sort
@given(ids=st.lists(st.integers(0, 14), min_size=40, max_size=40), seed=st.integers(0, 100))
def test_duplicates_are_summed_exactly_once(R, ids, seed):
  """Ids from 12 on are padding."""
  grads = np.random.default_rng(seed).integers(-9, 9, (40, 2)).astype(np.float32)
  found = jax.device_get(summed(np.array(ids, np.int32), grads, 12, R))
  kept = found.ids_N < R
  assert sorted(found.ids_N[kept]) == sorted({i for i in ids if i < 12})
  want = {i: grads[np.array(ids) == i].sum(0) for i in ids if i < 12}
  for i, g in zip(found.ids_N[kept], found.grads_ND[kept], strict=True):
    np.testing.assert_array_equal(g, want[i])


summed = jax.jit(table.sum_duplicates, static_argnums=(2, 3))
