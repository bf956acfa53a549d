"""Command line: flags, checks, one call.

python -m lmn_jax.main --config=configs/lmn_douyin.py
"""

import logging
import os
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from lmn_jax.errors import UserError

MODES = ('train', 'evaluate', 'prepare')

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
  'config', None, 'Config file; any field is overridden by --config.FIELD=VALUE.', lock_config=True
)
flags.DEFINE_string('workdir', None, 'Folder of the run. Default: runs/NAME-OF-THE-CONFIG-FILE.')
flags.DEFINE_string('stores', None, 'Folder of the history stores. Default: WORKDIR/../stores.')
flags.DEFINE_string('mode', 'train', f'One of {", ".join(MODES)}.')


def parse(argv: list[str]) -> list[str]:
  """Parses the flags; what does not parse is the user's mistake: one line, exit status 2."""
  try:
    rest = FLAGS(argv)
    if rest[1:]:
      raise UserError(f'argument {rest[1]!r} is not a flag; flags begin with --')
    return rest
  except (
    flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError
  ) as error:  # fmt: skip
    # A config file is code of the user's, and overrides are looked up in what it returned.
    fail(error)


def fail(error: Exception) -> None:
  """Prints the error as one line and exits with status 2."""
  print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
  sys.exit(2)


def main(argv: list[str]) -> None:
  """Runs the mode that was asked for."""
  del argv
  try:
    run()
  except UserError as error:
    fail(error)


def run() -> None:
  """Checks the flags, prepares the store, trains or evaluates, and says where everything is."""
  # Imported late: a mistake on the command line is answered before JAX is loaded.
  from lmn_jax import prepare, train
  from lmn_jax.errors import one_of

  if FLAGS.config is None:
    raise UserError('--config is missing; for example --config=configs/lmn_douyin.py')
  one_of('--mode', FLAGS.mode, MODES)
  config = FLAGS.config
  name = Path(config_flags.get_config_filename(FLAGS['config'])).stem
  workdir = Path(FLAGS.workdir or Path('runs') / name)
  stores = Path(FLAGS.stores or workdir.parent / 'stores')

  # orbax and JAX report their inner life at INFO; --verbosity=0 shows it.
  if not FLAGS['verbosity'].present:
    absl_logging.set_verbosity(absl_logging.WARNING)
  say = logging.getLogger('lmn_jax')
  say.setLevel(logging.INFO)
  say.propagate = False
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(message)s'))
  say.addHandler(handler)

  store = prepare.prepare(config.data, stores, repair=FLAGS.mode == 'prepare')
  if FLAGS.mode == 'prepare':
    print(f'store: {store.path}')
    return
  if FLAGS.mode == 'train':
    report = train.train(config, workdir, store)
  else:
    report = train.evaluate_best(config, workdir, store)
  print(train.table_of(report))
  print(f'\n{report["protocol"]}')
  print(f'run: {workdir}  store: {store.path}')


def run_main() -> None:
  """Entry point of the `lmn-jax` command."""
  # XLA and orbax are talkative on standard error about things no user can mend.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  app.run(main, flags_parser=parse)


if __name__ == '__main__':
  run_main()
