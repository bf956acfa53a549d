"""Guards of the whole: imports go one way, banned things stay out."""

import ast
import graphlib
from pathlib import Path

import pytest

import lmn_jax

PACKAGE = Path(lmn_jax.__file__).parent

# The path of a datum. A file imports from the lines above its own; files on one line may import
# each other, without cycles. `models.*` stands for every file of the folder.
ORDER = (
  ('errors', 'texts', 'times'),
  ('hosts',),
  ('interrupts', 'lock', 'notice', 'seal'),
  ('usage',),
  ('user_records',),
  ('user_history',),
  ('redis_users',),
  ('user_store', 'batcher'),
  ('synthetic',),
  ('textfiles', 'cells', 'quotes'),
  ('readers',),
  ('sequences', 'longctr', 'tfds_logs'),
  ('roles', 'ranks', 'candidates', 'opening', 'sources'),
  ('logs',),
  ('splits',),
  ('parts', 'coding'),
  ('store',),
  ('build', 'stores', 'counts'),
  ('prepare',),
  ('batches',),
  (
    'packing',
    'lanes',
  ),
  ('user_events', 'raw_rows'),
  ('layers',),
  ('mesh',),
  ('loss',),
  ('memory',),
  ('attention', 'recurrent', 'transformer', 'retrieval', 'capsules', 'sums'),
  ('models', 'models.*'),
  # After the models, whose fields are its section `model`; all above are handed a section.
  ('config',),
  ('slices', 'hlo'),
  ('table',),
  ('optim',),
  ('pooled',),
  ('reads',),
  ('update',),
  ('metrics',),
  ('baselines',),
  ('bundle',),
  ('ranking', 'user_states'),
  ('top_items',),
  ('evaluate',),
  ('tasks',),
  ('writer',),
  ('checkpoint', 'part_files'),
  ('report', 'sanity', 'scored_rows'),
  ('train',),
  ('bound',),
  ('plan', 'state_table', 'prune'),
  ('export', 'scorers'),
  ('predict',),
  ('serve_config', 'meters', 'api_models'),
  ('gate', 'live_export'),
  ('service', 'shards'),
  ('api', 'shard'),
  ('serve',),
  ('main',),
)

TREES = {
  '.'.join(path.relative_to(PACKAGE).with_suffix('').parts).removesuffix('.__init__'): ast.parse(
    path.read_text(encoding='utf-8'), filename=str(path)
  )
  for path in sorted(PACKAGE.rglob('*.py'))
  if path != PACKAGE / '__init__.py'
}


def rank(module):
  name = 'models.*' if module.startswith('models.') else module
  for line, names in enumerate(ORDER):
    if name in names:
      return line
  pytest.fail(
    f'lmn_jax/{module.replace(".", "/")}.py has no place in ORDER: add it there, below all that it '
    'imports and above all that import it, or merge it with a file that is there'
  )


def imports(tree):
  """Modules of the package that the file imports, those within functions included."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'line {node.lineno}: relative import; write from lmn_jax... import'
      # `from lmn_jax import store` names a module, `from lmn_jax.store import Store` what is in it.
      names = [f'{node.module}.{alias.name}' for alias in node.names] + [node.module]
    else:
      continue
    for name in names:
      if name.removeprefix('lmn_jax.') in TREES and name.startswith('lmn_jax.'):
        yield name.removeprefix('lmn_jax.')


@pytest.mark.parametrize('module', TREES)
def test_imports_go_one_way(module):
  own = rank(module)
  for imported in set(imports(TREES[module])) - {module}:
    assert rank(imported) <= own, (
      f'{module} imports {imported}, which comes after it; move what they share up, or pass it in'
    )


def test_imports_have_no_cycle():
  graph = {module: set(imports(tree)) - {module} for module, tree in TREES.items()}
  order = list(graphlib.TopologicalSorter(graph).static_order())  # a cycle raises
  assert set(order) == set(TREES)


@pytest.mark.parametrize('module', TREES)
def test_no_file_of_leftovers(module):
  assert module.split('.')[-1] not in ('utils', 'util', 'common', 'helpers', 'misc')


@pytest.mark.parametrize('module', TREES)
def test_banned(module):
  """pmap is in maintenance, nn.Embed hides a table in the model, pickles run what they hold."""
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
