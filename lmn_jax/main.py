"""The command line: parses the flags and runs one command of `commands.COMMANDS`.

lmn-jax --config=lmn_douyin, or python -m lmn_jax --config=configs/lmn_douyin.py
"""

import logging
import os
import platform
import re
import signal
import sys
import traceback
from importlib import metadata
from pathlib import Path

import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from lmn_jax import __version__, cli_errors, config_files
from lmn_jax.commands import COMMANDS, Job
from lmn_jax.distributed import failure, interrupts, joining, processes
from lmn_jax.errors import DivergedError, Preempted, UserError, of_disk, one_of
from lmn_jax.serving import settings

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
  'config',
  None,
  f'Path of a config file, or the name of one in {config_files.folder()}: '
  f'{", ".join(config_files.names())}. FILE:MODEL chooses the model. '
  '--config.FIELD=VALUE overrides a field.',
  lock_config=True,
)
flags.DEFINE_string('workdir', None, 'Folder of the run. Default: runs/NAME-OF-THE-CONFIG.')
flags.DEFINE_string('stores', None, 'Folder of the history stores. Default: WORKDIR/../stores.')
# 'off' stores none. Several hosts have it in WORKDIR, and --mode=serve beside the export.
flags.DEFINE_string(
  'compilation_cache', None, 'Folder of compiled programs. Default: STORES/.compiled.'
)
flags.DEFINE_string('mode', 'train', f'One of {", ".join(COMMANDS)}.')
flags.DEFINE_bool('version', False, 'Prints the versions of lmn_jax, JAX and Python.')
flags.DEFINE_bool('yes', False, 'Removes what --mode=prune lists; without it nothing is removed.')
flags.DEFINE_string('events', '', 'Log of new events, for --mode=states.')
flags.DEFINE_string('input', '', 'Rows or users to score, for --mode=predict.')
flags.DEFINE_string(
  'output', '', 'File of the scores, .parquet or .csv; with --mode=evaluate of the test rows.'
)
flags.DEFINE_string(
  'table', 'item', 'Table for --mode=embeddings: item, user, memory, or a feature.'
)
flags.DEFINE_integer('top_k', None, 'Number of best items for each user. Default: scores pairs.')
flags.DEFINE_string(
  'export', '', 'Link to the newest export, or its folder. Default: WORKDIR/export.'
)
flags.DEFINE_string('precision', 'float32', 'Type of exported tables: float32, bfloat16 or int8.')
flags.DEFINE_string('topology', '', 'TPU slice for --mode=plan, such as v5e:16x16.')
flags.DEFINE_bool('search', False, 'With --mode=plan: finds the largest batch and memory that fit.')
# For several hosts; launch.sh and Slurm set them.
flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0; auto on a TPU slice.')
flags.DEFINE_integer('processes', None, 'Number of processes that train together.')
flags.DEFINE_integer('process', None, 'Number of this process, from 0.')


def parse(argv: list[str]) -> list[str]:
  """Parses the flags; an error prints one line and exits with status 2."""
  try:
    argv = config_files.resolved(argv)
    cli_errors.check_config(argv)
    if any(re.match(r'--?serve\.', x) for x in argv):
      # Not at import: defining it reads its overrides, which may be wrong.
      config_flags.DEFINE_config_dict('serve', settings.settings())
    rest = FLAGS(argv)
    if rest[1:]:
      raise UserError(f'argument {rest[1]!r} is not a flag; flags begin with --')
    if FLAGS.version:
      jax_version, python = metadata.version('jax'), platform.python_version()
      print(f'lmn_jax {__version__} (jax {jax_version}, Python {python})')
      sys.exit(0)
    return rest
  except Exception as error:  # a config file is code of the user, which may raise anything
    fail(cli_errors.explain(error, argv))


def fail(message: str, status: int = 2) -> None:
  """Prints the message as one line and exits."""
  print(f'error: {" ".join(message.split())}', file=sys.stderr)
  sys.exit(status)


def main(argv: list[str]) -> None:
  """Runs the command; an error that the user can correct prints one line."""
  del argv
  try:
    run()
  except Preempted as error:
    line = str(error) if processes.index() == 0 else None
    joining.stop()
    interrupts.exit_now(line, 0)
  except (Exception, KeyboardInterrupt, interrupts.Terminated) as error:
    explained = explain(error)
    if processes.count() > 1:
      if explained is None:
        traceback.print_exc()
      failure.end(*explained or (failure.explain(error), 1))
    if explained is None:
      raise
    message, status = explained
    if status > 128:
      interrupts.exit_now(f'error: {message}', status)
    fail(message, status)


def explain(error: BaseException) -> tuple[str, int] | None:
  """Returns (message, exit status) if the user can correct the error; None otherwise."""
  number = interrupts.received()
  if isinstance(error, UserError) and number is None:
    return str(error), 2
  if isinstance(error, DivergedError):
    return str(error), 1
  if (line := of_disk(error)) is not None:
    return line, 2
  if isinstance(error, KeyboardInterrupt | interrupts.Terminated) or number is not None:
    # The text of an error that a library raised for the signal does not help.
    message = str(error) if isinstance(error, KeyboardInterrupt) else ''
    what = 'ended by SIGTERM' if number == signal.SIGTERM else 'interrupted'
    message = message or f'{what}; the same command starts again'
    return message, 128 + (number or signal.SIGINT)
  return None


def run() -> None:
  """Checks the flags, then checks and runs the command of --mode."""
  command = COMMANDS[one_of('--mode', FLAGS.mode, COMMANDS)]
  _check_flags()
  job = _job()
  _log_to_stderr()
  command.check(job)
  text = command.run(job)
  if text:
    from lmn_jax.training import writer

    writer.print_result(text)
  joining.stop()


def _check_flags() -> None:
  """Checks that every flag belongs to the mode.

  Raises:
    UserError: a flag belongs to other modes.
  """
  for name in FLAGS:
    modes = [mode for mode, command in COMMANDS.items() if name in command.flags]
    if name.startswith('serve.'):
      modes = ['serve']
    if FLAGS[name].present and modes and FLAGS.mode not in modes:
      raise UserError(
        f'--{name}={FLAGS[name].value} is for --mode={" or ".join(modes)}, and this is '
        f'--mode={FLAGS.mode}'
      )


def _job() -> Job:
  """Returns the config and the folders that the flags name."""
  config, name = FLAGS.config, 'run'
  if FLAGS['config'].present:
    # PATH or PATH:ARGUMENT of get_config: two models of one file are two runs.
    file = config_flags.get_config_filename(FLAGS['config'])
    if not isinstance(config, ml_collections.ConfigDict):
      path = file.partition(':')[0]
      raise UserError(f'{path}: get_config() must return a ConfigDict and returned {config!r}')
    name = config_files.run_name(file)
  workdir = Path(FLAGS.workdir or Path('runs') / name)
  return Job(config, workdir, Path(FLAGS.stores or workdir.parent / 'stores'), FLAGS)


def _log_to_stderr():
  """Logs lmn_jax from INFO on as plain lines, Orbax and JAX from WARNING on."""
  # Orbax and JAX log internal details at INFO; --verbosity=0 shows them.
  if not FLAGS['verbosity'].present:
    absl_logging.set_verbosity(absl_logging.WARNING)
    # Orbax also raises the errors that its threads log, and `main` prints those.
    absl_logging.get_absl_handler().addFilter(
      lambda record: record.levelno < logging.ERROR or 'orbax' not in record.pathname
    )
  logger = logging.getLogger('lmn_jax')
  logger.setLevel(logging.INFO)
  logger.propagate = False
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(message)s'))
  logger.handlers = [handler]


def run_main() -> None:
  """Runs the `lmn-jax` command."""
  # XLA and Orbax print warnings that users cannot act on.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  if __name__ != '__main__':
    # --help shows the docstring and the flags of __main__: make them those of this module.
    sys.modules['__main__'].__doc__ = __doc__
    for flag in FLAGS.get_flags_for_module(__name__):
      FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  interrupts.listen()
  try:
    app.run(main, flags_parser=parse)
  except (KeyboardInterrupt, interrupts.Terminated) as error:  # while the flags are parsed
    message, status = explain(error)
    interrupts.exit_now(f'error: {message}', status)


if __name__ == '__main__':
  run_main()
