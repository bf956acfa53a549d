"""The architecture: the order of imports, and banned names."""

import ast
import graphlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmn_jax
from lmn_jax.export import copies

PACKAGE = Path(lmn_jax.__file__).parent

# The lowest modules, in this order; they import only each other.
BASE = ('errors', 'cli_errors', 'config_files', 'files', 'plugins')
# The highest modules, in this order.
TOP = ('arguments', 'experiment', 'commands', 'main', '__main__')
# A folder imports from the folders before it. `config` is a file: its section `model` has the
# fields of the models, so it follows them; functions of earlier folders receive a section.
ORDER = (
  'distributed',
  'data',
  'tables',
  'layers',
  'models',
  'config',
  'evaluation',
  'training',
  'inference',
  'export',
  'serving',
  'planning',
)
# Pairs of folders that do not import each other.
BESIDE = (('serving', 'planning'), ('models.ctr', 'models.next_item'))
# Folders whose files import only each other and these files of their parent folder.
APART = {'data.readers': ('data.synthetic', 'data.splits'), 'serving.users': ()}

TREES = {
  '.'.join(path.relative_to(PACKAGE).with_suffix('').parts).removesuffix('.__init__'): ast.parse(
    path.read_text(encoding='utf-8'), filename=str(path)
  )
  for path in sorted(PACKAGE.rglob('*.py'))
  if path != PACKAGE / '__init__.py'
}
FOLDERS = [
  '.'.join(path.relative_to(PACKAGE).parts)
  for path in sorted(PACKAGE.rglob('*'))
  if path.is_dir() and any(path.glob('*.py'))
]


def place(module):
  """Returns the position of a module in the order of imports."""
  top = module.split('.')[0]
  if top in TOP:
    return len(BASE) + len(ORDER) + TOP.index(top)
  if top in BASE:
    return BASE.index(top)
  if top in ORDER:
    return len(BASE) + ORDER.index(top)
  pytest.fail(f'lmn_jax/{top} is not in ORDER; move its files to one of {", ".join(ORDER)}')


def imports(tree):
  """Yields the modules of the package that a file imports, also within functions."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'line {node.lineno}: relative import; write from lmn_jax... import'
      # `from lmn_jax.data import store` names a module, `from lmn_jax.data.store import Store` an
      # object of it.
      names = [f'{node.module}.{alias.name}' for alias in node.names] + [node.module]
    else:
      continue
    for name in names:
      module = name.removeprefix('lmn_jax.')
      # The folders in the path of a module do not count.
      if module in TREES and module not in FOLDERS and name.startswith('lmn_jax.'):
        yield module


def within(module, folder):
  return module == folder or module.startswith(f'{folder}.')


@pytest.mark.parametrize('module', TREES)
def test_imports_go_one_way(module):
  for imported in set(imports(TREES[module])) - {module}:
    assert place(imported) <= place(module), (
      f'{module} imports {imported}, which comes after it; move what they share up, or pass it in'
    )
    for pair in BESIDE:
      for first, second in (pair, pair[::-1]):
        assert not (within(module, first) and within(imported, second)), (
          f'{module} imports {imported}, and {first} and {second} do not import each other'
        )
    for folder, allowed in APART.items():
      if within(module, folder) and within(imported, folder.split('.')[0]):
        assert within(imported, folder) or imported in allowed, (
          f'{module} imports {imported}, outside of {folder}'
        )


def test_imports_have_no_cycle():
  graph = {module: set(imports(tree)) - {module} for module, tree in TREES.items()}
  order = list(graphlib.TopologicalSorter(graph).static_order())  # a cycle raises
  assert set(order) == set(TREES)


def test_every_folder_is_in_the_order():
  assert {folder.split('.')[0] for folder in FOLDERS} == set(ORDER) - {'config'}


@pytest.mark.parametrize('folder', FOLDERS)
def test_init_files_document_their_folder(folder):
  """A docstring of a few lines with inputs, outputs and the first file to read, and no code."""
  tree = TREES.get(folder)
  assert tree is not None, f'lmn_jax/{folder.replace(".", "/")} has no __init__.py'
  text = ast.get_docstring(tree)
  assert text and len(tree.body) == 1, 'a docstring and nothing else'
  assert 3 <= len(text.splitlines()) <= 6
  for word in ('In: ', 'Out: ', 'Read first: '):
    assert word in text


def test_files_of_an_export_import_only_each_other():
  """Files that are copied into an export import only copied files of the package."""
  copied = {module.__name__.removeprefix('lmn_jax.') for module in copies.COPIED}
  assert {name for name in TREES if within(name, 'export.runtime')} - set(FOLDERS) <= copied
  for module in copied:
    assert set(imports(TREES[module])) <= copied, module
  names = [name.rsplit('.', 1)[-1] for name in copied]
  assert len(names) == len(set(names))  # they are copied into one folder
  for module in copies.COPIED:
    tree = ast.parse(copies.relocated(Path(module.__file__).read_text(encoding='utf-8')))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
                if 'lmn_jax' in ast.unparse(node)], module  # fmt: skip


@pytest.mark.parametrize('module', TREES)
def test_no_file_without_a_topic(module):
  assert module.split('.')[-1] not in ('utils', 'util', 'common', 'helpers', 'misc')


@pytest.mark.parametrize('module', TREES)
def test_banned(module):
  """pmap is in maintenance, nn.Embed hides a table in the model, unpickling runs code."""
  for node in ast.walk(TREES[module]):
    where = f'{module} line {getattr(node, "lineno", 0)}'
    name = getattr(node, 'attr', getattr(node, 'id', None))
    assert name not in ('pmap', 'Embed', 'replicate', 'unreplicate'), f'{where}: {name}'
    if isinstance(node, ast.keyword) and node.arg == 'allow_pickle':
      assert isinstance(node.value, ast.Constant) and not node.value.value, f'{where}: allow_pickle'
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = [getattr(node, 'module', None) or ''] + [alias.name for alias in node.names]
      for banned in ('pickle', 'cloudpickle', 'dill', 'shelve', 'joblib', 'pmap', 'Embed'):
        assert banned not in names, f'{where}: imports {banned}'


def test_every_name_is_defined():
  """The rule F821 is off in the package, because it takes the axes of shapes for names."""
  command = [sys.executable, '-m', 'ruff', 'check', '--isolated', '--select=F821', '--no-cache']
  done = subprocess.run(
    [*command, '--output-format=json', str(PACKAGE)], capture_output=True, text=True, timeout=60
  )
  names = {
    (x['filename'], x['location']['row'], re.search('`(.*)`', x['message'])[1])
    for x in json.loads(done.stdout)
  }
  assert len(names) > 20, done.stderr  # the axes
  undefined = [x for x in names if not re.fullmatch('[A-Z_]+[0-9]?', x[2])]
  assert not undefined, undefined
