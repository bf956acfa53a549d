"""Row optimizers against dense optax; schedules; clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmn_jax.config import base
from lmn_jax.errors import UserError
from lmn_jax.tables import optimizers, table
from lmn_jax.tables.spec import TableSpec


def settings(**changes):
  config = base('pooling').optimizer
  for name, value in changes.items():
    if isinstance(value, dict):
      for field, x in value.items():
        config[name][field] = x
    else:
      config[name] = value
  return config


V, D, R, RATE = 8, 4, 512, 0.1
SPEC = TableSpec(V, D, 0.5)


def row_optimizer(name, **fields):
  return optimizers.make(settings(embedding=dict(name=name, rate=RATE) | fields), 'embedding', 100)


def steps_of(*batches):
  """(ids, a gradient for each id) of each step."""
  return [
    (jnp.array(ids, jnp.int32), jax.random.normal(jax.random.key(step), (len(ids), D)))
    for step, ids in enumerate(batches)
  ]


def on_rows(tx, steps, dtype=jnp.float32):
  """The table before the first step and after each; duplicates are summed, padding is dropped."""

  @jax.jit
  def updated(rows, ids, grads):
    return optimizers.update_rows(tx, rows, table.sum_duplicates(ids, grads, V, R))

  tables = [table.init(SPEC, jax.random.key(0), tx, 1, dtype)]
  most = max(len(ids) for ids, _ in steps)
  for ids, grads in steps:
    # Padded to one shape, so that one program is compiled; padded gradients must have no effect.
    more = most - len(ids)
    ids = np.pad(ids, (0, more), constant_values=V)
    tables.append(updated(tables[-1], ids, np.pad(grads, ((0, more), (0, 0)), constant_values=9)))
  return tables


def dense_grads(ids, grads):
  """The gradient of a table of V rows, in numpy."""
  dense = np.zeros((V + 1, D), np.float32)
  np.add.at(dense, np.asarray(ids), np.asarray(grads))
  return dense[:V]


def on_dense(tx, rows, grads):
  """Rows after dense steps of optax."""
  state = tx.init(rows)
  for g in grads:
    with jax.numpy_dtype_promotion('standard'):  # optax needs it
      updates, state = tx.update(jnp.asarray(g), state, rows)
    rows = optax.apply_updates(rows, updates)
  return rows


def rowwise_adagrad(rows, grads):
  """The equations of the paper, row by row."""
  rows, s = np.array(rows), np.zeros(len(rows), np.float32)
  for g in grads:
    for i in np.flatnonzero(np.any(g != 0, axis=1)):
      s[i] += np.mean(g[i] ** 2)
      rows[i] -= RATE * g[i] / np.sqrt(s[i])
  return rows


def torch_adagrad(rows, grads, eps=1e-10, initial_accumulator=0.0):
  """torch.optim.Adagrad by the equations of its documentation, in float64."""
  rows, s = np.array(rows, np.float64), np.full(np.shape(rows), initial_accumulator)
  for g in np.array(grads, np.float64):
    s += g**2
    rows -= RATE * g / (np.sqrt(s) + eps)
  return rows


DENSE = {
  'adam': lambda *x: on_dense(optax.adam(RATE), *x),
  'adagrad': torch_adagrad,
  'sgd': lambda *x: on_dense(optax.sgd(RATE), *x),
  'rowwise_adagrad': rowwise_adagrad,
}
# Duplicates within a step and over steps, and padding.
SOME = [[3, V, 0, 3, 3], [0], [V, V], [7, 3, 7], [5, 0, 0, 3]]
ALL = [[*range(V), V, 3, 3, 0], [*range(V), 7], [*range(V)]]


@pytest.mark.parametrize(
  'name, batches',
  [
    ('adagrad', SOME), ('sgd', SOME), ('rowwise_adagrad', SOME),
    ('adagrad', ALL), ('sgd', ALL), ('rowwise_adagrad', ALL), ('adam', ALL),
  ],
)  # fmt: skip
def test_row_updates_equal_the_dense_optimizer(name, batches):
  """Adam only where every step reads every row, because it is lazy."""
  steps = steps_of(*batches)
  tables = on_rows(row_optimizer(name), steps)
  want = DENSE[name](tables[0].rows_RD[:V], [dense_grads(*step) for step in steps])
  np.testing.assert_allclose(tables[-1].rows_RD[:V], want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(tables[-1].rows_RD[V:], tables[0].rows_RD[V:])


@pytest.mark.parametrize(
  'name, arguments, reference',
  [
    ('adam', dict(b1=0.5, eps=0.1), lambda *x: on_dense(optax.adam(RATE, 0.5, eps=0.1), *x)),
    ('adagrad', dict(eps=0.5), lambda *x: torch_adagrad(*x, eps=0.5)),
  ],
)
def test_row_optimizers_use_their_arguments(name, arguments, reference):
  steps = steps_of(*ALL)
  start, *_, end = on_rows(row_optimizer(name, arguments=arguments), steps)
  want = reference(start.rows_RD[:V], [dense_grads(*step) for step in steps])
  np.testing.assert_allclose(end.rows_RD[:V], want, rtol=1e-5, atol=1e-6)
  default = on_rows(row_optimizer(name), steps)[-1]
  assert not np.allclose(end.rows_RD[:V], default.rows_RD[:V], rtol=1e-2)


OPTAX = [
  ('adam', dict(b1=0.5, b2=0.9, eps=0.1)),
  ('sgd', dict(momentum=0.9)),
  ('sgd', dict(momentum=0.5, nesterov=True)),
  ('adamw', dict(b1=0.5, weight_decay=0.3)),
  ('nadam', dict()),
  ('lion', dict(b2=0.5)),
  ('lamb', dict()),
  ('adafactor', dict(min_dim_size_to_factor=2)),
  ('rmsprop', dict(decay=0.5, momentum=0.3)),
]


@pytest.mark.parametrize('name, arguments', OPTAX)
def test_dense_parameters_accept_any_optimizer_of_optax(name, arguments):
  """By its name and its arguments, with the rate of the schedule."""
  dense = dict(name=name, rate=RATE, arguments=arguments)
  tx = optimizers.make(settings(dense=dense, schedule='linear'), 'dense', 10)
  rows = jax.random.normal(jax.random.key(9), (V, D))
  grads = [dense_grads(*step) for step in steps_of(*ALL)]
  want = getattr(optax, name)(optax.linear_schedule(RATE, 0.0, 10), **arguments)
  updated, plain = on_dense(tx, rows, grads), on_dense(optax.sgd(RATE), rows, grads)
  np.testing.assert_allclose(updated, on_dense(want, rows, grads), rtol=1e-6)
  assert not np.allclose(updated, plain, rtol=1e-2)


def test_optax_optimizers_lists_the_functions_with_a_learning_rate():
  names = set(optimizers.optax_optimizers())
  assert names >= {'adamw', 'lion', 'nadam', 'lamb', 'adafactor', 'rmsprop', 'yogi'}
  assert not names & {*optimizers.ROW_RULES, 'scale_by_learning_rate', 'chain', 'clip', 'tree'}


def test_sgd_without_momentum_has_no_state():
  """So checkpoints of earlier versions can be restored."""
  assert optimizers.scale_by_momentum().init(jnp.ones(3)) == optax.EmptyState()


@pytest.mark.parametrize('size', [1.0, 1e-4, 1e-8, 1e-12])
def test_adagrad_equals_torch_for_gradients_of_any_size(size):
  """Gradients of memory values are about 1e-8; a weight still moves by about the rate."""
  steps = [(ids, size * grads) for ids, grads in steps_of(*ALL)]
  start, *_, end = on_rows(row_optimizer('adagrad'), steps)
  grads = [dense_grads(*step) for step in steps]
  want = torch_adagrad(start.rows_RD[:V], grads)
  moved = want - start.rows_RD[:V]
  np.testing.assert_allclose(end.rows_RD[:V] - start.rows_RD[:V], moved, rtol=1e-3, atol=1e-6)
  tx = optimizers.make(settings(dense=dict(name='adagrad', rate=RATE)), 'dense', 100)
  dense = on_dense(tx, start.rows_RD[:V], grads) - start.rows_RD[:V]
  np.testing.assert_allclose(dense, moved, rtol=1e-3, atol=1e-6)
  if size >= 1e-8:
    assert np.median(np.abs(moved)) > RATE / 2


@pytest.mark.parametrize('begin', [1e-7, 0.1])
@pytest.mark.parametrize('size', [1.0, 1e-4])
def test_adagrad_starts_at_the_initial_accumulator(size, begin):
  steps = [(ids, size * grads) for ids, grads in steps_of(*ALL)]
  start, *_, end = on_rows(row_optimizer('adagrad', initial_accumulator=begin), steps)
  grads = [dense_grads(*step) for step in steps]
  want = torch_adagrad(start.rows_RD[:V], grads, initial_accumulator=begin)
  np.testing.assert_allclose(end.rows_RD[:V], want, rtol=1e-5, atol=1e-6)
  # It equals an epsilon of this size inside the root, as in optax.
  rss = optax.chain(optax.scale_by_rss(0.0, begin), optax.scale_by_learning_rate(RATE))
  dense = on_dense(rss, start.rows_RD[:V], grads)
  np.testing.assert_allclose(end.rows_RD[:V], dense, rtol=1e-5, atol=1e-6)


def test_rowwise_adagrad_starts_at_the_initial_accumulator():
  tx = row_optimizer('rowwise_adagrad', initial_accumulator=3.0)
  start, end = on_rows(tx, [(jnp.array([2], jnp.int32), jnp.ones((1, D)))])
  moved = start.rows_RD - end.rows_RD
  np.testing.assert_allclose(moved[2], RATE / 2, rtol=1e-5)  # sqrt(3 + 1)
  assert not np.delete(moved, 2, axis=0).any()


def test_adagrad_state_has_the_structure_of_optax():
  """So a checkpoint of one can be restored by the other."""
  rows = jnp.ones((3, 2))
  with jax.numpy_dtype_promotion('standard'):
    old = optax.scale_by_rss(0.0).init(rows)
  assert jax.tree.structure(old) == jax.tree.structure(optimizers.scale_by_adagrad().init(rows))


def test_every_row_optimizer_has_a_reference():
  assert set(DENSE) == set(optimizers.ROW_RULES)


def test_lazy_adam_equals_dense_adam_on_the_gradients_of_one_row():
  """Row 5 is read at steps 3, 7 and 20, row 2 at every step."""
  steps = steps_of(*[[5, 2] if step in (3, 7, 20) else [2] for step in range(25)])
  tables = on_rows(row_optimizer('adam'), steps)
  row_grads = [grads[:1] for ids, grads in steps if 5 in ids]
  assert len(row_grads) == 3
  want = on_dense(optax.adam(RATE), tables[0].rows_RD[5:6], row_grads)
  np.testing.assert_allclose(tables[-1].rows_RD[5:6], want, rtol=1e-6)
  moved = [i for i in range(25) if np.any(tables[i].rows_RD[5] != tables[i + 1].rows_RD[5])]
  assert moved == [3, 7, 20]


def test_first_update_of_lazy_adam_has_the_size_of_the_rate_at_any_step():
  steps = steps_of(*[[step % 8] for step in range(8)])
  tables = on_rows(row_optimizer('adam'), steps)
  for step, (_, grads) in enumerate(steps):
    moved = tables[step + 1].rows_RD[step] - tables[step].rows_RD[step]
    np.testing.assert_allclose(moved, -RATE * np.sign(grads[0]), rtol=1e-4)


@pytest.mark.parametrize('name', optimizers.ROW_RULES)
def test_decay_applies_only_to_rows_that_are_read(name):
  """With a zero gradient such a row shrinks by rate * decay, with the rate of the group."""
  start, *_, end = on_rows(
    row_optimizer(name, decay=0.5), [(jnp.array([3, V, 3]), jnp.zeros((3, D)))] * 2
  )
  want = np.array(start.rows_RD)
  want[3] *= (1 - RATE * 0.5) ** 2
  np.testing.assert_allclose(end.rows_RD, want, rtol=1e-6)


@pytest.mark.parametrize('name', optimizers.ROW_RULES)
def test_bfloat16_rows_are_the_rounded_master(name):
  """The master moves as float32 rows do, up to the last bit, because the program differs."""
  tx, steps = row_optimizer(name, decay=0.1), steps_of(*SOME, *ALL)
  for exact, t in zip(on_rows(tx, steps), on_rows(tx, steps, jnp.bfloat16), strict=True):
    assert t.rows_RD.dtype == jnp.bfloat16
    np.testing.assert_allclose(t.master_RD, exact.rows_RD, rtol=5e-7, atol=1e-8)
    np.testing.assert_array_equal(t.rows_RD, exact.rows_RD.astype(jnp.bfloat16))


def test_steps_below_the_precision_of_bfloat16_add_up():
  """40 steps of 1e-4 down from 1, where bfloat16 numbers are 2^-8 = 3.9e-3 apart."""
  tx = row_optimizer('sgd')
  start = table.init(SPEC, jax.random.key(0), tx, 1, jnp.bfloat16)
  t = start._replace(rows_RD=jnp.ones_like(start.rows_RD), master_RD=jnp.ones((R, D)))
  for step in range(40):
    t = optimizers.update_rows(tx, t, table.RowGrads(jnp.array([3]), jnp.full((1, D), 1e-3)))
    assert step or np.all(t.rows_RD == 1)
  np.testing.assert_allclose(t.master_RD[3], 1 - 40e-4, rtol=1e-5)
  np.testing.assert_array_equal(t.rows_RD[3].astype(jnp.float32), 1 - 2**-8)


def leaves_by_row(tx):
  t = table.init(SPEC, jax.random.key(0), tx, 1)
  return [(x.shape, x.dtype) for x in jax.tree.leaves(t.opt) if table.by_row(x, R)]


def test_optimizer_state_is_stored_by_row():
  """So it is created sharded: the trainer shards such leaves."""
  assert leaves_by_row(row_optimizer('rowwise_adagrad')) == [((R,), jnp.float32)]
  assert leaves_by_row(row_optimizer('adam')) == [((R,), jnp.int32), ((R, 2 * D), jnp.float32)]


def test_schedules():
  def rates(kind, warmup):
    rule = optimizers.schedule(settings(schedule=kind, warmup_steps=warmup), 2.0, 100)
    return [float(rule(step)) for step in (0, 5, 10, 55, 100)]

  assert rates('constant', 0) == [2, 2, 2, 2, 2]
  assert rates('constant', 10) == pytest.approx([0, 1, 2, 2, 2])
  assert rates('linear', 10) == pytest.approx([0, 1, 2, 1, 0])
  assert rates('cosine', 10) == pytest.approx([0, 1, 2, 1, 0], abs=1e-6)


def test_frozen_rows_do_not_move():
  start, end = on_rows(optimizers.make(settings(), 'frozen', 10), steps_of([1]))
  np.testing.assert_array_equal(end.rows_RD, start.rows_RD)


def test_clip_factor_scales_the_norm_to_the_bound():
  grads = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
  norm = optax.tree.norm(grads)
  factor = optimizers.clip_factor(1.0, norm)
  assert (float(norm), float(factor)) == pytest.approx((5, 0.2))
  assert float(optimizers.clip_factor(10.0, norm)) == 1
  # The squares of such gradients exceed float32.
  assert float(optimizers.clip_factor(1.0, jnp.asarray(jnp.inf))) < 1e-30
  assert float(optimizers.clip_factor(jnp.inf, jnp.asarray(jnp.inf))) == 1


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      dict(dense=dict(name='rowwise_adagrad')),
      "dense.name='rowwise_adagrad' is for the rows of .*; use adam or adagrad or sgd",
    ),
    (dict(schedule='cosin'), "did you mean 'cosine'"),
    (dict(warmup_steps=101), r'warmup_steps=101 must be in \[0, config.steps=100\]'),
    (dict(embedding=dict(name='adamm')), "did you mean 'adam'"),
    (dict(embedding=dict(rate=0.0)), 'rate=0.0 must be positive'),
    (dict(embedding=dict(initial_accumulator=-1.0)), 'initial_accumulator=-1.0 must be 0 or more'),
    (dict(embedding=dict(initial_accumulator=float('nan'))), 'initial_accumulator=nan must be'),
    (
      dict(dense=dict(initial_accumulator=0.1)),
      "initial_accumulator=0.1 applies to adagrad and rowwise_adagrad only, .*name='adam'; set it",
    ),
    (dict(dense=dict(name='adamm')), "dense.name='adamm' is unknown; did you mean 'adam'"),
    (dict(dense=dict(name='chain')), "dense.name='chain' is unknown;"),
    (
      dict(embedding=dict(name='lion')),
      "embedding.name='lion' is for the dense parameters; for the rows of tables use adam or adagr",
    ),
    (
      dict(dense=dict(arguments=dict(b3=0.1))),
      "config.optimizer.dense.arguments of adam: field='b3' is unknown; available: b1, b2, eps",
    ),
    (
      dict(dense=dict(name='lion', arguments=dict(learning_rate=0.1))),
      "arguments of lion: field='learning_rate' is unknown; .*available: b1, b2,",
    ),
    (
      dict(embedding=dict(arguments=dict(initial_accumulator=0.1))),
      "arguments of adagrad: field='initial_accumulator' is unknown",
    ),
    (
      dict(embedding=dict(name='sgd', arguments=dict(momentum=0.1))),
      "embedding.arguments={'momentum': 0.1}: sgd takes no arguments; use {}",
    ),
    (
      dict(dense=dict(arguments=dict(b1=(1, 2)))),
      r'dense.arguments.b1=\(1, 2\) must be a number, a string, True or False',
    ),
    (
      dict(dense=dict(arguments=dict(b1='high'))),
      "dense: adam cannot be used with the arguments {'b1': 'high'}: TypeError",
    ),
    (dict(dense=dict(name='lbfgs')), 'dense: lbfgs cannot be used with the arguments {}: TypeErr'),
    (
      dict(dense=dict(name='adamw', decay=0.1)),
      "decay=0.1 applies to adam, adagrad, sgd only; for adamw, .*arguments={'weight_decay': 0.01}",
    ),
    (
      dict(embedding=dict(rows='bf16')),
      "embedding.rows='bf16' is unknown; did you mean 'bfloat16'",
    ),
  ],
)
def test_bad_settings_are_rejected(changes, message):
  with pytest.raises(UserError, match=message):
    for group in ('dense', 'embedding'):
      optimizers.make(settings(**changes), group, 100)
    optimizers.row_type(settings(**changes), 'embedding')
