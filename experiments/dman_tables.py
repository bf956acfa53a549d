"""Tables 3 (MovieLens-1M) and 5 (ablations) of the DMAN paper, with the numbers of the paper.

    python experiments/dman_tables.py --source=FOLDER/sequences.tsv [--seeds=0,1,2]
    python experiments/dman_tables.py --table=5            # generated histories

Table 3: DMAN of configs/dman_movielens.py, the models of configs/movielens_next.py, and GRU4Rec,
Caser and SASRec with a star, which read only the last segment of each user (config.latest). Table
5: DMAN and its ablations on configs/dman_xlong.py, with SASRec cut at 50 events; the data sets of
the paper are not public. Runs are those of compare.py: the same command continues and reuses them.
Prints and logs means and deviations beside the numbers of the paper.
"""

import argparse
from pathlib import Path

import compare

# Tan et al. 2021, table 3, MovieLens: HR@10, HR@50, NDCG@100 in per cent; None if not in the table.
PAPER = {
  'gru4rec*': (17.69, 43.13, 16.90),
  'caser*': (18.98, 45.64, 17.62),
  'sasrec*': (21.02, 47.28, 19.05),
  'gru4rec': (19.78, 47.40, 18.75),
  'caser': (20.80, 48.12, 19.28),
  'sasrec': (22.96, 50.09, 20.36),
  'shan': (21.34, 49.52, 19.55),
  'hpmn': (22.84, 50.54, 19.77),
  'sdm': (23.42, 51.26, 20.44),
  'hstu': None,
  'dman': (25.18, 53.24, 22.03),
}
ABLATIONS = ('xl', 'fifo', 'nran')
SHOWN = ('hr@10', 'hr@50', 'ndcg@100')
CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
LATEST = ['latest=True', 'history_length=20', 'batch_size=64', 'steps=2000', 'eval_every=500']


def file_of(model: str) -> str:
  """The config of a model on MovieLens-1M, as an entry of compare.py."""
  name = 'dman_movielens.py' if model == 'dman' else f'movielens_next.py:{model}'
  return str(CONFIGS / name)


def entries_of(table: int, names: list[str], changes: list[str]) -> dict[str, compare.Entry]:
  """The entries of compare.py, by their name in the table.

  Args:
    table: 3 or 5. names: of PAPER; none means all.
    changes: '--config.FIELD=VALUE', for every entry.
  """
  if table == 3:
    sources = {
      name: (file_of(name.rstrip('*')), LATEST if name.endswith('*') else [])
      for name in names or PAPER
    }
    read = {
      k: compare.read_entry('', file, changed, changes) for k, (file, changed) in sources.items()
    }
  else:
    file = str(CONFIGS / 'dman_xlong.py')
    sources = {'dman': ('dman', []), 'sasrec': ('sasrec', [])}
    sources |= {f'dman-{x}': ('dman', [f'model.variant={x}']) for x in ABLATIONS}
    read = {k: compare.read_entry(file, *sources[k], changes) for k in names or sources}
  return {name: entry._replace(label=name.replace('*', '-latest')) for name, entry in read.items()}


def table_of(lines: dict[str, dict], names: list[str], paper: dict) -> str:
  """The rows in Markdown.

  Args:
    lines: of compare.summarise. names: of the entries. paper: PAPER, or {} for table 5.
  """
  words = [compare.WORDS.get(m, m.upper()) for m in SHOWN]
  rows = [('', *words, 'the paper')]
  for label, line in lines.items():
    name = next((n for n in names if n.replace('*', '-latest') == label), label)
    figures = ' / '.join(f'{x:.2f}' for x in paper.get(name) or ())
    rows.append((name, *(compare.cell(line[m]) for m in SHOWN), figures))
  return compare.markdown(rows)


def main(argv: list[str]) -> dict:
  """Trains all missing runs and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], allow_abbrev=False)
  parser.add_argument('--table', type=int, choices=(3, 5), default=3)
  parser.add_argument('--source', default='', help='of MovieLens-1M; by default TFDS')
  parser.add_argument('--models', default='', help='some of the lines, such as dman,sasrec')
  parser.add_argument('--workdir', default='', help='default: runs/dman_table-3')
  args, changes = compare.parse(parser, argv)
  if args.source:
    changes = [*changes, f'--config.data.source={args.source}']
  entries = entries_of(args.table, compare.pieces_of(args.models), changes)
  workdir = Path(args.workdir or Path('runs') / f'dman_table-{args.table}')
  paper = PAPER if args.table == 3 else {}
  return compare.record(
    list(entries.values()), workdir, args, argv, 'dman_tables', f'DMAN, table {args.table}',
    lambda lines, *_: table_of(lines, list(entries), paper),
  )  # fmt: skip


if __name__ == '__main__':
  compare.start(main)
