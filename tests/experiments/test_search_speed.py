"""The timed pairs of functions compute the same."""

import chex
import jax

from lmn_jax.layers import product_keys
from tests.runs import load_experiment

search_speed = load_experiment('search_speed')


def test_gradients_are_of_the_same_scores():
  ours, case = search_speed.gradients(product_keys.scores_at, 5, 12, 9, 3)
  other, same = search_speed.gradients(search_speed.product_at, 5, 12, 9, 3)
  chex.assert_trees_all_equal(case, same)
  chex.assert_trees_all_close(jax.jit(ours)(case), jax.jit(other)(case), rtol=1e-4, atol=1e-5)


def test_a_line_for_each_piece(monkeypatch, capsys):
  monkeypatch.setattr(search_speed, 'TOP_K', ((16, 2),))
  monkeypatch.setattr(search_speed, 'OWNERS', ((20, 9),))
  search_speed.main(['--passes=1'])
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(':')[0] for line in lines] == [
    'top_k of 16, K 2', 'gradients of 16, K 2', 'owners of 20 reads, 9 rows',
  ]  # fmt: skip
  assert all(' ms, other ' in line for line in lines)
