"""The scores of validations, their summary and their file."""

import pytest

from lmn_jax.errors import UserError
from lmn_jax.training.checkpoint import Checkpoints
from lmn_jax.training.validations import out_of_patience, standing


def test_a_damaged_file_of_validations_is_refused(tmp_path):
  for text in ('[[1', '[1]', '[[1, "x"]]', '{"a": 1}'):
    (tmp_path / 'validations.json').write_text(text)
    with pytest.raises(UserError, match='validations.json is damaged .* delete it'):
      Checkpoints(tmp_path)


def test_standing():
  assert standing([]) == (None, None, 0)
  assert standing([(4, 0.6), (8, 0.7), (12, 0.7), (16, 0.5)]) == (0.7, 8, 2)
  assert standing([(4, -3.0)]) == (-3.0, 4, 0)


def test_patience_counts_validations_without_a_better_score():
  scores = [(4, 0.6), (8, 0.7), (12, 0.7), (16, 0.5)]
  ended = [patience for patience in range(5) if out_of_patience(patience, scores)]
  assert ended == [1, 2]
