"""Every next-item model on Amazon Beauty and on MovieLens-100K.

    python experiments/next_item.py --set=amazon-beauty --source=FOLDER/Beauty_item_org_rank.txt
    python experiments/next_item.py --set=movielens-100k --source=FOLDER/ml-100k.inter \\
        [--models=sasrec,dman] [--seeds=0,1,2] [--split=valid]

The experiments are those of configs/next_beauty.py and configs/next_movielens_100k.py. Runs are
those of compare.py: the same command continues and reuses them. Prints and logs means and
deviations, with popularity and a first-order Markov chain.
"""

import argparse
from pathlib import Path

import compare

from lmn_jax.errors import one_of
from lmn_jax.models.registry import NEXT_ITEM

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
SETS = {
  'amazon-beauty': CONFIGS / 'next_beauty.py',
  'movielens-100k': CONFIGS / 'next_movielens_100k.py',
}


def main(argv: list[str]) -> dict:
  """Trains all missing runs and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], allow_abbrev=False)
  parser.add_argument('--set', required=True, help=' or '.join(SETS))
  parser.add_argument('--source', required=True, help='the file of the set')
  parser.add_argument('--models', default=','.join(NEXT_ITEM), help='such as sasrec,dman[blocks=1]')
  parser.add_argument('--split', default='test', choices=('test', 'valid'))
  parser.add_argument('--workdir', default='', help='default: runs/next_item-SET')
  args, changes = compare.parse(parser, argv)
  config = SETS[one_of('--set', args.set, SETS)]
  changes = [*changes, f'--config.data.source={args.source}']
  entries = [
    compare.read_entry(str(config), name, changed, changes)
    for name, changed in compare.split_entries(args.models)
  ]
  workdir = Path(args.workdir or Path('runs') / f'next_item-{args.set}')
  what = f'the next item of {args.set}'
  return compare.record(
    entries, workdir, args, argv, 'next_item', what, compare.table_of, args.split
  )


if __name__ == '__main__':
  compare.start(main)
