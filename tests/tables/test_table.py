"""Rows by id and summed duplicates against numpy; padding reads zeros and writes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmn_jax.tables import table
from lmn_jax.tables.spec import TableSpec
from tests.blocks import set_sizes

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
  gathered = table.gather(rows, jnp.array([[0, 9], [10, 511]]), 10)
  np.testing.assert_array_equal(gathered, np.array([[[1] * 3, [1] * 3], [[0] * 3, [0] * 3]]))


@pytest.mark.parametrize('R', [16, 4096])  # 16: an id is its own hash; 4096: ids are hashed
@given(ids=st.lists(st.integers(0, 14), min_size=40, max_size=40), seed=st.integers(0, 100))
def test_duplicates_are_summed_exactly_once(R, ids, seed):
  """Ids from 12 on are padding."""
  grads = np.random.default_rng(seed).integers(-9, 9, (40, 2)).astype(np.float32)
  result = jax.device_get(sum_duplicates(np.array(ids, np.int32), grads, 12, R))
  used = result.ids_N < R
  assert sorted(result.ids_N[used]) == sorted({i for i in ids if i < 12})
  want = {i: grads[np.array(ids) == i].sum(0) for i in ids if i < 12}
  for i, g in zip(result.ids_N[used], result.grads_ND[used], strict=True):
    np.testing.assert_array_equal(g, want[i])


sum_duplicates = jax.jit(table.sum_duplicates, static_argnums=(2, 3))


@pytest.mark.parametrize('places', [0, 8])  # 0: all ids collide in two slots, turn after turn
def test_all_reads_of_an_id_have_one_owner(monkeypatch, places):
  monkeypatch.setattr(table, 'PLACES_PER_READ', places)
  R = 2**30
  ids = np.random.default_rng(0).integers(R - 150, R + 50, 300).astype(np.int32)
  owners = np.asarray(table.owners(jnp.asarray(ids), R))
  np.testing.assert_array_equal(ids[owners], ids)
  for same in np.unique(ids):
    owners_of_id = owners[ids == same]
    assert len(set(owners_of_id.tolist())) == (1 if same < R else len(owners_of_id))


def test_owners_by_an_array_of_all_rows_need_no_loop(monkeypatch):
  set_sizes(monkeypatch, owner_rows=2**16)
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 2**16 + 50, 300), jnp.int32)
  ids = ids.at[150:].set(ids[:150])
  assert 'while' not in str(jax.make_jaxpr(lambda ids: table.owners(ids, 2**16))(ids))
  expected = [k if i >= 2**16 else k + 150 * (k < 150) for k, i in enumerate(ids.tolist())]
  np.testing.assert_array_equal(table.owners(ids, 2**16), expected)  # the highest index owns


@pytest.mark.usefixtures('uncached')
def test_memory_of_owners_does_not_depend_on_the_table():
  ids = jax.ShapeDtypeStruct((1000,), jnp.int32)
  compiled = jax.jit(table.owners, static_argnums=1).lower(ids, 2**30).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 200_000


@pytest.mark.usefixtures('uncached')
def test_owners_in_a_small_table_need_a_place_for_each_row():
  """The shard of a small table has a few rows, and the reads of a whole batch."""
  ids = jax.ShapeDtypeStruct((20_000,), jnp.int32)
  compiled = jax.jit(table.owners, static_argnums=1).lower(ids, 8).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 20_000 * table.PLACES_PER_READ * 4


@pytest.mark.usefixtures('uncached')
def test_creating_a_table_needs_little_more_memory_than_the_table():
  """Otherwise a table that fits for training could not be created."""
  spec = TableSpec(2**16, 32, 0.1)

  def create(devices):
    return jax.jit(lambda key: table.init(spec, key, optax.sgd(1.0), devices).rows_RD)

  compiled = create(1).lower(jax.random.key(0)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2**16 * 32 * 4 / 4
  np.testing.assert_array_equal(create(1)(jax.random.key(0)), create(8)(jax.random.key(0)))


def test_initial_rows_are_normal_and_differ():
  spec = TableSpec(2000, 16, 0.5)
  rows = np.asarray(table.init(spec, jax.random.key(0), optax.sgd(1.0), 1).rows_RD)
  assert rows.std() == pytest.approx(0.5, rel=0.02) and abs(rows.mean()) < 0.01
  assert len(np.unique(rows)) > 0.99 * rows.size
