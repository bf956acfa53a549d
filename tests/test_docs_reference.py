"""The generated pages of the reference name every field, model, flag, path and module."""

import importlib
import re
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from lmn_jax import config as configs
from lmn_jax import main
from lmn_jax.commands import COMMANDS
from lmn_jax.data.readers.registry import READERS
from lmn_jax.evaluation import baselines, click_metrics, number_metrics, ranking
from lmn_jax.models import registry
from lmn_jax.serving import settings
from tests.test_architecture import TREES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def docs():
  """A function that imports a module of docs/, which is not a package."""
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
  """The rows of all tables of a page whose first cell begins with a text.

  Returns {first cell: the other cells}; of two rows with the same first cell, the upper one.
  """
  cells_of = {}
  for line in page.splitlines():
    cells = [cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]
    if cells and cells[0].startswith(f'`{first}'):
      cells_of.setdefault(cells[0].strip('`'), cells[1:])
  return cells_of


def leaves(config, path):
  """(path, value) of every field, computed independently of the generator."""
  for name, value in config.to_dict().items():
    if isinstance(value, dict) and value:
      yield from leaves(ml_collections.ConfigDict(value), f'{path}.{name}')
    else:
      yield f'{path}.{name}', value


def defaults():
  config = configs.base('pooling').copy_and_resolve_references()
  with config.unlocked():
    del config.model, config.data
  return dict([*leaves(config, 'config'), *leaves(configs.data(), 'config.data')])


def test_every_field_of_a_config_with_its_default(pages):
  fields = rows(pages['config'], 'config.')
  assert set(fields) == set(defaults())
  for name, value in defaults().items():
    shown = fields[name][0].strip('` ').replace(r'\|', '|')
    assert shown == ('{}' if value == {} else repr(value)), name


def test_every_field_of_a_config_has_a_meaning(pages):
  fields = rows(pages['config'], 'config.')
  assert [name for name, (_, meaning) in fields.items() if not meaning] == []


def test_fields_have_their_comments(pages):
  meanings = {name: cells[1] for name, cells in rows(pages['config'], 'config.').items()}
  assert meanings['config.steps'] == 'updates in the whole training'
  # Above the field, in several lines.
  assert meanings['config.skip_not_finite'].endswith('counted as `skipped`; one more ends the run.')
  # In a function of its own for a section, one that two sections share among them.
  assert meanings['config.data.split.protocol'].startswith(r'global_time \| user_ratio')
  assert meanings['config.optimizer.dense.rate'] == 'peak learning rate'
  for table in ('embedding', 'memory'):
    assert meanings[f'config.optimizer.{table}.rows'].startswith(r'float32 \| bfloat16')
  # On the line of a section.
  assert meanings['config.mesh.model'].startswith('devices along the axis of the tables')
  assert meanings['config.loss.memory_weight'] == 'weight of the loss `memory` of `lmn` (click)'


def section():
  return dict(
    j=7,  # beside j
    # Above k.
    k=8,
  )


def test_comments_belong_to_the_line_they_are_on_or_above(generate):
  def builder():
    config = ml_collections.ConfigDict()
    # Above a.
    config.a = 1
    config.b = 2  # beside b
    # Above the section.
    config.c = dict(d=3, e=4)
    config.f = dict(
      g=5,  # beside g
      # Above h,
      # in two lines.
      h=6,
    )
    config.i = section()
    return config

  texts = generate.comments(builder)
  assert {name: text for name, text in texts.items() if text} == {
    'a': 'Above a.', 'b': 'beside b', 'c.d': 'Above the section.', 'f.g': 'beside g',
    'f.h': 'Above h, in two lines.', 'i.j': 'beside j', 'i.k': 'Above k.',
  }  # fmt: skip
  assert generate.comments(section) == {'j': 'beside j', 'k': 'Above k.'}


@pytest.mark.parametrize('task', registry.MODELS)
def test_every_model_with_its_fields(pages, generate, task):
  for name, model in registry.MODELS[task].items():
    below = pages['models'].partition(f'### `{name}` ({task})\n')[2]
    part = re.split(r'^##', below, maxsplit=1, flags=re.M)[0]
    path = f'{model.__module__.replace(".", "/")}.py'
    assert f'File: `{path}`' in part and (ROOT / path).is_file()
    names = {f'config.model.{x}' for x in registry.defaults(name, task)} - {'config.model.name'}
    fields = rows(part, 'config.model.')
    assert set(fields) == names
    assert re.search(r'20[0-2]\d|Kang & McAuley', part), f'{name}: no paper'
    assert '```text\n' in part or 'encode = ' in part, f'{name}: no equation'
    described = {field for field, cells in fields.items() if cells[1]}
    assert described == names, f'{name}: {names - described} are in no docstring'


def test_models_have_their_results(pages):
  lmn = pages['models'].partition('### `lmn` (click)')[2].partition('\n### ')[0]
  assert 'The stand-in: AUC .7350 ± .0003' in lmn and 'configs/lmn_douyin.py' in lmn
  dman = pages['models'].partition('### `dman` (next_item)')[2].partition('\n### ')[0]
  assert 'MovieLens-1M, next items: HR@10 .3084 ± .0039' in dman


def test_every_flag_and_setting(pages):
  names = {flag.name for flag in main.FLAGS.flags_by_module_dict()['lmn_jax.main']}
  assert {'config', 'workdir', 'mode', 'top_k'} <= names
  flags = rows(pages['cli'], '--')
  service = {f'--serve.{name}' for name in settings.settings()}
  assert set(flags) == {f'--{name}' for name in names} | service
  for mode in COMMANDS:
    assert f'`--mode={mode}`' in pages['cli']
  assert flags['--topology'][1] == '`plan`'
  assert flags['--serve.port'][0] == '`8000`'
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
    if name in ('HTTPValidationError', 'ValidationError'):  # of FastAPI; never answered
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
  label, score = np.array([0, 1]), np.array([0.0, 1.0])
  clicks = click_metrics.report(label, score, label, label, (10,))['overall']
  numbers = number_metrics.report(label, score, label, label, (10,))['overall']
  lanes = ranking.measure(np.array([1, 2]), (10,))
  keys = [
    *clicks,
    *(name.replace('@10', '@K') for name in lanes),
    *numbers,
    *baselines.BASELINES['click'],
    *baselines.BASELINES['number'],
    'markov',
  ]
  for key in keys:
    assert f'`{key}`' in page, key


def test_docstrings_are_converted_for_sphinx(docs):
  lines = [
    'Score of `x` and of `Item`s, q * k, `from a',
    'import b`.',
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
    'Score of ``x`` and of ``Item``\\ s, q \\* k, ``from a',
    'import b``.',
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
