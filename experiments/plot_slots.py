"""Draws the plot of the README: AUC of LMN by number of slots, from the figures in the log.

  python experiments/plot_slots.py

Reads the table of experiments/memory_scaling.py in experiments/LOG.md, and the AUC of DIN from the
command above it; writes docs/images/slots.svg. Nothing is trained. Needs matplotlib (the extra
`plot`).
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use('svg')
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
ENTRY = 'douyin_standin: LMN from 4,096 to 1,048,576 slots'


class Curve(NamedTuple):
  """Figures of the log. slots: sizes of the memory. trained, frozen: (mean, deviation) of each.

  din: AUC of DIN on the same log.
  """

  slots: list[int]
  trained: list[tuple[float, float]]
  frozen: list[tuple[float, float]]
  din: float


def figures(log: str) -> Curve:
  """The table of the entry.

  Args:
    log: the text of experiments/LOG.md.

  Raises:
    ValueError: the log has no such entry, or the entry has no such table.
  """
  entry = re.search(rf'^## \S+ {re.escape(ENTRY)}\n(.*?)(?=^## |\Z)', log, re.M | re.S)
  if entry is None:
    raise ValueError(f'the log has no entry {ENTRY!r}')
  row = r'^\| ([\d,]+) +\| ([\d.]+) ± ([\d.]+) +\| ([\d.]+) ± ([\d.]+) '
  rows = re.findall(row, entry[1], re.M)
  din = re.search(r'--din=([\d.]+)', entry[1])
  if not rows or din is None:
    raise ValueError(f'the entry {ENTRY!r} has no table of slots, or no --din')
  return Curve(
    [int(n.replace(',', '')) for n, *_ in rows],
    [(float(mean), float(deviation)) for _, mean, deviation, *_ in rows],
    [(float(mean), float(deviation)) for *_, mean, deviation in rows],
    float(din[1]),
  )


def draw(curve: Curve, path: Path) -> None:
  """Writes the plot as SVG, the same bytes each time."""
  plt.rcParams.update({'svg.hashsalt': 'lmn_jax', 'svg.fonttype': 'none', 'font.size': 10})
  figure, axes = plt.subplots(figsize=(6.4, 3.2), layout='constrained')
  for label, values, colour in (
    ('values trained', curve.trained, '#1f6feb'),
    ('values frozen at random', curve.frozen, '#8b949e'),
  ):
    mean, deviation = zip(*values, strict=True)
    axes.errorbar(curve.slots, mean, deviation, marker='o', capsize=3, color=colour, label=label)
  axes.axhline(curve.din, color='#d29922', linestyle='--', label='DIN, no memory')
  axes.set_xscale('log', base=2)
  axes.set_xticks(curve.slots, [f'{n:,}' for n in curve.slots])
  axes.minorticks_off()
  axes.set_xlabel('slots of the memory')
  axes.set_ylabel('test AUC')
  axes.legend(frameon=False, loc='upper left')
  for side in ('top', 'right'):
    axes.spines[side].set_visible(False)
  # Readable on dark pages too.
  figure.patch.set_facecolor('white')
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, metadata={'Date': None, 'Creator': None})
  plt.close(figure)


def main(argv: list[str] | None = None) -> None:
  """Reads the log and writes the plot."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--log', type=Path, default=HERE / 'LOG.md')
  parser.add_argument('--output', type=Path, default=HERE.parent / 'docs/images/slots.svg')
  arguments = parser.parse_args(argv)
  draw(figures(arguments.log.read_text(encoding='utf-8')), arguments.output)


if __name__ == '__main__':
  main()
