"""Generates the pages of the reference from the code, as Markdown.

`write(folder)` writes all pages; conf.py calls it before every build, and the hand-written pages
include the result. No field, model, flag or path is named here: new ones are documented too.
"""

import ast
import contextlib
import dataclasses
import importlib
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
# Tables of the results page that the page of models quotes: heading, task.
QUOTED = (
  ('The stand-in', 'click'),
  ('MovieLens-1M, clicks', 'click'),
  ('MovieLens-1M, next items', 'next_item'),
)


def write(folder: Path) -> None:
  """Writes every generated page into a folder.

  Args:
    folder: replaced, so that no page of an earlier build remains.
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
  """The comments of the fields that a function sets or returns, by path.

  A comment belongs to the field on its line, or to the field on the line below it. A section on one
  line has one comment, which is that of its first field. The fields of a section that another
  function of the module returns have the comments of that function.
  """
  source = textwrap.dedent(inspect.getsource(function))
  above, beside = _comments_by_line(source)
  names = inspect.unwrap(function).__globals__
  texts: dict[str, str] = {}

  def collect(path, line, value, inherited=''):
    text = ' '.join(x for x in (above.get(line, ''), beside.get(line, '')) if x) or inherited
    name = ast.unparse(value.func) if isinstance(value, ast.Call) else ''
    if name == 'dict' and value.keywords:
      for k, keyword in enumerate(value.keywords):
        own_line = keyword.lineno if keyword.lineno != line else 0
        first = text if k == 0 and path else ''
        collect(f'{path}.{keyword.arg}'.lstrip('.'), own_line, keyword.value, first)
    elif callable(section := names.get(name)) and not value.args:
      texts.update({f'{path}.{field}': text for field, text in comments(section).items()})
    else:
      texts[path] = text

  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
      collect(node.targets[0].attr, node.lineno, node.value)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith('ConfigDict') and node.args:
      collect('', 0, node.args[0])
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
      if ast.unparse(node.value.func) == 'dict':
        collect('', 0, node.value)
  return texts


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


def _fields(prefix, config, meanings, skip=()):
  """A table of the fields of a config, in the order of their meanings."""
  # ConfigDict sorts by name.
  order = {path: k for k, path in enumerate(meanings)}
  fields = sorted(leaves(config), key=lambda field: order.get(field[0], len(order)))
  rows = [
    (f'`{prefix}.{path}`', code(value), meanings.get(path, ''))
    for path, value in fields
    if path.split('.')[0] not in skip
  ]
  return table(('field', 'default', 'meaning'), rows)


def _sections(prefix, sections):
  """A heading and a table for each function that returns a section of fields."""
  pieces = []
  for section in sections:
    title, _, text = ' '.join(inspect.getdoc(section).split()).partition('.')
    fields = _fields(prefix, ml_collections.ConfigDict(section()), comments(section))
    pieces += [f'### {title}\n', f'{text.strip()}\n', f'{fields}\n']
  return '\n'.join(piece for piece in pieces if piece.strip())


def losses() -> dict[str, str]:
  """Field of `config.loss` -> the models that have this loss."""
  models: dict[str, list[str]] = {}
  for task, classes in registry.MODELS.items():
    for name, model in classes.items():
      for loss in model.loss_weights:
        models.setdefault(loss, []).append(f'`{name}` ({task})')
  return {
    f'{loss}_weight': f'weight of the loss `{loss}` of {", ".join(names)}'
    for loss, names in models.items()
  }


def config_page() -> str:
  """Every field of `base` and `data`, and the least values."""
  config = configs.base('pooling')
  meanings = comments(configs.base) | {f'loss.{name}': text for name, text in losses().items()}
  names = {name for section in configs.EXPERIMENT for name in section()}
  least = [(f'`config.{name}`', f'`{least}`') for name, least in configs.LEAST.items()]
  return '\n'.join(
    (
      '## The experiment: `base(model, task)`\n',
      '### Task and losses\n',
      _fields('config', config, meanings, skip={'data', 'model', *names}),
      '',
      _sections('config', configs.EXPERIMENT),
      '\n## The log: `data(...)`\n',
      _sections('config.data', configs.DATA),
      '\n## Least values\n',
      table(('field', 'at least'), least),
      '',
    )
  )


# Models.


def attributes(model: type) -> dict[str, str]:
  """The descriptions of the fields of a model, from its docstring and those of its bases."""
  names = [field.name for field in dataclasses.fields(model)]
  name = '|'.join(sorted(map(re.escape, names), key=len, reverse=True))
  begins = re.compile(rf'(?:^|(?<=[.;)\]] ))((?:{name})(?:, (?:{name}))*): ')
  descriptions: dict[str, str] = {}
  for kind in reversed(model.__mro__):
    section = (kind.__dict__.get('__doc__') or '').partition('Attributes:\n')[2]
    parts = begins.split(' '.join(section.split()))
    for fields, text in zip(parts[1::2], parts[2::2], strict=True):
      descriptions |= dict.fromkeys(fields.split(', '), text.strip())
  return descriptions


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
    paragraphs = _markdown(kind)
    if kind is model:
      blocks += paragraphs
    elif any(block.startswith('```') for block in paragraphs):  # it has an equation
      blocks += [f'`{kind.__name__}`:', *paragraphs]
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
  """(task, model) -> the values of --config that train it: `FILE`, or `FILE:MODEL`."""
  values: dict[tuple[str, str], list[str]] = {}
  for name in config_files.names():
    config = config_files.load(name)
    values.setdefault((config.task, config.model.name), []).append(f'configs/{name}.py')
    for model in registry.MODELS[config.task].keys() - {config.model.name, 'histories'}:
      # A file without argument, and one of rivals of a model with another file, refuse it. The
      # model `histories` needs a log with behaviours.
      with contextlib.suppress(UserError):
        config_files.load(f'{name}:{model}')
        values.setdefault((config.task, model), []).append(f'configs/{name}.py:{model}')
  return values


def quoted() -> dict[tuple[str, str], list[tuple[str, dict[str, str]]]]:
  """(task, model) -> (heading, {column: figure}) in each table of the results page."""
  text = (ROOT / 'docs/explanation/results.md').read_text(encoding='utf-8')
  figures: dict[tuple[str, str], list[tuple[str, dict[str, str]]]] = {}
  for heading, task in QUOTED:
    head, rows = table_under(text, heading)
    for row in rows:
      name = re.split(r'[ ,]', row[0].lower())[0]
      headings = [x[0] for x in figures.get((task, name), [])]
      if name in registry.MODELS[task] and heading not in headings:
        figures.setdefault((task, name), []).append((heading, dict(zip(head, row, strict=True))))
  return figures


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
      meanings = attributes(model)
      path = Path(inspect.getfile(model)).relative_to(ROOT)
      trained = ', '.join(f'`{x}`' for x in files.get((task, name), ())) or 'no file'
      pieces += [f'### `{name}` ({task})\n', _described(model), '']
      pieces.append(f'File: `{path}`. Config: {trained}.\n')
      for heading, row in results.get((task, name), ()):
        figures = ', '.join(f'{k} {v}' for k, v in row.items() if k and v)
        pieces.append(f'{heading}: {figures}.\n')
      defaults = {k: v for k, v in registry.defaults(name, task).items() if k != 'name'}
      rows = [
        (f'`config.model.{field}`', code(value), meanings.get(field, ''))
        for field, value in defaults.items()
      ]
      rows.sort(key=lambda row: row[0].rpartition('.')[2].strip('`') in shared)
      pieces += [table(('field', 'default', 'meaning'), rows), '']
  return '\n'.join(pieces)


# Command line and HTTP.


def cli_page() -> str:
  """The flags of lmn_jax.main, of the service, and the usage text of launch.sh."""
  rows = []
  for flag in main.FLAGS.flags_by_module_dict()['lmn_jax.main']:
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
  # The service opens an export when it starts, and it is not started here.
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
    # Schemas of FastAPI; this service answers these errors with a Problem.
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
  names: dict[str, list[str]] = {}
  for path in sorted((ROOT / 'lmn_jax').rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    if parts[-1] in ('__init__', '__main__'):
      continue
    names.setdefault(parts[1] if len(parts) > 2 else 'lmn_jax', []).append('.'.join(parts))
  return names


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
