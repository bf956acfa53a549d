"""README and docs/: Python blocks run, commands are valid, figures are those of the log.

Commands are checked without running them: by `bash -n`, by the dry run of the launcher, and by
parsing their flags with the config file that they name.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

from lmn_jax import config_files, main
from lmn_jax.commands import COMMANDS
from lmn_jax.export import export
from lmn_jax.training import loop
from tests.runs import forget_flags, mesh_of, tiny_config, untrained

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ROOT / 'docs/reference/generated'  # written by a build
PAGES = [
  ROOT / 'README.md',
  *sorted(x for x in (ROOT / 'docs').rglob('*.md') if GENERATED not in x.parents),
]
LANGUAGES = (
  'python', 'shell', 'text', '{toctree}', '{include}', '{literalinclude}', '{eval-rst}',
)  # fmt: skip
HOW_TO_CODE = ROOT / 'docs/how_to/code'
# Flags of launch.sh itself; it passes all others to the program.
LAUNCHER = ('dry-run', 'hosts', 'tpu', 'zone', 'project', 'nodes', 'follow', 'stop')
# Other programs in the block that .ci/run runs.
SYSTEM = ('printf', 'curl', 'ask', 'kill')
RUN_BY_CI = 'run by .ci/run'
PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))


class Block(NamedTuple):
  """A fenced block. note: the comment above it. option: of a directive, such as a file."""

  page: Path
  line: int
  note: str
  language: str
  option: str
  text: str


def blocks(page):
  """The fenced blocks of a page, in order."""
  text = page.read_text(encoding='utf-8')
  fenced = re.compile(r'(?:^<!-- (.*?) -->\n)?^```(.*?)\n(.*?)^```$', re.M | re.S)
  for block in fenced.finditer(text):
    line = text.count('\n', 0, block.start(2)) + 1
    language, _, option = block[2].partition(' ')
    yield Block(page, line, block[1] or '', language, option, block[3])


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == 'shell']
PYTHON = list(dict.fromkeys(block.page for block in BLOCKS if block.language == 'python'))


def name_of(x):
  if isinstance(x, Block):
    return f'{x.page.relative_to(ROOT)}:{x.line}'
  return str(x.relative_to(ROOT))


def test_every_block_has_a_known_language():
  """A block without a language would not be checked."""
  assert len(BLOCKS) > 40
  for block in BLOCKS:
    assert block.language in LANGUAGES, f'{name_of(block)}: {block.language!r}'


def test_every_file_of_the_how_to_code_is_shown_and_named():
  """Each file is on one page, in the text and among the files of its commands."""
  shown = {
    (block.page.parent / block.option).resolve(): block.page
    for block in BLOCKS
    if block.language == '{literalinclude}'
  }
  assert set(shown) == set(HOW_TO_CODE.glob('*.py'))
  for path, page in shown.items():
    assert f'`{path.name}`' in page.read_text(encoding='utf-8')
    assert any(path.name in code_files(block) for block in SHELL if block.page == page), path.name


def code_files(block):
  """Names of the files of the how-to code that the commands of a block use."""
  what, _, value = block.note.partition(': ')
  return value.split() if what == 'code' else []


def make_export(folder):
  """An export of an untrained model with the columns of the stand-in."""
  config, workdir, store = untrained(tiny_config('lmn'), folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.meshes, 'make_mesh', lambda *_: mesh_of(1))
    export.export(config, workdir, store, folder / 'runs/lmn_douyin/export', 'float32')


NEEDS = {'runs/lmn_douyin/export': make_export}


@pytest.mark.parametrize('page', PYTHON, ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
  """The blocks of a page run in order, with shared names, in an empty folder."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(loop.meshes, 'make_mesh', lambda *_: mesh_of(1))
  before, names = set(sys.modules), {'__name__': 'page'}
  try:
    for block in blocks(page):
      if block.language != 'python':
        continue
      what, _, value = block.note.partition(': ')
      if what == 'needs':
        NEEDS[value](tmp_path)
      if what == 'file':
        Path(value).write_text(block.text, encoding='utf-8')
      else:
        code = compile('\n' * block.line + block.text, str(page), 'exec')
        exec(code, names)
  finally:
    forget_modules(set(sys.modules) - before, tmp_path)


def forget_modules(names, folder):
  """Removes the modules that were imported from a folder."""
  for name in names:
    if str(getattr(sys.modules[name], '__file__', '')).startswith(str(folder)):
      del sys.modules[name]


def commands(text):
  """The commands of a shell block as lists of words, without redirections and variables."""
  for line in text.replace('\\\n', ' ').replace(' && ', '\n').splitlines():
    words = shlex.split(line, comments=True)
    if '()' in line.partition(' ')[0]:  # the definition of a function
      continue
    if words and words[-1] == '&':
      words.pop()
    if '>' in words:
      words = words[: words.index('>')]
    while words and re.fullmatch(r'[A-Z_]+=\S*', words[0]):
      words.pop(0)
    if words:
      yield words


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The current folder: a copy of the checkout, by links."""
  before = set(sys.modules)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  for path in ROOT.iterdir():
    if path.name not in ('runs', '.venv'):
      (tmp_path / path.name).symlink_to(path)
  monkeypatch.chdir(tmp_path)
  yield tmp_path
  forget_modules(set(sys.modules) - before, tmp_path)


@pytest.mark.parametrize('block', SHELL, ids=name_of)
def test_commands_are_valid(block, folder, monkeypatch):
  subprocess.run(['bash', '-n'], input=block.text, text=True, check=True)
  for other in blocks(block.page):
    if other.note.startswith('file: '):
      (folder / other.note.removeprefix('file: ')).write_text(other.text, encoding='utf-8')
  for name in code_files(block):
    shutil.copy(HOW_TO_CODE / name, folder)
  lines = list(commands(block.text))
  assert lines, 'no command'
  for words in lines:
    check_command(words, monkeypatch, may_use_system=block.note == RUN_BY_CI)


def check_command(words, monkeypatch, may_use_system):
  program, *rest = words
  python = Path(program).name == 'python'
  if program == './launch.sh':
    check_launcher(rest)
    if not {'--test', '--test-slow', '--docs'} & set(rest):
      flags = [x for x in rest if x.partition('=')[0].lstrip('-') not in LAUNCHER]
      if flags:
        check_flags(flags, monkeypatch)
  elif Path(program).name == 'lmn-jax':
    if rest not in (['--help'], ['--version']):
      check_flags(rest, monkeypatch)
  elif python and rest[:2] == ['-m', 'lmn_jax']:
    check_flags(rest[2:], monkeypatch)
  elif python and rest[0].startswith('experiments/'):
    check_script(Path(rest[0]), rest[1:])
  elif Path(program).name == 'pip' and rest[0] == 'install':
    extras = PYPROJECT['project']['optional-dependencies']
    for names in re.findall(r'\[(.*?)\]', ' '.join(rest)):
      assert set(names.split(',')) <= set(extras), f'{names}: no extra of pyproject.toml'
    for path in re.findall(r'--constraint (\S+)', ' '.join(rest)):
      assert Path(path).is_file(), path
  elif not (
    (python and rest[:2] == ['-m', 'venv'])
    or words in (['git', 'clone', 'REPOSITORY'], ['cd', 'lmn_jax'])
  ):
    assert may_use_system and program in SYSTEM, f'{program} is not checked'


def check_launcher(arguments):
  environment = os.environ | {'LMN_EXTRA': 'cpu', 'LMN_PYTHON': sys.executable}
  call = ['./launch.sh', '--dry-run', *arguments]
  subprocess.run(call, env=environment, check=True, capture_output=True, text=True, timeout=60)


def check_flags(arguments, monkeypatch):
  """Parses flags as the program does; an unknown flag, field or file, or a wrong type, exits."""
  argv = ['lmn_jax', *arguments]
  forget_flags(monkeypatch, argv)
  with warnings.catch_warnings():
    # ml_collections loads config files in a way that Python wants to remove one day.
    warnings.filterwarnings('ignore', 'the load_module', DeprecationWarning)
    main.parse(argv)
  mode = main.FLAGS.mode
  assert mode in COMMANDS
  limited = {name for command in COMMANDS.values() for name in command.flags}
  for name in limited - set(COMMANDS[mode].flags):
    assert not main.FLAGS[name].present, f'--{name} is not for --mode={mode}'


def check_script(script, arguments):
  assert script.is_file(), script
  source = script.read_text(encoding='utf-8')
  for argument in arguments:
    name, _, value = argument.partition('=')
    assert name.startswith('--'), argument
    assert name.startswith('--config.') or f"'{name}'" in source, f'{script}: {name}'
    for path in re.findall(r'configs/\w+\.py', value):
      assert Path(path).is_file(), path
    if name == '--config':
      config_files.path_of(value)


def test_the_checks_of_commands_can_fail(folder, monkeypatch):
  wrong = [
    './launch.sh --config=configs/lmn_douyn.py',
    './launch.sh --hosts=none --config=configs/lmn_douyin.py',
    'lmn-jax --config=lmn_douyin --config.stepz=3',
    'python -m lmn_jax --config=lmn_douyin --config.steps=many',
    'lmn-jax --config=lmn_douyin --top_k=3',
    'lmn-jax --mode=serve --serve.prot=8000',
    'python experiments/no_such_script.py',
    'python experiments/latency.py --no-such-flag',
    "pip install '.[cpu,no_such_extra]'",
    "pip install --constraint no_such_file.txt '.[cpu]'",
    'git clone ELSEWHERE',
    'lmn-jax --config=lmn_douyn',
    'wget something',
  ]
  for line in wrong:
    (words,) = commands(line)
    with pytest.raises((SystemExit, AssertionError, subprocess.CalledProcessError)):
      check_command(words, monkeypatch, may_use_system=False)


def test_one_page_has_the_commands_that_ci_runs():
  script = (ROOT / '.ci/run').read_text(encoding='utf-8')
  (page,) = re.findall(r'^page=(\S+)$', script, re.M)
  marked = [block for block in BLOCKS if block.note == RUN_BY_CI]
  assert [(name_of(x.page), x.language) for x in marked] == [(page, 'shell')]


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_links_are_to_files(page):
  text = re.sub(r'^```.*?^```$', '', page.read_text(encoding='utf-8'), flags=re.M | re.S)
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    if not target.startswith(('http', '#')):
      assert (page.parent / target.partition('#')[0]).exists(), target


def test_files_named_by_pages_exist():
  places = ('lmn_jax/', 'configs/', 'experiments/', 'deploy/', 'docs/')
  for page in PAGES:
    for name in re.findall(r'`([\w/]+/[\w.]*)`', page.read_text(encoding='utf-8')):
      if name.startswith(places):
        assert (ROOT / name).exists(), f'{name_of(page)}: {name}'


# Figures.


@pytest.fixture(scope='module')
def generate():
  """The module that writes the generated pages."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / 'docs')
    yield importlib.import_module('generate')


def figures(cells):
  """The numbers with a decimal point in a row of a table; a leading 0 is dropped."""
  return re.findall(r'(?<![\d.])0?(\.\d{3,5})(?!\d)', ' '.join(cells))


def test_figures_of_the_results_are_in_the_log(generate):
  log = set(figures([(ROOT / 'experiments/LOG.md').read_text(encoding='utf-8')]))
  results = (ROOT / 'docs/explanation/results.md').read_text(encoding='utf-8')
  for heading, _ in (*generate.QUOTED, ('MovieLens-100K, clicks', '')):
    head, rows = generate.table_under(results, heading)
    assert len(rows) > 4
    for row in rows:
      if head[-1].endswith('in the paper'):
        row = row[:-1]
      assert figures(row) and set(figures(row)) <= log, row


def test_figures_of_the_readme_are_those_of_the_results(generate):
  readme = (ROOT / 'README.md').read_text(encoding='utf-8')
  results = (ROOT / 'docs/explanation/results.md').read_text(encoding='utf-8')
  head, rows = generate.table_under(readme, 'Results')
  # Heading and column on the results page, for each column of the README.
  source = (('The stand-in', 1), ('MovieLens-1M, clicks', 1), ('MovieLens-1M, clicks', 4),
            ('MovieLens-1M, next items', 1))  # fmt: skip
  assert len(head) == len(source) + 1 and len(rows) > 10
  for name, *cells in rows:
    name = name.strip('*')
    for cell, (heading, column) in zip(cells, source, strict=True):
      _, known = generate.table_under(results, heading)
      same = [row for row in known if row[0] == name or row[0].split(',')[0] == name]
      if cell:
        assert same and same[0][column] == cell, (name, heading, cell)
