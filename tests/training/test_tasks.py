"""What a task says of a config and of its data."""

import pytest

from lmn_jax.errors import UserError
from lmn_jax.training import config_warnings
from lmn_jax.training import setup as setups
from lmn_jax.training.tasks import TASKS
from tests.runs import mesh_of, tiny_config, tiny_next


def test_next_items_are_not_of_histories_that_rows_bring():
  config = tiny_next()
  config.data.row_history = 'past'
  with pytest.raises(UserError, match="row_history='past' is for config.task='click': next items"):
    setups.check(config)


@pytest.mark.parametrize('make, lines', [(tiny_config, 1), (tiny_next, 0)])
def test_clicks_of_one_kind_are_doubted_where_clicks_are_learnt(
  make, lines, tiny_store, monkeypatch
):
  monkeypatch.setitem(tiny_store.manifest['counts']['clicks'], 'train', 0)
  sources = TASKS['click'].sources(tiny_config(), tiny_store, mesh_of(1))
  found = config_warnings.doubts(make(), tiny_store, sources)
  assert sum('so there is nothing to tell apart' in line for line in found) == lines
