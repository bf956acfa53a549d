"""The command line: the output of a run, and the error of each mistake."""

import errno
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

import lmn_jax
from lmn_jax import cli_errors, commands, config_files, main
from lmn_jax.evaluation import click_evaluation, report
from lmn_jax.planning import slices
from lmn_jax.training import loop
from lmn_jax.training import setup as setups
from tests.logfiles import append, write_log
from tests.runs import LOG, forget_flags, steps_kept, tiny_config

HERE = Path(__file__).parent
CONFIG = '''"""A tiny experiment."""

from tests.runs import tiny_config


def get_config():
  return tiny_config({arguments})
'''


def call(monkeypatch, capsys, *arguments):
  """Runs a command line in this process; returns (exit status, stdout, stderr)."""
  argv = ['lmn_jax', *map(str, arguments)]
  forget_flags(monkeypatch, argv)
  capsys.readouterr()
  try:
    with warnings.catch_warnings():
      # ml_collections loads config files with a deprecated function of Python.
      warnings.filterwarnings('ignore', 'the load_module', DeprecationWarning)
      rest = main.parse(argv)
    main.main(rest)
    code = 0
  except SystemExit as stop:
    code = stop.code
  out = capsys.readouterr()
  return code, out.out, out.err


@pytest.fixture(scope='module')
def stores(tiny_store):
  return tiny_store.path.parent


@pytest.fixture
def config(tmp_path):
  """A config file."""
  path = tmp_path / 'tiny.py'
  path.write_text(CONFIG.format(arguments=''))
  return path


@pytest.fixture
def refuse(monkeypatch, capsys, tmp_path, config, stores):
  """Runs a command line with `--config` that fails, and returns its error message."""

  def refuse(*arguments, status=2, config=config):
    workdir = tmp_path / 'run'
    flags = [f'--config={config}', f'--workdir={workdir}', f'--stores={stores}']
    code, out, err = call(monkeypatch, capsys, *flags, *arguments)
    *before, line = err.splitlines()
    assert code == status and out == '', err
    assert line.startswith('error: ') and 'Traceback' not in err
    # The lines before are the progress of the preparation.
    assert all(re.fullmatch(r'(store \S+ is|the log is read:) .*', x) for x in before), before
    return line.removeprefix('error: ')

  yield refuse
  assert not (tmp_path / 'run').exists(), 'a refused command has created a workdir'


@pytest.mark.parametrize(
  'arguments, expected',
  [
    (['--fooo=1'], "Unknown command line flag 'fooo'"),
    (['--wordir=x'], "Unknown command line flag 'wordir'. Did you mean: workdir ?"),
    (
      ['--config.stepz=3'],
      "--config.stepz: the config has no field 'stepz'; did you mean 'steps'?",
    ),
    (
      ['--config.model.widht=3'],
      "--config.model.widht: the config has no field 'widht'; did you mean 'width'?",
    ),
    (
      ['--config.data.nothing_like_it=3'],
      "--config.data.nothing_like_it: the config has no field 'nothing_like_it'; the fields are "
      'listed in lmn_jax/config.py',
    ),
    (['--config.steps=abc'], 'flag --config.steps=abc: must be a whole number'),
    (['--config.steps=2.5'], 'flag --config.steps=2.5: must be a whole number'),
    (['--config.optimizer.dense.rate=x'], 'flag --config.optimizer.dense.rate=x: must be a number'),
    (
      ["--config.optimizer.dense.arguments={'b3': 0.9}"],
      "config.optimizer.dense.arguments of adam: field='b3' is unknown; available: b1, b2, eps",
    ),
    (
      ['--config.optimizer.dense.arguments=3'],
      'flag --config.optimizer.dense.arguments=3: must be a dict, in quotes for the shell, such as',
    ),
    (
      ['--config.optimizer.dense.arguments={'],
      'flag --config.optimizer.dense.arguments={: must be a dict, in quotes for the shell',
    ),
    (['--config.metrics=(1,)'], 'config.metrics=(1,) must be a tuple of texts'),
    (['--config.data.source='], 'config.data.source is empty; name the log'),
    (['--mode=evaluate', '--output='], '--output is missing; it must be a file ending in .parquet'),
    (['--config.model.bf16=maybe'], 'flag --config.model.bf16=maybe: must be true or false'),
    (
      ['--config.model.hidden=a'],
      "config.model.hidden=('a',) must be whole numbers from 1 on",
    ),
    (
      ['--mode=trian'],
      "--mode='trian' is unknown; did you mean 'train'? available: train, evaluate",
    ),
    (['--input=x.csv'], '--input=x.csv is for --mode=predict, and this is --mode=train'),
    (['--mode=evaluate', '--top_k=5'], '--top_k=5 is for --mode=predict, and this is --mode=eval'),
    (['--mode=predict', '--top_k=x'], 'flag --top_k=x: must be a whole number'),
    (['--mode=predict'], '--input is missing; give the rows to score, or the users with --top_k'),
    (['--mode=predict', '--input=none.csv'], "--input='none.csv' does not exist; correct the path"),
    (['stray'], "argument 'stray' is not a flag; flags begin with --"),
    (
      ['--config.model.name=dni'],
      "config.model.name='dni' is unknown; did you mean 'din'? available: pooling, din, ",
    ),
    (['--config.steps=0'], 'config.steps=0 must be at least 1'),
    (['--config.loss.memory_weight=nan'], 'config.loss.memory_weight=nan must be at least 0'),
    (
      ['--config.batch_size=1001'],
      'config.batch_size=1001 is not divisible by the 8 devices of the data axis; use 1000 or 1008',
    ),
    (
      ['--config.mesh.model=3'],
      'config.mesh.model=3 does not divide the number of devices, 8; use 1 or 2 or 4 or 8',
    ),
    (['--config.buckets=(10,5)'], 'config.buckets=(10, 5) must ascend, such as (10, 50, 200)'),
    (
      ['--config.optimizer.schedule=cosin'],
      "config.optimizer.schedule='cosin' is unknown; did you mean 'cosine'?",
    ),
    (
      ['--config.optimizer.memory.rows=bf16'],
      "config.optimizer.memory.rows='bf16' is unknown; did you mean 'bfloat16'?",
    ),
    (['--mode=evaluate'], '/run holds no checkpoint; run --mode=train first'),
    (['--mode=plan'], '--mode=plan needs a TPU slice; for example --topology=v5e:16x16'),
    (
      ['--mode=plan', '--topology=v5e:16x61'],
      "--topology='v5e:16x61' is unknown; did you mean 'v5e:16x16'? available: v4:2x2x1, ",
    ),
    (['--topology=v5e:2x2'], '--topology=v5e:2x2 is for --mode=plan, and this is --mode=train'),
    (['--config.data.source=/nowhere.csv'], "data.source='/nowhere.csv' does not exist"),
    (['--config.data.split.protocol=rando'], "split.protocol='rando' is unknown"),
  ],
)
def test_mistakes(refuse, arguments, expected):
  assert expected in refuse(*arguments)


@pytest.mark.parametrize('mistake', ['steps=0', 'mesh.model=3', 'model.name=dni'])
def test_a_wrong_config_is_refused_before_data_are_prepared(refuse, tmp_path, mistake):
  refuse(f'--config.{mistake}', f'--stores={tmp_path / "stores"}')
  assert not (tmp_path / 'stores').exists()


def test_a_plan_checks_the_devices_of_the_slice(refuse, monkeypatch, tmp_path):
  monkeypatch.setattr(slices, 'slice_of', lambda topology: jax.devices()[:6])
  plan = ['--mode=plan', '--topology=v5e:2x4', f'--stores={tmp_path / "stores"}']
  assert 'not divisible by the 6 devices of the data axis; use 30 or 36' in refuse(*plan)
  assert 'does not divide the number of devices, 6; use 1 or 2 or 3 or 6' in refuse(
    *plan, '--config.mesh.model=4'
  )
  assert not (tmp_path / 'stores').exists()


def test_a_field_of_another_model(refuse, config):
  config.write_text(CONFIG.format(arguments="'lmn'"))
  line = refuse('--config.model.name=din')
  assert re.match(
    r'config.model.base, .*value_scale: unknown fields of model .din.; its fields are attention',
    line,
  )
  assert 'config.model.top_k=9 is larger than slots_per_axis=8' in refuse('--config.model.top_k=9')


@pytest.mark.parametrize(
  'text, expected',
  [
    ('def get_config(:\n', ' line 1: SyntaxError: invalid syntax'),
    ('\nimport nothing_here\n', " line 2: ModuleNotFoundError: No module named 'nothing_here'"),
    ('def get_config():\n  return 1 / 0\n', ' line 2: ZeroDivisionError: division by zero'),
    ('x = 3\n', ' defines no function get_config()'),
    (
      'def get_config():\n  return None\n',
      ': get_config() must return a ConfigDict and returned None',
    ),
    (
      CONFIG.format(arguments='widht=3'),
      ' line 7: KeyError: Key "widht" does not exist and cannot be added since the config is '
      "locked. Did you mean 'width'?",
    ),
    (
      'from lmn_jax.config import base\ndef get_config():\n  return base("lmn", stpes=1)\n',
      " line 3: config field='stpes' is unknown; did you mean 'steps'?",
    ),
    (
      'from lmn_jax.config import base\ndef get_config():\n  c = base("lmn")\n  c.stepz = 1\n',
      ' line 4: AttributeError: Key "stepz" does not exist',
    ),
    (
      'from lmn_jax.config import base\ndef get_config():\n  c = base("lmn")\n  c.steps = "1"\n',
      " line 4: TypeError: Could not override field 'steps'",
    ),
  ],
)
def test_a_config_file_with_an_error(refuse, config, text, expected):
  config.write_text(text)
  assert f'{config}{expected}' in refuse()


@pytest.mark.parametrize(
  'takes, argument, expected',
  [
    ('', ':din', ': get_config() takes no argument; give --config={} without one'),
    ('model', '', ': get_config() takes an argument; give it as --config={}:ARGUMENT'),
    ('model', ':', " line 2: ValueError: no model is called ''"),
  ],
)
def test_the_argument_of_a_config(refuse, config, takes, argument, expected):
  config.write_text(
    f'def get_config({takes}):\n  raise ValueError(f"no model is called {{{takes or 0}!r}}")\n'
  )
  assert refuse(config=f'{config}{argument}') == f'{config}{expected.format(config)}'


def test_no_config(refuse, config, monkeypatch, capsys):
  assert 'is unknown; did you mean' in refuse(config=config.with_name('tyni.py'))
  assert "--config='/nowhere/x.py' is not a file; for example" in refuse(config='/nowhere/x.py')
  for argument in ('--config=', '--config=:din'):
    code, out, err = call(monkeypatch, capsys, argument)
    assert (code, out) == (2, '') and err.startswith('error: --config names no file; for example')
  for arguments in ([], ['--mode=prepare'], ['--config.steps=3']):
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, '') and err.count('\n') == 1
    assert err.startswith('error: --config is missing') and cli_errors.EXAMPLE in err


def log_file(tmp_path, rows, header='user,item,time,label'):
  path = tmp_path / 'log.csv'
  path.write_text('\n'.join([header, *rows]) + '\n')
  return [
    f'--config.data.source={path}', '--config.data.name=own', f'--stores={tmp_path / "stores"}',
    '--config.data.user_features=()', '--config.data.item_features=()',
    '--config.data.context_features=()',
  ]  # fmt: skip


@pytest.mark.parametrize(
  'rows, header, expected',
  [
    ([], 'user,item,time,label', 'the log is empty'),
    (['u,i,1,1'], 'user,itme,time,label', "'item'"),
    (['u,i,noon,1'], 'user,item,time,label', 'noon'),
    (['u,i,1,1', 'u,i,2,5'], 'user,item,time,label', 'data.label_threshold'),
  ],
)
def test_a_log_with_a_mistake(refuse, tmp_path, rows, header, expected):
  assert expected in refuse(*log_file(tmp_path, rows, header))
  assert [x.name for x in (tmp_path / 'stores').iterdir()] in ([], ['.own.lock'])


@pytest.mark.parametrize('number', [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize('folder', ['run', 'stores'])
def test_folders_that_cannot_be_written(refuse, tmp_path, monkeypatch, number, folder):
  """Modes of folders do not restrict root, so the error of the system is simulated."""
  mkdir = os.mkdir

  def refused(path, *arguments, **named):
    if Path(path).is_relative_to(tmp_path / folder):
      raise OSError(number, os.strerror(number), str(path))
    return mkdir(path, *arguments, **named)

  monkeypatch.setattr(os, 'mkdir', refused)
  line = refuse(f'--stores={tmp_path / "stores"}', f'--config.data.synthetic.users={LOG["users"]}')
  assert re.match(rf'{tmp_path / folder}\S*: {os.strerror(number)}; choose another --workdir', line)


def test_a_file_instead_of_a_folder(refuse, config):
  assert re.match(rf'{config}: (Not a directory|File exists)', refuse(f'--workdir={config}'))
  assert re.match(rf'{config}: (Not a directory|File exists)', refuse(f'--stores={config}'))


def test_an_error_of_the_program_is_raised(monkeypatch):
  for error in (ValueError('a bug'), OSError(errno.EBADF, 'a bug')):

    def run(error=error):
      raise error

    monkeypatch.setattr(main, 'run', run)
    with pytest.raises(type(error), match='a bug'):
      main.main([])


INTERRUPTED = """
import os, signal, sys, threading, time
from lmn_jax import main

def run():
  threading.Thread(target=time.sleep, args=(60,)).start()  # Python would wait for it
  {}

main.run = run
sys.argv[1:] = ['--mode=prepare']
main.run_main()
"""
# DuckDB ignores signals in a different way in each of them.
QUERIES = [
  'db.execute("SELECT count(DISTINCT md5(range::VARCHAR)) FROM range(1000000000)")',
  'db.sql("SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b").fetchall()',
]
IN_DUCKDB = """
  import tempfile
  from pathlib import Path
  from lmn_jax.data import interactions
  folder = Path(tempfile.mkdtemp())
  db = interactions.connect(folder / 'db', '1GB', folder)
  threading.Timer(0.5, os.kill, (os.getpid(), signal.{})).start()
  {}
"""


@pytest.mark.usefixtures('hears_ctrl_c')
@pytest.mark.parametrize(
  'what, status, message',
  [
    ('raise KeyboardInterrupt', 130, 'interrupted; the same command starts again'),
    (
      'raise KeyboardInterrupt("interrupted: step 4 is saved")', 130, 'interrupted: step 4 is saved'
    ),
    (IN_DUCKDB.format('SIGINT', QUERIES[0]), 130, 'interrupted; the same command starts again'),
    (
      IN_DUCKDB.format('SIGTERM', QUERIES[1]), 143,
      'ended by SIGTERM; the same command starts again',
    ),
  ],
)  # fmt: skip
def test_an_interrupt_is_one_line(what, status, message):
  done = subprocess.run(
    [sys.executable, '-c', INTERRUPTED.format(what)], capture_output=True, text=True, timeout=60
  )
  assert (done.returncode, done.stdout, done.stderr) == (status, '', f'error: {message}\n')


@pytest.mark.usefixtures('hears_ctrl_c')
def test_a_second_interrupt_ends_at_once():
  what = 'signal.raise_signal(signal.SIGINT)\n'
  code = INTERRUPTED.format(f'try:\n    {what}  finally:\n    {what}')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stderr) == (130, 'error: ended by a second SIGINT\n')


def test_an_interrupted_training_names_its_last_checkpoint(tiny_store, tmp_path, monkeypatch):

  def interrupted(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(setups, 'set_up', interrupted)
    with pytest.raises(KeyboardInterrupt, match='interrupted: nothing is saved yet; the same comm'):
      loop.train(tiny_config(), tmp_path, tiny_store)
  with monkeypatch.context() as patch:
    # A step is saved before it is validated.
    patch.setattr(click_evaluation, 'score', interrupted)
    with pytest.raises(KeyboardInterrupt, match='interrupted: step 4 is saved .*; the same'):
      loop.train(tiny_config(), tmp_path, tiny_store)


def test_a_run_from_first_to_last(monkeypatch, capsys, tmp_path, config, tiny_store):
  """Trains, continues, evaluates and prepares; refuses another config or damaged data."""
  workdir, stores = tmp_path / 'runs' / 'tiny', tmp_path / 'runs' / 'stores'
  flags = [f'--config={config}', f'--workdir={workdir}']
  code, out, err = call(monkeypatch, capsys, *flags)
  assert code == 0
  table = out.split('\n\n')[0].splitlines()
  assert (
    table[0].split()[:3] == ['test,', str(tiny_store.examples['test']), 'rows']
    and 'auc' in table[0]
  )
  assert [line.split()[0] for line in table[1:]] == [
    'popularity', 'item_mean', 'item_user_mean', 'pooling',
  ]  # fmt: skip
  assert re.search(r'^10-49 +\d+  0\.\d{4}  0\.\d{4}$', out, re.M)
  assert len({len(line) for line in table}) == 1 and len(table[0]) <= 100
  (store,) = stores.glob('douyin_standin-*')
  assert out.splitlines()[-5:] == [
    f'run:         {workdir}',
    f'report:      {workdir}/report.json',
    f'metrics:     {workdir}/metrics.jsonl',
    f'tensorboard: {workdir}/tensorboard',
    f'store:       {store}',
  ]
  for line in out.splitlines()[-5:]:
    assert Path(line.split(': ')[1].strip()).exists()
  assert re.search(
    r'^step 8/16 50% · eta \d+s · [\d.]+k? ex/s · loss 0\.\d{4} · auc 0\.\d{4} · [\d.]+ GiB$',
    err,
    re.M,
  )
  assert re.search(r'^valid auc 0\.\d{4} · gauc 0\.\d{4} · log_loss 0\.\d{4} · ', err, re.M)

  def parts(out):
    return out.split('\nrun:')[0]

  again, evaluated, prepared = (
    call(monkeypatch, capsys, *flags, *more)
    for more in ([], ['--mode=evaluate'], ['--mode=prepare'])
  )
  assert 'resumed from step 16' in again[2] and 'step 16/16' not in again[2]
  assert parts(again[1]) == parts(evaluated[1]) == parts(out)
  assert f'report:      {workdir}/evaluation.json' in evaluated[1]
  assert prepared[1].splitlines()[0].startswith('rows read ')
  assert prepared[1].endswith(f'{tiny_store.protocol}\nstore: {store}\n')

  def refused(*more):
    code, out, err = call(monkeypatch, capsys, *flags, *more)
    assert (code, out) == (2, '') and 'Traceback' not in err
    return err.splitlines()[-1]

  for mode in ('train', 'evaluate'):
    assert refused(f'--mode={mode}', '--config.model.width=6') == (
      f'error: {workdir} holds another experiment: config.model.width was 4 and is 6; use another '
      '--workdir, or delete this one. Fields that may change when a run continues: steps, '
      'log_every, eval_every, save_every, patience, skip_not_finite, eval_batch_size, buckets, '
      'sampled_negatives, metrics, mesh.model, data.memory_limit, '
      'loader_workers, store_on, steps_per_dispatch'
    )
  assert 'config.data.seed was 0 and is 1' in refused('--config.data.seed=1')
  assert list(stores.glob('douyin_standin-*')) == [store]
  victim = sorted(store.glob('part-*/history.arrow'))[-1]
  victim.write_bytes(victim.read_bytes()[:-9])
  line = refused()
  assert str(victim) in line and 'bytes expected; run --mode=prepare again' in line
  code, _, err = call(monkeypatch, capsys, *flags, '--mode=prepare')
  assert code == 0 and f'store {store} is built: ' in err
  assert call(monkeypatch, capsys, *flags)[1] == again[1]


@pytest.mark.slow
def test_a_trained_model_does_not_depend_on_later_logs(monkeypatch, capsys, tmp_path):
  """Every mode reads the store of the run; a new run reads the current log."""
  log = write_log(tmp_path / 'log.csv', 400)
  config = tmp_path / 'own.py'
  config.write_text(
    f'from tests.logfiles import data_of\n{CONFIG.format(arguments="")}'.replace(
      'return tiny_config()',
      f'config = tiny_config()\n  config.data = data_of({str(log)!r})\n  return config',
    )
  )
  rows, scores = tmp_path / 'rows.csv', tmp_path / 'scores.csv'
  rows.write_text('user,item\nu1,i1\n')
  flags = [f'--config={config}', f'--workdir={tmp_path / "runs" / "run"}', '--config.steps=8']
  modes = (
    ['--mode=predict', f'--input={rows}', f'--output={scores}'],
    ['--mode=evaluate'],
    ['--mode=train'],
  )

  def results(*more):
    scores.unlink(missing_ok=True)
    code, out, err = call(monkeypatch, capsys, *flags, *more)
    assert code == 0, err
    return [scores.read_bytes()] if 'predict' in more[0] else out.split('\nrun:')[0], err

  results('--mode=train')
  expected = [results(*mode)[0] for mode in modes]
  append(log, 'u1,i2,401,1')
  for mode, before in zip(modes, expected, strict=True):
    after, err = results(*mode)
    assert after == before and err.count('the log has changed since') == 1
    assert '1 file of' in err and 'another --workdir' in err
  log.unlink()
  for mode, before in zip(modes, expected, strict=True):
    after, err = results(*mode)
    assert after == before and 'log has changed' not in err
  write_log(log, 401)
  results('--mode=prepare')
  assert len(list((tmp_path / 'runs' / 'stores').glob('log-*'))) == 2
  code, out, _ = call(monkeypatch, capsys, '--mode=prune', f'--workdir={tmp_path / "runs" / "run"}')
  assert code == 0 and out.splitlines()[-1] == 'nothing to remove'
  flags[1] = f'--workdir={tmp_path / "runs" / "none"}'
  code, _, err = call(monkeypatch, capsys, *flags, '--mode=evaluate')
  assert code == 2 and 'holds no checkpoint; run --mode=train first' in err


def test_divergence_ends_with_status_1(refuse, tmp_path, monkeypatch, capsys, config, stores):
  wild = [f'--config.optimizer.{group}.{field}' for group in ('dense', 'embedding')
          for field in ('name=sgd', 'rate=1e30')]  # fmt: skip
  workdir = tmp_path / 'wild'
  code, out, err = call(
    monkeypatch, capsys, f'--config={config}', f'--workdir={workdir}', f'--stores={stores}', *wild,
    '--config.save_every=1',
  )  # fmt: skip
  assert (code, out) == (1, '') and 'Traceback' not in err
  assert re.fullmatch(
    r'error: not finite at step 2: the loss is (nan|inf), losses/click and \d+ more; the last good '
    rf'checkpoint is step 1 \({workdir}/checkpoints\)\. Lower config\.optimizer\.\*\.rate or set '
    r'config\.optimizer\.clip_norm, with another --workdir; or continue this run and skip such '
    r'steps with config\.skip_not_finite=N',
    err.splitlines()[-1],
  )
  assert steps_kept(workdir) == [1]


def program(*arguments, before=(), module='lmn_jax', **environment):
  return subprocess.run(
    [*before, sys.executable, '-m', module, *map(str, arguments)],
    cwd=HERE.parent, capture_output=True, text=True, timeout=300, env=os.environ | environment,
  )  # fmt: skip


@pytest.mark.parametrize('module', ['lmn_jax', 'lmn_jax.main'])
def test_help_is_short(module):
  """It is the same for both modules, and lists the configs that have a name."""
  done = program('--help', module=module)
  assert done.returncode in (0, 1) and done.stderr == ''
  assert len(done.stdout.splitlines()) < 50
  for name in ('--config', '--workdir', '--stores', '--mode', 'configs/lmn_douyin.py'):
    assert name in done.stdout
  assert set(config_files.names()) <= set(re.findall(r'\w+', done.stdout))


def test_the_version(monkeypatch, capsys):
  code, out, err = call(monkeypatch, capsys, '--version', '--config=/nowhere.py')
  assert (code, out) == (2, '') and 'is not a file' in err  # mistakes are errors all the same
  code, out, err = call(monkeypatch, capsys, '--version')
  versions = rf'lmn_jax {lmn_jax.__version__} \(jax {jax.__version__}, Python 3\.\d+\.\d+\)\n'
  assert (code, err) == (0, '') and re.fullmatch(versions, out)


def test_a_config_by_its_name(monkeypatch, capsys, tmp_path):
  """From any folder, with an argument; the name of the run has both."""
  monkeypatch.chdir(tmp_path)
  line = call(monkeypatch, capsys, '--config=douyin:sim', '--mode=evaluate')[2]
  assert line == 'error: runs/douyin-sim holds no checkpoint; run --mode=train first\n'
  line = call(monkeypatch, capsys, '--config', 'lmn_douyin', '--config.stepz=3')[2]
  assert line.startswith("error: --config.stepz: the config has no field 'stepz'; did you mean 'st")
  line = call(monkeypatch, capsys, '--config=lmn_douyn')[2]
  assert line.startswith("error: --config='lmn_douyn' is unknown; did you mean 'lmn_douyin'?")
  line = call(monkeypatch, capsys, '--config=douyin:lmn')[2]
  assert re.fullmatch(
    r'error: \S+/configs/douyin\.py line \d+: LMN has a config of its own; use '
    r'--config=lmn_douyin\n',
    line,
  )
  assert not list(tmp_path.iterdir())


def test_every_flag_of_a_command_exists():
  names = {name for command in commands.COMMANDS.values() for name in command.flags}
  assert names <= set(main.FLAGS)


@pytest.mark.slow
def test_as_a_program(tmp_path, config):
  """One process as a user starts it, with one device."""
  workdir = tmp_path / 'runs' / 'a'
  done = program(f'--config={config}', f'--workdir={workdir}', '--config.steps=2')
  assert done.returncode == 0, done.stderr
  assert f'{workdir}/report.json' in done.stdout
  assert json.loads((workdir / 'report.json').read_text())['devices'].startswith('1 ')
  assert 'Warning' not in done.stderr and 'WARNING' not in done.stderr, done.stderr
  done = program(f'--config={config}', f'--workdir={workdir}', '--config.seed=9')
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.splitlines()[-1].startswith('error: ') and 'Traceback' not in done.stderr, (
    done.stderr
  )


@pytest.mark.slow
def test_a_full_disk(tmp_path, config, stores):
  """A limit on file sizes stands for a full disk: one line, and the last checkpoint is sound."""
  workdir = tmp_path / 'run'

  def run(*more, **named):
    flags = f'--config={config}', f'--workdir={workdir}', f'--stores={stores}'
    # Optimization by the compiler does not matter.
    return program(*flags, *more, JAX_DISABLE_MOST_OPTIMIZATIONS='1', **named)

  assert run('--config.steps=3').returncode == 0
  # 2 KiB: less than a checkpoint's largest file, more than the lines of these steps.
  done = run(before=('bash', '-c', 'ulimit -f 2; exec "$@"', 'bash'))
  message = (
    'File too large; the last good checkpoint is step 3. Free space or repair the disk; the same'
  )
  assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
  assert done.stderr.splitlines()[-1].startswith('error: ') and message in done.stderr, done.stderr
  assert steps_kept(workdir) == [3]
  done = run('--config.steps=4')
  assert done.returncode == 0 and 'resumed from step 3' in done.stderr, done.stderr


def test_the_report_names_the_commit(monkeypatch):
  assert re.fullmatch(r'[0-9a-f]{40}(\+changes)?', report.commit() or '0' * 40)
  monkeypatch.setenv('PATH', '')
  assert report.commit() is None
