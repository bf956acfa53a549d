"""What validations have come to, and the file that keeps them."""

import pytest

from lmn_jax.errors import UserError
from lmn_jax.training.checkpoint import Checkpoints
from lmn_jax.training.validations import out_of_patience, standing


def test_validations_that_are_damaged_are_no_validations(tmp_path):
  for text in ('[[1', '[1]', '[[1, "x"]]', '{"a": 1}'):
    (tmp_path / 'validations.json').write_text(text)
    with pytest.raises(UserError, match='validations.json is damaged .* delete it'):
      Checkpoints(tmp_path)


def test_where_a_run_stands():
  assert standing([]) == (None, None, 0)
  assert standing([(4, 0.6), (8, 0.7), (12, 0.7), (16, 0.5)]) == (0.7, 8, 2)
  assert standing([(4, -3.0)]) == (-3.0, 4, 0)


def test_patience_is_of_validations_in_a_row():
  scores = [(4, 0.6), (8, 0.7), (12, 0.7), (16, 0.5)]
  ended = [patience for patience in range(5) if out_of_patience(patience, scores)]
  assert ended == [1, 2]
