"""Next-item models on MovieLens-1M with the genres of the films, and without.

    python experiments/item_fields.py --source=FOLDER/ratings.dat --films=FOLDER/movies.dat
    python experiments/item_fields.py --source=FOLDER/sequences.tsv --films=FOLDER/movies.dat \\
        --models=sasrec,gru4rec --seeds=0,1 --config.steps=600

Each model of configs/movielens_next.py is trained with config.model.item_fields=False and True, on
one store. Runs are those of compare.py: the same command continues and reuses them, and
`--config.FIELD=VALUE` changes a field of all. The difference is that to the other of the two if
--models has one model, otherwise to the best other run.
"""

import argparse
from pathlib import Path

import compare
import ml_collections

FILE = Path(__file__).resolve().parents[1] / 'configs/movielens_next.py'


def with_genres(config: ml_collections.ConfigDict, films: str) -> None:
  """Adds the genres of the films to a config, in place. films: the path of movies.dat."""
  config.data.update(
    name='movielens_1m_genres', item_features=('genres',), items_source=films,
    items_format='movielens', items_encoding='latin-1',
    items_fields=(config.data.item, 'title', 'genres'),
  )  # fmt: skip
  config.data.multi = {'genres': '|'}


def entries_of(models: list[str], films: str, changes: list[str]) -> list[compare.Entry]:
  """The entries of compare.py.

  Args:
    models: of configs/movielens_next.py. films: path of movies.dat. changes:
      '--config.FIELD=VALUE', for every entry.
  """
  entries = []
  for name in models:
    for label, item_fields in (('ids', False), ('ids and genres', True)):
      change = [f'model.item_fields={item_fields}']
      config = compare.read_entry('', f'{FILE}:{name}', change, changes).config
      with_genres(config, films)
      entries.append(compare.Entry(f'{name}, {label}', config))
  return entries


def main(argv: list[str]) -> dict:
  """Trains all missing runs and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], allow_abbrev=False)
  parser.add_argument('--source', required=True, help='ratings.dat or sequences.tsv')
  parser.add_argument('--films', required=True, help='movies.dat')
  parser.add_argument('--models', default='sasrec', help='of configs/movielens_next.py')
  parser.add_argument('--workdir', default='runs/item_fields')
  args, changes = compare.parse(parser, argv)
  changes = [*changes, f'--config.data.source={args.source}']
  entries = entries_of(compare.pieces_of(args.models), args.films, changes)
  return compare.record(
    entries, Path(args.workdir), args, argv, 'item_fields', 'genres of films in next-item models',
    compare.table_of,
  )  # fmt: skip


if __name__ == '__main__':
  compare.start(main)
