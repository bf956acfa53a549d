"""Checks and warnings of a task about a config and its data."""

import pytest

from lmn_jax.errors import UserError
from lmn_jax.training import config_warnings
from lmn_jax.training import setup as setups
from lmn_jax.training.tasks import TASKS
from tests.runs import mesh_of, tiny_config, tiny_next


def test_next_items_refuse_histories_in_rows():
  config = tiny_next()
  config.data.row_history = 'past'
  with pytest.raises(UserError, match="row_history='past' is for config.task='click'; next items"):
    setups.check(config)


@pytest.mark.parametrize('make, lines', [(tiny_config, 1), (tiny_next, 0)])
def test_clicks_of_one_class_give_a_warning_for_the_task_click(
  make, lines, tiny_store, monkeypatch
):
  monkeypatch.setitem(tiny_store.manifest['counts']['clicks'], 'train', 0)
  sources = TASKS['click'].sources(tiny_config(), tiny_store, mesh_of(1))
  warnings = config_warnings.doubts(make(), tiny_store, sources)
  assert sum('so there is only one class' in line for line in warnings) == lines


@pytest.mark.parametrize('field, value', [
  ('targets_per_request', 4), ('stale_events', 2), ('train_length', 'beta'),
  ('train_length_mean', 0.2),
])  # fmt: skip
def test_next_items_refuse_fields_of_clicks(field, value):
  config = tiny_next()
  config[field] = value
  with pytest.raises(
    UserError, match=f"config.{field}={value!r} is for config.task='click'; .*leave"
  ):
    setups.check(config)


def test_events_that_targets_lack_need_requests():
  config = tiny_config()
  config.stale_events = 3
  with pytest.raises(UserError, match='config.stale_events=3 has no effect with targets_per_reque'):
    setups.check(config)
  config.targets_per_request = 2
  setups.check(config)


def test_requests_of_single_examples_give_a_warning(tiny_store):
  config = tiny_config()
  config.targets_per_request = 4
  sources = TASKS['click'].sources(config, tiny_store, mesh_of(1))
  mean = sources['train'].examples_per_row
  assert 1.5 < mean < 4 and not config_warnings.doubts(config, tiny_store, sources)
  sources['train'].examples_per_row = 1.01
  (line,) = config_warnings.doubts(config, tiny_store, sources)
  assert 'config.targets_per_request=4 saves little: requests have 1.01 examples' in line


@pytest.mark.parametrize('name', ['sam', 'bst', 'sasrec'])
def test_models_of_one_length_refuse_random_lengths(name):
  config = tiny_config(name)
  config.train_length = 'suffix'
  message = f"config.train_length='suffix' needs a model of any length, and {name} .*pooling, din"
  with pytest.raises(UserError, match=message) as error:
    setups.check(config)
  assert '\n' not in str(error.value)


def test_an_unknown_law_of_lengths_is_an_error_before_data_are_prepared():
  config = tiny_config('din')
  config.train_length = 'sufix'
  with pytest.raises(UserError, match="config.train_length='sufix' is unknown; did you mean"):
    setups.check(config)
