"""Makes the pages of the reference that follow from code, as Markdown.

`write(folder)` makes them all; conf.py calls it before every build, and the hand-written pages
include the result. Nothing here knows a field, a model, a flag or a path by name: a new one is
documented when it exists.
"""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import re
import shutil
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import ml_collections

from lmn_jax import config as configs
from lmn_jax import config_files, main
from lmn_jax.commands import COMMANDS
from lmn_jax.data.readers.registry import READERS
from lmn_jax.errors import UserError
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.models import registry
from lmn_jax.serving import api
from lmn_jax.serving import settings as serving
from lmn_jax.serving.service import Service

ROOT = Path(__file__).resolve().parents[1]
# What the results page calls the tables that the model zoo quotes: heading, metric, task.
QUOTED = (
  ('The stand-in', 'click'),
  ('MovieLens-1M, clicks', 'click'),
  ('MovieLens-1M, next items', 'next_item'),
)


def write(folder: Path) -> None:
  """Writes every generated page into a folder.

  Args:
    folder: made anew, so that no page of an earlier build is left.
  """
  shutil.rmtree(folder, ignore_errors=True)
  (folder / 'python').mkdir(parents=True)
  pages = {name: page() for name, page in PAGES.items()} | python_pages()
  for name, text in pages.items():
    (folder / f'{name}.md').write_text(text, encoding='utf-8')


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  """A Markdown table. The cells are Markdown; a bar in a cell is escaped."""
  lines = [head, tuple('---' for _ in head), *rows]
  return '\n'.join(
    '| ' + ' | '.join(' '.join(cell.split()).replace('|', r'\|') for cell in line) + ' |'
    for line in lines
  )


# Config fields.


def leaves(config: ml_collections.ConfigDict, path: str = '') -> Iterator[tuple[str, Any]]:
  """(path, default) of every field; an empty section is a field."""
  for name in config:
    value = config[name]
    below = f'{path}.{name}' if path else name
    if isinstance(value, ml_collections.ConfigDict) and len(value):
      yield from leaves(value, below)
    else:
      yield below, value


def comments(function: Any) -> dict[str, str]:
  """What the comments of a function that fills a ConfigDict say of its fields, by path.

  A comment belongs to the field on its line, or to the field on the line below it. Fields on the
  line of their section share its comment, which is given to the first of them.
  """
  source = textwrap.dedent(inspect.getsource(function))
  above, beside = _comments_by_line(source)
  found: dict[str, str] = {}

  def note(path, line, inherited=''):
    text = ' '.join(x for x in (above.get(line, ''), beside.get(line, '')) if x) or inherited
    found[path] = text
    return text

  def follow(path, line, value, inherited=''):
    text = note(path, line) if line else inherited
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) == 'dict' and value.keywords):
      found[path] = text
      return
    for k, keyword in enumerate(value.keywords):
      own = keyword.lineno != line and keyword.lineno
      first = text if k == 0 and path else ''
      follow(f'{path}.{keyword.arg}'.lstrip('.'), own, keyword.value, first)

  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
      follow(node.targets[0].attr, node.lineno, node.value)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith('ConfigDict') and node.args:
      follow('', 0, node.args[0])
  return found


def _comments_by_line(source):
  """Comments above a line of code, and those beside it, by the number of the line."""
  above: dict[int, str] = {}
  beside: dict[int, str] = {}
  pending: list[str] = []
  code_ends = 0
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    line = token.start[0]
    if token.type == tokenize.COMMENT:
      text = token.string.lstrip('# ')
      if token.string.startswith('# fmt:'):
        continue
      if line == code_ends:
        beside[line] = text
      else:
        pending.append(text)
    elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
      if pending:
        above[line] = ' '.join(pending)
        pending = []
      code_ends = token.end[0]
  return above, beside


def code(value: Any) -> str:
  """A default value as it is written in a config."""
  if isinstance(value, ml_collections.ConfigDict):
    return '`{}`'
  text = repr(value)
  return f'`` {text} ``' if '`' in text else f'`{text}`'


def _fields(prefix, config, said, skip=()):
  # ConfigDict sorts by name; the order of the source keeps together what a comment speaks of.
  order = {path: k for k, path in enumerate(said)}
  fields = sorted(leaves(config), key=lambda field: order.get(field[0], len(order)))
  rows = [
    (f'`{prefix}.{path}`', code(value), said.get(path, ''))
    for path, value in fields
    if path.split('.')[0] not in skip
  ]
  return table(('field', 'default', 'meaning'), rows)


def config_page() -> str:
  """Every field of the two builders of configs."""
  whole = configs.base('pooling')
  return '\n'.join(
    (
      '## The experiment: `base(model, task)`\n',
      _fields('config', whole, comments(configs.base), skip=('data', 'model')),
      '\n## The log: `data(...)`\n',
      _fields('config.data', configs.data(), comments(configs.data)),
      '\n## Least values\n',
      table(
        ('field', 'at least'),
        [(f'`config.{name}`', f'`{least}`') for name, least in configs.LEAST.items()],
      ),
      '',
    )
  )


# Models.


def attributes(model: type) -> dict[str, str]:
  """What the docstrings of a model and its base classes say of its fields."""
  names = [field.name for field in dataclasses.fields(model)]
  name = '|'.join(sorted(map(re.escape, names), key=len, reverse=True))
  begins = re.compile(rf'(?:^|(?<=[.;)\]] ))((?:{name})(?:, (?:{name}))*): ')
  found: dict[str, str] = {}
  for kind in reversed(model.__mro__):
    section = (kind.__dict__.get('__doc__') or '').partition('Attributes:\n')[2]
    parts = begins.split(' '.join(section.split()))
    for fields, text in zip(parts[1::2], parts[2::2], strict=True):
      found |= dict.fromkeys(fields.split(', '), text.strip())
  return found


def _described(model):
  """Docstrings of the module, the class and its parts in the same file, as Markdown."""
  module = inspect.getmodule(model)
  parts = [
    kind
    for kind in vars(module).values()
    if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__
  ]
  blocks = [' '.join(inspect.getdoc(module).split())]
  for kind in (model, *(kind for kind in parts if kind is not model)):
    own = _markdown(kind)
    if kind is model:
      blocks += own
    elif any(block.startswith('```') for block in own):  # it has an equation
      blocks += [f'`{kind.__name__}`:', *own]
  return '\n\n'.join(blocks)


def _markdown(kind):
  """The docstring of a class without its attributes: paragraphs, and indented blocks as code."""
  text = inspect.cleandoc(kind.__dict__.get('__doc__') or '').partition('Attributes:')[0]
  blocks = []
  for block in filter(str.strip, re.split(r'\n[ ]*\n', text)):
    lines = block.strip('\n').splitlines()
    if all(line.startswith('  ') for line in lines):
      blocks.append('```text\n' + textwrap.dedent('\n'.join(lines)) + '\n```')
    else:
      blocks.append(' '.join(block.split()))
  return blocks


def trained_by() -> dict[tuple[str, str], list[str]]:
  """(task, model) -> what follows --config= to train it: `FILE`, or `FILE:MODEL`."""
  found: dict[tuple[str, str], list[str]] = {}
  for name in config_files.names():
    path = ROOT / f'configs/{name}.py'
    spec = importlib.util.spec_from_file_location(f'configs_{name}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = module.get_config()
    found.setdefault((own.task, own.model.name), []).append(f'configs/{name}.py')
    if not inspect.signature(module.get_config).parameters:
      continue
    for model in registry.MODELS[own.task].keys() - {own.model.name}:
      # A file of rivals refuses the model that has a file of its own.
      with contextlib.suppress(UserError):
        module.get_config(model)
        found.setdefault((own.task, model), []).append(f'configs/{name}.py:{model}')
  return found


def quoted() -> dict[tuple[str, str], list[tuple[str, dict[str, str]]]]:
  """(task, model) -> (heading, {column: figure}) of the tables of the results page."""
  text = (ROOT / 'docs/explanation/results.md').read_text(encoding='utf-8')
  found: dict[tuple[str, str], list[tuple[str, dict[str, str]]]] = {}
  for heading, task in QUOTED:
    head, rows = table_under(text, heading)
    for row in rows:
      name = re.split(r'[ ,]', row[0].lower())[0]
      known = [x[0] for x in found.get((task, name), [])]
      if name in registry.MODELS[task] and heading not in known:
        found.setdefault((task, name), []).append((heading, dict(zip(head, row, strict=True))))
  return found


def table_under(text: str, heading: str) -> tuple[list[str], list[list[str]]]:
  """Head and rows of the first table below a heading of a Markdown text.

  Raises:
    ValueError: there is no such heading, or no table below it.
  """
  below = re.split(rf'^#+ .*{re.escape(heading)}.*$', text, maxsplit=1, flags=re.M)
  lines = below[1].splitlines() if len(below) == 2 else []
  rows = []
  for line in lines:
    if line.startswith('|'):
      rows.append([cell.strip() for cell in line.strip().strip('|').split('|')])
    elif rows:
      break
  if len(rows) < 3:
    raise ValueError(f'no table below the heading {heading!r}')
  return rows[0], rows[2:]


def models_page() -> str:
  """Every model of the registry: paper, equations, file, configs, fields, results."""
  files, results, pieces = trained_by(), quoted(), []
  for task, models in registry.MODELS.items():
    pieces.append(f'## Models of `config.task={task!r}`\n')
    shared = {field.name for field in dataclasses.fields(next(iter(models.values())).__base__)}
    for name, model in models.items():
      said = attributes(model)
      path = Path(inspect.getfile(model)).relative_to(ROOT)
      trained = ', '.join(f'`{x}`' for x in files.get((task, name), ())) or 'no file of its own'
      pieces += [f'### `{name}` ({task})\n', _described(model), '']
      pieces.append(f'File: `{path}`. Config: {trained}.\n')
      for heading, row in results.get((task, name), ()):
        figures = ', '.join(f'{k} {v}' for k, v in row.items() if k and v)
        pieces.append(f'{heading}: {figures}.\n')
      own = {k: v for k, v in registry.defaults(name, task).items() if k != 'name'}
      rows = [
        (f'`config.model.{field}`', code(value), said.get(field, ''))
        for field, value in own.items()
      ]
      rows.sort(key=lambda row: row[0].rpartition('.')[2].strip('`') in shared)
      pieces += [table(('field', 'default', 'meaning'), rows), '']
  return '\n'.join(pieces)


# Command line and HTTP.


def cli_page() -> str:
  """The flags of lmn_jax.main, of the service, and the usage text of launch.sh."""
  own = main.FLAGS.flags_by_module_dict()['lmn_jax.main']
  rows = []
  for flag in own:
    default = '' if flag.value is None and flag.default is None else f'`{flag.default!r}`'
    modes = (
      ', '.join(f'`{name}`' for name, command in COMMANDS.items() if flag.name in command.flags)
      or 'all'
    )
    rows.append((f'`--{flag.name}`', default, modes, flag.help or ''))
  launch = (ROOT / 'launch.sh').read_text(encoding='utf-8')
  usage = re.search(r"<<'TEXT'\n(.*?)\nTEXT\n", launch, re.S)[1]
  return '\n'.join(
    (
      '## Modes\n',
      ', '.join(f'`--mode={mode}`' for mode in COMMANDS) + '\n',
      '## Flags of `lmn-jax`\n',
      table(('flag', 'default', 'modes', 'meaning'), rows),
      '\n## Settings of the service\n',
      _fields('--serve', serving.settings(), comments(serving.settings)),
      '\n## `launch.sh`\n',
      f'```text\n{usage}\n```\n',
    )
  )


def openapi() -> dict:
  """The OpenAPI document of the service with its default settings."""
  # It opens no export before it runs, and it is not run.
  return api.make_app(Service(serving.settings(), Path(), Bundle, None)).openapi()


def _kind(schema):
  """The type of a JSON schema in a few words."""
  if '$ref' in schema:
    return f'[{schema["$ref"].rpartition("/")[2]}](#{schema["$ref"].rpartition("/")[2].lower()})'
  if 'anyOf' in schema:
    return ' or '.join(dict.fromkeys(_kind(x) for x in schema['anyOf']))
  if schema.get('type') == 'array':
    bounds = [schema.get('minItems', 0), schema.get('maxItems')]
    count = f', {bounds[0]} to {bounds[1]}' if bounds[1] is not None else ''
    return f'list of ({_kind(schema.get("items", {}))}){count}'
  if schema.get('type') == 'object' and isinstance(schema.get('additionalProperties'), dict):
    return f'object of ({_kind(schema["additionalProperties"])})'
  return schema.get('type', 'any')


def http_page() -> str:
  """Paths, statuses and schemas of the OpenAPI document."""
  document, pieces = openapi(), ['## Paths\n']
  for path, methods in document['paths'].items():
    for method, operation in methods.items():
      pieces.append(f'### `{method.upper()} {path}`\n')
      pieces.append(' '.join(operation.get('description', operation['summary']).split()) + '\n')
      body = operation.get('requestBody', {}).get('content', {}).get('application/json')
      if body:
        pieces.append(f'Request: {_kind(body["schema"])}.\n')
      rows = []
      for status, answer in operation['responses'].items():
        schema = answer.get('content', {}).get('application/json', {}).get('schema', {})
        kind = _kind(schema) if schema else ', '.join(answer.get('content', {}))
        rows.append((status, kind, answer.get('description', '')))
      pieces += [table(('status', 'answer', 'when'), rows), '']
  pieces.append('## Schemas\n')
  for name, schema in document['components']['schemas'].items():
    # Of FastAPI's own, which this service answers with a Problem.
    if name in ('HTTPValidationError', 'ValidationError'):
      continue
    pieces.append(f'### {name}\n')
    pieces.append(' '.join(schema.get('description', '').split()) + '\n')
    required = schema.get('required', ())
    rows = [
      (f'`{field}`', _kind(kind), 'yes' if field in required else 'no', kind.get('description', ''))
      for field, kind in schema.get('properties', {}).items()
    ]
    pieces += [table(('field', 'type', 'required', 'meaning'), rows), '']
  return '\n'.join(pieces)


def formats_page() -> str:
  """Formats of logs: name, endings, delimiter, summary."""
  rows = []
  for name, reader in READERS.items():
    endings = ', '.join(f'`{end}`' for end in reader.endings)
    delimiter = f'`{reader.delimiter!r}`' if reader.delimiter else ''
    summary = inspect.getdoc(type(reader)).split('\n\n')[0]
    rows.append((f'`{name}`', endings, delimiter, summary))
  return table(('`config.data.format`', 'endings', 'delimiter', 'what it is'), rows) + '\n'


# Python.


def modules() -> dict[str, list[str]]:
  """Folder of the package -> its modules, by dotted name; `lmn_jax` has those at the top."""
  found: dict[str, list[str]] = {}
  for path in sorted((ROOT / 'lmn_jax').rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    if parts[-1] in ('__init__', '__main__'):
      continue
    found.setdefault(parts[1] if len(parts) > 2 else 'lmn_jax', []).append('.'.join(parts))
  return found


def python_pages() -> dict[str, str]:
  """A page for each folder, with one autodoc directive a module."""
  pages = {}
  for folder, names in modules().items():
    package = 'lmn_jax' if folder == 'lmn_jax' else f'lmn_jax.{folder}'
    first, _, rest = inspect.getdoc(importlib.import_module(package)).partition('\n')
    pieces = [f'# {package}\n', f'{first}\n', ' '.join(rest.split()) + '\n']
    for name in names:
      pieces.append(f'## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n')
    pages[f'python/{folder}'] = '\n'.join(pieces)
  return pages


PAGES = {
  'config': config_page,
  'models': models_page,
  'cli': cli_page,
  'http': http_page,
  'formats': formats_page,
}
