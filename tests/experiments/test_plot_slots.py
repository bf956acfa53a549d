"""The plot of the README has the figures of the log."""

from pathlib import Path

import pytest

from tests.runs import load_experiment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def plot():
  return load_experiment('plot_slots')


def test_figures_equal_those_of_the_log(plot):
  curve = plot.figures((ROOT / 'experiments/LOG.md').read_text(encoding='utf-8'))
  assert curve.slots == [4096, 16_384, 65_536, 262_144, 1_048_576]
  assert curve.trained[0] == (0.7257, 0.0020) and curve.trained[-1] == (0.7426, 0.0015)
  assert curve.frozen[0] == (0.7039, 0.0028) and curve.din == 0.7121


def test_a_log_without_the_entry_is_refused(plot):
  with pytest.raises(ValueError, match='no entry'):
    plot.figures('# Log of experiments\n')
  with pytest.raises(ValueError, match='no table'):
    plot.figures(f'## 2026-11-23 {plot.ENTRY}\n\nnothing\n')


def test_the_plot_has_the_same_bytes_each_time(plot, tmp_path):
  curve = plot.Curve([1, 4], [(0.6, 0.01), (0.7, 0.01)], [(0.5, 0.01), (0.5, 0.01)], 0.55)
  plot.draw(curve, tmp_path / 'a.svg')
  plot.draw(curve, tmp_path / 'b.svg')
  assert (tmp_path / 'a.svg').read_bytes() == (tmp_path / 'b.svg').read_bytes()
  assert 'values frozen at random' in (tmp_path / 'a.svg').read_text(encoding='utf-8')
