"""The generated pages of the reference name every field, model, flag, path and module."""

import importlib
import re
from pathlib import Path

import ml_collections
import pytest

from lmn_jax import config as configs
from lmn_jax import main
from lmn_jax.commands import COMMANDS
from lmn_jax.data.readers.registry import READERS
from lmn_jax.evaluation import baselines, click_metrics, ranking
from lmn_jax.models import registry
from lmn_jax.serving import settings
from tests.test_architecture import TREES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def docs():
  """A function that gives a module of docs/, whose folder is no package."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / 'docs')
    yield importlib.import_module


@pytest.fixture(scope='module')
def generate(docs):
  return docs('generate')


@pytest.fixture(scope='module')
def pages(generate):
  return {name: page() for name, page in generate.PAGES.items()}


def rows(page, first):
  """Cells behind the first, by the first, of the rows of tables that begin with a text.

  Of rows that begin with the same the one that comes first.
  """
  found = {}
  for line in page.splitlines():
    cells = [cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]
    if cells and cells[0].startswith(f'`{first}'):
      found.setdefault(cells[0].strip('`'), cells[1:])
  return found


def leaves(config, path):
  """(path, value), found in another way than the generator does."""
  for name, value in config.to_dict().items():
    if isinstance(value, dict) and value:
      yield from leaves(ml_collections.ConfigDict(value), f'{path}.{name}')
    else:
      yield f'{path}.{name}', value


def defaults():
  whole = configs.base('pooling').copy_and_resolve_references()
  with whole.unlocked():
    del whole.model, whole.data
  return dict([*leaves(whole, 'config'), *leaves(configs.data(), 'config.data')])


def test_every_field_of_a_config_with_its_default(pages):
  found = rows(pages['config'], 'config.')
  assert set(found) == set(defaults())
  for name, value in defaults().items():
    shown = found[name][0].strip('` ').replace(r'\|', '|')
    assert shown == ('{}' if value == {} else repr(value)), name


def test_fields_have_their_comments(pages):
  found = rows(pages['config'], 'config.')
  assert found['config.steps'][1] == 'updates in the whole training'
  # Above the field, over several lines, or above and beside it.
  assert 'counted as `skipped`; one more ends the run' in found['config.skip_not_finite'][1]
  delimiter = found['config.data.delimiter'][1]
  assert 'text files' in delimiter and "'' takes the format's own" in delimiter
  # Of a section on one line: with the first of its fields.
  assert 'protocol' not in found['config.data.split.protocol'][1].partition(':')[0]
  assert 'leave_one_out' in found['config.data.split.protocol'][1]
  assert found['config.mesh.model'][1].startswith("devices along the tables' own axis")
  assert found['config.loss.memory_weight'][1] == "LMN's lambda"


def test_comments_belong_to_the_line_they_are_on_or_above(generate):
  def builder():
    config = ml_collections.ConfigDict()
    # Above a.
    config.a = 1
    config.b = 2  # beside b
    # Of the section.
    config.c = dict(d=3, e=4)
    config.f = dict(
      g=5,  # beside g
      # Above h,
      # in two lines.
      h=6,
    )
    return config

  said = generate.comments(builder)
  assert {name: text for name, text in said.items() if text} == {
    'a': 'Above a.', 'b': 'beside b', 'c': 'Of the section.', 'c.d': 'Of the section.',
    'f.g': 'beside g', 'f.h': 'Above h, in two lines.',
  }  # fmt: skip


@pytest.mark.parametrize('task', registry.MODELS)
def test_every_model_with_its_fields(pages, generate, task):
  for name, model in registry.MODELS[task].items():
    below = pages['models'].partition(f'### `{name}` ({task})\n')[2]
    part = re.split(r'^##', below, maxsplit=1, flags=re.M)[0]
    path = f'{model.__module__.replace(".", "/")}.py'
    assert f'File: `{path}`' in part and (ROOT / path).is_file()
    own = {f'config.model.{x}' for x in registry.defaults(name, task)} - {'config.model.name'}
    found = rows(part, 'config.model.')
    assert set(found) == own
    assert re.search(r'20[0-2]\d|Kang & McAuley', part), f'{name}: no paper'
    assert '```text\n' in part or 'encode = ' in part, f'{name}: no equation'
    # In words of the docstring, of the model or of its base.
    said = {field for field, cells in found.items() if cells[1]}
    assert said == own, f'{name}: {own - said} are in no docstring'


def test_models_have_their_results(pages):
  lmn = pages['models'].partition('### `lmn` (click)')[2].partition('\n### ')[0]
  assert 'The stand-in: AUC .7350 ± .0003' in lmn and 'configs/lmn_douyin.py' in lmn
  dman = pages['models'].partition('### `dman` (next_item)')[2].partition('\n### ')[0]
  assert 'MovieLens-1M, next items: HR@10 .3084 ± .0039' in dman


def test_every_flag_and_setting(pages):
  own = {flag.name for flag in main.FLAGS.flags_by_module_dict()['lmn_jax.main']}
  assert {'config', 'workdir', 'mode', 'top_k'} <= own
  found = rows(pages['cli'], '--')
  service = {f'--serve.{name}' for name in settings.settings()}
  assert set(found) == {f'--{name}' for name in own} | service
  for mode in COMMANDS:
    assert f'`--mode={mode}`' in pages['cli']
  assert found['--topology'][1] == '`plan`'
  assert found['--serve.port'][0] == '`8000`'
  assert '--dry-run' in pages['cli'] and 'LMN_EXTRA' in pages['cli']


def test_every_path_and_schema_of_the_service(pages, generate):
  document = generate.openapi()
  assert {'/v1/score', '/v1/recommend', '/v1/update', '/readyz'} <= set(document['paths'])
  for path, methods in document['paths'].items():
    for method, operation in methods.items():
      part = pages['http'].partition(f'### `{method.upper()} {path}`')[2].partition('\n##')[0]
      for status in operation['responses']:
        assert f'| {status} |' in part
  for name, schema in document['components']['schemas'].items():
    if name in ('HTTPValidationError', 'ValidationError'):  # FastAPI's; a Problem is answered
      continue
    part = pages['http'].partition(f'\n### {name}\n')[2].partition('\n##')[0]
    assert set(rows(part, '')) == set(schema.get('properties', {})), name
  update = pages['http'].partition('\n### UpdateRequest\n')[2].partition('\n##')[0]
  assert 'list of ([Event](#event)), 1 to 1000' in update


def test_every_format_and_module(pages, generate):
  assert set(rows(pages['formats'], '')) == {*READERS, 'config.data.format'}
  python = '\n'.join(generate.python_pages().values())
  documented = set(re.findall(r'automodule:: lmn_jax\.(\S+)', python))
  packages = {name for name in TREES if any(x.startswith(f'{name}.') for x in TREES)}
  assert documented == set(TREES) - packages - {'__main__'}


def test_every_metric_and_baseline():
  page = (ROOT / 'docs/reference/metrics.md').read_text(encoding='utf-8')
  import numpy as np

  label, score = np.array([0, 1]), np.array([0.0, 1.0])
  clicks = click_metrics.report(label, score, label, label, (10,))['overall']
  lanes = ranking.measure(np.array([1, 2]), (10,))
  keys = [*clicks, *(name.replace('@10', '@K') for name in lanes), *baselines.BASELINES, 'markov']
  for key in keys:
    assert f'`{key}`' in page, key


def test_docstrings_become_what_sphinx_reads(docs):
  lines = [
    'Score of `x` and of `Item`s, q * k.',
    '',
    '    s = q_ |k|',
    '',
    'Args:',
    '  x: [B, *K] of e_. y: of x: all. *K: more.',
    'What differs:',
    '  a list',
  ]

  def function(x, y, *K):
    pass

  docs('conf').markdown_docstring(None, 'function', 'f', function, None, lines)
  assert lines == [
    'Score of ``x`` and of ``Item``\\ s, q \\* k.',
    '',
    '',
    '::',
    '',
    '    s = q_ |k|',
    '',
    'Args:',
    '  x: [B, \\*K] of e\\_.',
    '  y: of x: all.',
    '  *K: more.',
    'What differs:',
    '',
    '::',
    '',
    '  a list',
  ]
