"""Command line: flags, checks, one call.

python -m lmn_jax.main --config=configs/lmn_douyin.py
"""

import errno
import logging
import os
import re
import signal
import sys
import traceback
from pathlib import Path

import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from lmn_jax import cli_errors
from lmn_jax.distributed import interrupts, processes
from lmn_jax.errors import DivergedError, Preempted, UserError, one_of
from lmn_jax.serving import settings

MODES = ('train', 'evaluate', 'prepare', 'prune', 'plan', 'states', 'predict', 'export', 'serve')
# Flags that other modes have no use for.
ONLY = {
  'topology': ('plan',), 'events': ('states',), 'input': ('predict',),
  'output': ('predict', 'evaluate'), 'top_k': ('predict',), 'precision': ('export',),
  'export': ('export', 'serve'), 'yes': ('prune',),
}  # fmt: skip
# What a disk refuses; any other error of the system is the program's.
DISK = frozenset(
  (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.ENOTDIR,
   errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)
)  # fmt: skip

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
  'config', None, 'Config file; any field is overridden by --config.FIELD=VALUE.', lock_config=True
)
flags.DEFINE_string('workdir', None, 'Folder of the run. Default: runs/NAME-OF-THE-CONFIG.')
flags.DEFINE_string('stores', None, 'Folder of the history stores. Default: WORKDIR/../stores.')
flags.DEFINE_string('mode', 'train', f'One of {", ".join(MODES)}.')
flags.DEFINE_bool('yes', False, 'Removes what --mode=prune lists; without it nothing is removed.')
flags.DEFINE_string('events', '', 'Log of new events for --mode=states; none: of the store alone.')
flags.DEFINE_string('input', '', 'Rows or users to score, for --mode=predict.')
flags.DEFINE_string(
  'output', '', 'Their scores; of --mode=evaluate those of the test: a .parquet or .csv.'
)
flags.DEFINE_integer('top_k', None, 'The best items of each user; none: scores of pairs.')
flags.DEFINE_string(
  'export', '', 'Link to the newest export, or its folder. Default: WORKDIR/export.'
)
flags.DEFINE_string('precision', 'float32', 'Of exported tables: float32, bfloat16 or int8.')
flags.DEFINE_string('topology', '', 'TPU slice for --mode=plan, such as v5e:16x16.')
# Of several hosts; launch.sh and Slurm fill them in.
flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0; auto on a TPU slice.')
flags.DEFINE_integer('processes', None, 'How many processes train together.')
flags.DEFINE_integer('process', None, 'Which of them this is, from 0 on.')


def parse(argv: list[str]) -> list[str]:
  """Parses the flags; what does not parse is the user's mistake: one line, exit status 2."""
  try:
    cli_errors.check_config(argv)
    if any(re.match(r'--?serve\.', x) for x in argv):
      # Not above: what is overridden is read when it is defined, and may be mistakes.
      config_flags.DEFINE_config_dict('serve', settings.settings())
    rest = FLAGS(argv)
    if rest[1:]:
      raise UserError(f'argument {rest[1]!r} is not a flag; flags begin with --')
    return rest
  except Exception as error:  # a config file is code of the user's: anything may come out of it
    fail(cli_errors.explain(error, argv))


def fail(message: str, status: int = 2) -> None:
  """Prints the message as one line and exits."""
  print(f'error: {" ".join(message.split())}', file=sys.stderr)
  sys.exit(status)


def main(argv: list[str]) -> None:
  """Runs the mode that was asked for; what a user can mend ends in one line."""
  del argv
  try:
    run()
  except Preempted as error:
    speaks = processes.index() == 0
    processes.stop()
    interrupts.leave(str(error) if speaks else None, 0)
  except (Exception, KeyboardInterrupt, interrupts.Terminated) as error:
    said = explain(error)
    if processes.count() > 1:
      if said is None:
        traceback.print_exc()
      processes.end(*said or (processes.explain(error), 1))
    if said is None:
      raise
    if said[1] > 128:
      interrupts.leave(f'error: {said[0]}', said[1])
    fail(*said)


def explain(error: BaseException) -> tuple[str, int] | None:
  """The message and exit status of what a user can mend; None for an error of the program."""
  if isinstance(error, UserError):
    return str(error), 2
  if isinstance(error, DivergedError):
    return str(error), 1
  if isinstance(error, OSError) and error.errno in DISK:
    where = f'{error.filename}: ' if error.filename else ''
    return (
      f'{where}{error.strerror}; choose another --workdir or --stores, or mend that folder', 2
    )  # fmt: skip
  number = interrupts.heard()
  if isinstance(error, KeyboardInterrupt | interrupts.Terminated) or number is not None:
    # Of what a library made of the signal the text says nothing.
    own = str(error) if isinstance(error, KeyboardInterrupt) else ''
    what = 'ended by SIGTERM' if number == signal.SIGTERM else 'interrupted'
    return own or f'{what}; the same command begins it again', 128 + (number or signal.SIGINT)
  return None


def run() -> None:
  """Checks the flags, prepares the store, does what the mode says, and says where it all is."""
  one_of('--mode', FLAGS.mode, MODES)
  _check_flags()
  if FLAGS.mode in ('serve', 'prune'):
    _serve() if FLAGS.mode == 'serve' else _prune()
    return
  if FLAGS['config'].value is None and not FLAGS['config'].present:
    raise UserError(f'--config is missing; for example {cli_errors.EXAMPLE}')
  config = FLAGS.config
  if not isinstance(config, ml_collections.ConfigDict):
    file = config_flags.get_config_filename(FLAGS['config']).partition(':')[0]
    raise UserError(f'{file}: get_config() must return a ConfigDict and returned {config!r}')
  workdir, stores = _folders()
  place = processes.find(FLAGS.coordinator, FLAGS.processes, FLAGS.process, os.environ)
  _log_to_stderr()

  # Imported late: a mistake on the command line is answered before JAX is loaded.
  import jax

  from lmn_jax import config as configs
  from lmn_jax.data import counts, prepare
  from lmn_jax.evaluation import report
  from lmn_jax.export import export
  from lmn_jax.inference import predict, state_table
  from lmn_jax.planning import plan, slices
  from lmn_jax.training import experiment, loop, run_store, writer

  configs.check_names(config)
  if FLAGS.mode == 'plan':
    # For a slice that is not here: nobody is joined, no device of this machine is asked for.
    experiment.check(config, slices.slice_of(FLAGS.topology))
    store = run_store.store_to_plan(config, workdir, stores)
    writer.show(plan.plan(config, store, FLAGS.topology))
    return
  processes.start(place)
  if processes.index() > 0:
    logging.getLogger('lmn_jax').setLevel(logging.WARNING)  # host 0 speaks for all
  processes.agree(
    'config', {'mode': FLAGS.mode, 'config': config.to_dict()}, prepare.differences,
    'start all hosts with the same flags and config file',
  )  # fmt: skip
  if FLAGS.mode != 'prepare':
    processes.check_alone(jax.process_count())
    experiment.check(config)
    processes.check_shared(workdir)
    if FLAGS.mode == 'states':
      state_table.check(config)
    if FLAGS.mode == 'predict':
      request = predict.Request(FLAGS.input, Path(FLAGS.output), FLAGS.top_k)
      predict.check(request)
    output = Path(FLAGS.output) if FLAGS.mode == 'evaluate' and FLAGS['output'].present else None
    if output is not None:
      predict.check_output(output)

  def find():
    if FLAGS.mode == 'prepare':
      return prepare.prepare(config.data, stores, repair=True)
    of_run = run_store.store_to_train if FLAGS.mode == 'train' else run_store.store_to_read
    return of_run(config, workdir, stores)

  store = processes.first_then_others(find)
  processes.agree(
    'store', {'fingerprint': store.fingerprint}, prepare.differences,
    'give every host the same log, or --stores on a disk they share',
  )  # fmt: skip
  if FLAGS.mode == 'prepare':
    said = f'{counts.table_of(store)}\nstore: {store.path}'
  elif FLAGS.mode == 'states':
    said = state_table.line_of(state_table.update_states(config, workdir, store, FLAGS.events))
  elif FLAGS.mode == 'predict':
    said = predict.line_of(predict.predict(config, workdir, store, request))
  elif FLAGS.mode == 'export':
    to = Path(FLAGS.export or workdir / 'export')
    said = export.lines_of(export.export(config, workdir, store, to, FLAGS.precision))
  else:
    if FLAGS.mode == 'train':
      found, path = loop.train(config, workdir, store), workdir / loop.REPORT
    else:
      found = experiment.evaluate_best(config, workdir, store, output)
      path = workdir / experiment.EVALUATION
    said = f'{report.table_of(found)}\n{report.places_of(workdir, path, store)}'
  writer.show(said)
  processes.stop()


def _folders() -> tuple[Path, Path]:
  """Of the run and of the stores, as the flags say."""
  name = 'run'
  if FLAGS['config'].present:
    # PATH or PATH:ARGUMENT, the argument of get_config: two models of one file are two runs.
    file, _, argument = config_flags.get_config_filename(FLAGS['config']).partition(':')
    name = '-'.join([Path(file).stem, *re.findall(r'\w+', argument)])
  workdir = Path(FLAGS.workdir or Path('runs') / name)
  return workdir, Path(FLAGS.stores or workdir.parent / 'stores')


def _prune():
  workdir, stores = _folders()
  _log_to_stderr()

  from lmn_jax.training import prune, writer

  places = [*dict.fromkeys((stores.parent, workdir.parent) if FLAGS.workdir else [stores.parent])]
  name = FLAGS.config.data.name if FLAGS['config'].present else ''
  writer.show(prune.prune(stores, places, name, FLAGS.yes))


def _check_flags():
  for name in FLAGS:
    modes = ('serve',) if name.startswith('serve.') else ONLY.get(name, MODES)
    if FLAGS[name].present and FLAGS.mode not in modes:
      raise UserError(
        f'--{name}={FLAGS[name].value} is for --mode={" or ".join(modes)}, and this is '
        f'--mode={FLAGS.mode}'
      )


def _serve():
  if FLAGS['config'].present:
    raise UserError('--config is of a run, and --mode=serve takes --export=DIR')
  if not FLAGS.export:
    raise UserError('--export is missing; for example --export=runs/lmn_douyin/export')
  _log_to_stderr()

  from lmn_jax.serving import server

  chosen = FLAGS.serve if 'serve' in FLAGS else settings.settings()
  server.serve(chosen, FLAGS.export)


def _log_to_stderr():
  """Our own lines as they are; orbax and JAX only from warnings on."""
  # They report their inner life at INFO; --verbosity=0 shows it.
  if not FLAGS['verbosity'].present:
    absl_logging.set_verbosity(absl_logging.WARNING)
    # What its threads fail with it raises as well, where we tell it in a line.
    absl_logging.get_absl_handler().addFilter(
      lambda record: record.levelno < logging.ERROR or 'orbax' not in record.pathname
    )
  say = logging.getLogger('lmn_jax')
  say.setLevel(logging.INFO)
  say.propagate = False
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(message)s'))
  say.handlers = [handler]


def run_main() -> None:
  """Entry point of the `lmn-jax` command."""
  # XLA and orbax are talkative on standard error about things no user can mend.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  interrupts.listen()
  try:
    app.run(main, flags_parser=parse)
  except (KeyboardInterrupt, interrupts.Terminated) as error:  # while the flags are parsed
    message, status = explain(error)
    interrupts.leave(f'error: {message}', status)


if __name__ == '__main__':
  run_main()
