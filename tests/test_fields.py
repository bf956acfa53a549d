"""Every field of a config is read by code: as itself, in its own section.

A field is read by an expression such as `config.data.split.valid`. Which expression holds which
section is followed through names, assignments, loops over literals and calls; a whole section that
is copied or printed reads none of its fields.
"""

import ast
import dataclasses
import re
from collections import defaultdict

import ml_collections
import pytest

from lmn_jax import config as configs
from lmn_jax.models.registry import MODELS
from tests.test_architecture import TREES

Path = tuple[str, ...]
CODE = {module: tree for module, tree in TREES.items() if module != 'config'}
FUNCTION = ast.FunctionDef | ast.Lambda
LOOKED_AT = ast.Assign | ast.For | ast.comprehension | ast.Call | ast.Attribute | ast.Subscript


class Scope(dict):
  """What the names of a function stand for: paths of sections, and texts; each a set."""

  def __missing__(self, name):
    return set()


def functions(tree):
  """(function, the function around it or None)."""

  def walk(node, around):
    for child in ast.iter_child_nodes(node):
      if isinstance(child, FUNCTION):
        yield child, around
        yield from walk(child, child)
      else:
        yield from walk(child, around)

  yield from walk(tree, None)


def parameters(function):
  return [*function.args.posonlyargs, *function.args.args], function.args.kwonlyargs


def method(function):
  return function.args.args[:1] and function.args.args[0].arg == 'self'


class Reads:
  """The fields that code reads, as paths; see `of`."""

  def __init__(self, trees):
    self.found: set[Path] = set()
    self.patterns: set[tuple[Path, str]] = set()
    self._scopes = defaultdict(Scope)
    self._functions = [
      (module, function, around, [x for x in ast.walk(function) if isinstance(x, LOOKED_AT)])
      for module, tree in trees.items()
      for function, around in functions(tree)
    ]
    # By file, which module a name stands for there.
    self._imported = {
      module: {
        alias.asname or alias.name: f'{node.module}.{alias.name}'.removeprefix('lmn_jax.')
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
      }
      for module, tree in trees.items()
    }
    self._by_name = defaultdict(list)
    for module, function, *_ in self._functions:
      if isinstance(function, ast.FunctionDef):
        self._by_name[function.name].append((module, function))
    self._seed()
    size = -1
    while size != (size := sum(len(x) for scope in self._scopes.values() for x in scope.values())):
      self.patterns.clear()  # made of what was not known before
      for module, function, around, nodes in self._functions:
        self._follow(module, function, around, nodes)

  def _seed(self):
    """By convention `config` is the whole, `data` its section; not where calls say otherwise."""
    for module, function, *_ in self._functions:
      positional, named = parameters(function)
      for argument in (*positional, *named):
        kind = ast.unparse(argument.annotation) if argument.annotation else ''
        if argument.arg == 'config' and module != 'tables.optimizers':
          self._add(function, 'config', {()})
        elif argument.arg == 'data' and 'ConfigDict' in kind:
          self._add(function, 'data', {('data',)})

  def _add(self, function, name, values):
    scope = self._scopes[function]
    scope[name] = scope[name] | values

  def _follow(self, module, function, around, nodes):
    scope = self._scopes[function]
    for name, values in self._scopes[around].items() if around else ():
      scope[name] = scope[name] | values
    for node in nodes:
      if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
          pairs = list(zip(target.elts, node.value.elts, strict=True))
        for one, value in pairs:
          if isinstance(one, ast.Name):
            self._add(function, one.id, self._value(value, scope))
      elif isinstance(node, ast.For | ast.comprehension):
        for name, values in self._loop(node, scope):
          self._add(function, name, values)
      elif isinstance(node, ast.Call):
        self._call(module, node, scope)
        if getattr(node.func, 'attr', '') == 'get' and node.args:  # section.get(name)
          self._read(self._sections(node.func.value, scope), node.args[0], scope)
      elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        self.found |= self._paths(node, scope)
      elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        self._read(self._sections(node.value, scope), node.slice, scope)

  def _called(self, module, node):
    """The functions that a call may mean: of the module that is named, or methods."""
    if isinstance(node.func, ast.Name):
      known = self._by_name[node.func.id]
      return [x for x in known if x[0] == module] or [x for x in known if not method(x[1])]
    if not isinstance(node.func, ast.Attribute):
      return []
    known, of = self._by_name[node.func.attr], getattr(node.func.value, 'id', '')
    named = [x for x in known if x[0] == self._imported[module].get(of)]
    return named or [x for x in known if method(x[1])]

  def _call(self, module, node, scope):
    for _, function in self._called(module, node):
      positional, named = parameters(function)
      positional = positional[1:] if method(function) else positional
      given = list(zip(positional, node.args, strict=False))
      own = {argument.arg: argument for argument in (*positional, *named)}
      given += [(own[x.arg], x.value) for x in node.keywords if x.arg in own]
      for argument, value in given:
        values = self._value(value, scope)
        if values:
          self._add(function, argument.arg, values)

  def _loop(self, node, scope):
    """What the variables of a loop over a literal stand for: (name, values)."""
    for element in getattr(node.iter, 'elts', ()):
      pairs = [(node.target, element)]
      if isinstance(node.target, ast.Tuple) and isinstance(element, ast.Tuple):
        pairs = zip(node.target.elts, element.elts, strict=True)
      for target, value in pairs:
        if isinstance(target, ast.Name):
          yield target.id, self._value(value, scope)

  def _value(self, node, scope):
    """Sections (paths) and texts (str) that an expression may be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      return {node.value}
    if isinstance(node, ast.Name):
      return scope[node.id]
    if isinstance(node, ast.Attribute):
      # `log.data`, `self.data`: what is kept under this name is the section.
      kept = {('data',)} if node.attr == 'data' else set()
      return kept | (self._paths(node, scope) & SECTIONS)
    if isinstance(node, ast.Subscript):
      return self._paths(node, scope) & SECTIONS
    return set()

  def _paths(self, node, scope):
    """Paths that an attribute or a subscript of a section stands for."""
    keys = {node.attr} if isinstance(node, ast.Attribute) else self._value(node.slice, scope)
    sections = self._sections(node.value, scope)
    return {(*x, key) for x in sections for key in keys if isinstance(key, str)}

  def _sections(self, node, scope):
    return {x for x in self._value(node, scope) if isinstance(x, tuple)}

  def _read(self, sections, key, scope):
    """Notes that a key, a text or an f-string, of sections is read."""
    texts = {x for x in self._value(key, scope) if isinstance(x, str)}
    self.found |= {(*section, text) for section in sections for text in texts}
    if isinstance(key, ast.JoinedStr):
      pattern = ''.join(self._pattern(part, scope) for part in key.values)
      self.patterns |= {(section, pattern) for section in sections}

  def _pattern(self, part, scope):
    """Of a piece of an f-string: its text, or what it may be if that is known."""
    if isinstance(part, ast.Constant):
      return re.escape(part.value)
    texts = {x for x in self._value(part.value, scope) if isinstance(x, str)}
    return f'(?:{"|".join(map(re.escape, sorted(texts)))})' if texts else '(.+)'

  def of(self, path: Path, words: set[str]) -> bool:
    """Whether a field is read; of `x[f'{kind}_features']` the kind must be a word of the code."""
    if path in self.found:
      return True
    for section, pattern in self.patterns:
      match = re.fullmatch(pattern, path[-1])
      if section == path[:-1] and match and words.issuperset(match.groups()):
        return True
    return False


def leaves(config, path=()):
  """The paths of all fields, but for the section of the model."""
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict) and len(value):
      if (*path, name) != ('model',):
        yield from leaves(value, (*path, name))
    else:
      yield (*path, name)


FIELDS = sorted(leaves(configs.base('pooling')))
SECTIONS = {path[:k] for path in FIELDS for k in range(len(path))} | {('model',)}
READS = Reads(CODE)
WORDS = {
  word
  for tree in CODE.values()
  for node in ast.walk(tree)
  for word in (getattr(node, 'value', None), getattr(node, 'arg', None))
  if isinstance(word, str)
}


def test_every_config_field_is_read():
  unread = ['.'.join(path) for path in FIELDS if not READS.of(path, WORDS)]
  assert not unread, f'no code reads the config fields {unread}; use them or remove them'


def test_an_invented_field_is_not_read():
  """Whatever it is called: by any name that code uses for something else, in any section."""
  names = {node.attr for tree in CODE.values() for node in ast.walk(tree) if hasattr(node, 'attr')}
  methods = set(dir(ml_collections.ConfigDict))  # no field may be called so, see test_config.py
  names = {name for name in names | WORDS if name.isidentifier()} - methods
  assert len(names) > 1000 and len(SECTIONS) > 6
  invented = {(*section, name) for section in SECTIONS - {('model',)} for name in names}
  known = set(FIELDS) | SECTIONS | {('optimizer', 'dense', 'rows')}  # `rows` is of the tables
  taken = ['.'.join(x) for x in invented - known if READS.of(x, WORDS)]
  assert not taken, f'these would pass for fields: {taken}'


def read_by(cls) -> set[str]:
  """Names that a class and those above it, or code that holds a model, read of it."""
  own = {base.__name__ for base in cls.__mro__}
  found = {x[1] for x in READS.found if x[:1] == ('model',) and len(x) == 2}
  for module, tree in CODE.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.ClassDef) and node.name in own and module.startswith('models'):
        found |= {
          x.attr
          for x in ast.walk(node)
          if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name) and x.value.id == 'self'
        }
      elif isinstance(node, ast.Attribute) and ast.unparse(node.value).split('.')[-1] == 'model':
        found.add(node.attr)
  return found


@pytest.mark.parametrize('task', MODELS)
def test_every_field_of_a_model_is_read(task):
  for name, cls in MODELS[task].items():
    fields = {field.name for field in dataclasses.fields(cls)} & set(
      configs.base(name, task).model
    ) - {'name'}
    unread = fields - read_by(cls)
    assert not unread, f'{name} reads its fields {sorted(unread)} nowhere'
    assert 'invented' not in read_by(cls)
