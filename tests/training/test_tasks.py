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


@pytest.mark.parametrize('field, value', [('targets_per_request', 4), ('stale_events', 2)])
def test_next_items_refuse_requests(field, value):
  config = tiny_next()
  config[field] = value
  with pytest.raises(
    UserError, match=f"config.{field}={value} is for config.task='click'; .*leave"
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
