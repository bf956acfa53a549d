"""A checkpoint continues only in its own experiment."""

import pytest

from lmn_jax.errors import UserError
from lmn_jax.training.compatibility import check_same
from tests.runs import tiny_config


def identity(store='a' * 64, **fields):
  config = tiny_config('lmn')
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config.to_dict() | {'store': store}


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'model.width': 5},
      'holds another experiment: config.model.width was 4 and is 5; use another',
    ),
    ({'batch_size': 64, 'seed': 3}, r'config.batch_size was 32 and is 64 \(and 1 more\)'),
    ({'optimizer.dense.rate': 0.5}, 'config.optimizer.dense.rate was 0.001 and is 0.5'),
    ({'model.hidden': (9,)}, r'config.model.hidden was \[8\] and is \[9\]'),
    (
      {'store': 'b' * 64},
      'was trained on other data .fingerprint aaaaaaaaaaaa, now bbbbbbbbbbbb.',
    ),
    ({'store': 'b' * 64, 'data.min_count': 2}, 'config.data.min_count was 1 and is 2; use another'),
  ],
)
def test_another_experiment_is_refused(changes, message, tmp_path):
  with pytest.raises(UserError, match=message) as caught:
    check_same(tmp_path, identity(), identity(**changes))
  assert str(tmp_path) in str(caught.value)
  if 'store' not in changes or len(changes) > 1:
    message = str(caught.value)
    assert 'Fields that may change when a run continues: steps, log_every, eval_every' in message


def test_a_missing_field_is_named(tmp_path):
  old = identity()
  del old['model']['top_k']
  with pytest.raises(UserError, match='config.model.top_k was absent and is 3; use another'):
    check_same(tmp_path, old, identity())


def test_a_run_without_a_later_field_has_the_value_that_it_computed_with(tmp_path):
  old, field = identity(), 'optimizer.embedding.initial_accumulator'
  del old['optimizer']['embedding']['initial_accumulator']
  check_same(tmp_path, old, identity())
  with pytest.raises(UserError, match=f'config.{field} was 0.0 and is 0.1; use another'):
    check_same(tmp_path, old, identity(**{field: 0.1}))


@pytest.mark.parametrize('field, other', [('time', 'buckets'), ('event_width', 8)])
def test_a_run_without_a_later_field_of_the_model_has_its_default(field, other, tmp_path):
  old = identity()
  del old['model'][field]
  check_same(tmp_path, old, identity())
  with pytest.raises(UserError, match=f'config.model.{field} was .* and is .{{0,1}}{other}'):
    check_same(tmp_path, old, identity(**{f'model.{field}': other}))


def test_arguments_of_an_optimizer_may_not_change(tmp_path):
  """A run without the field has none."""
  old, field = identity(), 'optimizer.dense.arguments'
  del old['optimizer']['dense']['arguments']
  check_same(tmp_path, old, identity())
  with pytest.raises(UserError, match=f"config.{field} was {{}} and is {{'b1': 0.8}}; use another"):
    check_same(tmp_path, old, identity(**{field: {'b1': 0.8}}))
  check_same(tmp_path, identity(**{field: {'b1': 0.8}}), identity(**{field: {'b1': 0.8}}))


def test_fields_that_change_no_update_may_change(tmp_path):
  changed = {'steps': 99, 'patience': 1, 'buckets': (1, 2), 'data.source': 'elsewhere'}
  check_same(tmp_path, identity(), identity(**changed))
  check_same(tmp_path, identity(), identity(sampled_negatives=100))


def test_steps_may_not_change_if_a_schedule_depends_on_them(tmp_path):
  cosine = {'optimizer.schedule': 'cosine'}
  check_same(tmp_path, identity(**cosine), identity(**cosine))
  with pytest.raises(UserError, match='config.steps was 16 and is 32'):
    check_same(tmp_path, identity(**cosine), identity(steps=32, **cosine))


def test_a_run_with_a_removed_field_continues_if_the_field_had_no_effect(tmp_path):
  """`revive` moved keys if it was not 0; such a run is still read."""
  old = identity()
  old['model'] |= {'revive': 0.0, 'revive_noise': 0.3}
  check_same(tmp_path, old, identity())
  old['model']['revive'] = 0.1
  with pytest.raises(UserError, match='config.model.revive was 0.1 and is absent; use another'):
    check_same(tmp_path, old, identity())
  check_same(tmp_path, old, identity(), trains=False)
