"""The code reads every field of a config, in its section.

An expression such as `config.data.split.valid` reads a field. A static analysis follows sections
through names, attributes, assignments, loops over literals and calls; copying or printing a whole
section reads none of its fields.
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
NO_SECTIONS = ('jax', 'self')  # jax.config is not an experiment's, a model's self.loss is a name
FUNCTION = ast.FunctionDef | ast.Lambda
NODES = ast.Assign | ast.For | ast.comprehension | ast.Call | ast.Attribute | ast.Subscript


class Scope(dict):
  """The values of the names of a function, paths of sections and texts, each a set.

  parameters: the names of its parameters and of those of the functions around it.
  """

  parameters: frozenset[str] = frozenset()

  def __missing__(self, name):
    return set()


def functions(tree):
  """Yields (function, the function around it or None)."""

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
  """The fields that code reads, as paths; see `contains`."""

  def __init__(self, trees):
    self.read: set[Path] = set()
    self.patterns: set[tuple[Path, str]] = set()
    self._scopes = defaultdict(Scope)
    self._functions = [
      (module, function, around, [x for x in ast.walk(function) if isinstance(x, NODES)])
      for module, tree in trees.items()
      for function, around in functions(tree)
    ]
    # File -> name -> the module that it is imported from.
    self._imported = {
      module: {
        alias.asname or alias.name: f'{node.module}.{alias.name}'.removeprefix('lmn_jax.')
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
      }
      for module, tree in trees.items()
    }
    # Attributes that hold a section: `data`, and those that a class declares as a ConfigDict.
    self._attributes = {'data': {('data',)}} | {
      node.target.id: {() if node.target.id == 'config' else (node.target.id,)}
      for tree in trees.values()
      for node in ast.walk(tree)
      if isinstance(node, ast.AnnAssign) and 'ConfigDict' in ast.unparse(node.annotation)
    }
    self._by_name = defaultdict(list)
    for module, function, *_ in self._functions:
      if isinstance(function, ast.FunctionDef):
        self._by_name[function.name].append((module, function))
    self._seed()
    size = -1
    while size != (size := sum(len(x) for scope in self._scopes.values() for x in scope.values())):
      self.patterns.clear()  # those of the pass before are incomplete
      for module, function, around, nodes in self._functions:
        self._follow(module, function, around, nodes)

  def _seed(self):
    """Seeds scopes: `config` is the whole and `data` its section, unless calls show otherwise."""
    for module, function, around, _ in self._functions:
      positional, named = parameters(function)
      outer = self._scopes[around].parameters if around else frozenset()
      names = {argument.arg for argument in (*positional, *named)}
      self._scopes[function].parameters = outer | names
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
        for name, value in pairs:
          if isinstance(name, ast.Name):
            self._add(function, name.id, self._value(value, scope))
      elif isinstance(node, ast.For | ast.comprehension):
        for name, values in self._loop(node, scope):
          self._add(function, name, values)
      elif isinstance(node, ast.Call):
        self._call(module, function, node, scope)
        if getattr(node.func, 'attr', '') == 'get' and node.args:  # section.get(name)
          self._read(self._sections(node.func.value, scope), node.args[0], scope)
      elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        self.read |= self._paths(node, scope)
      elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        self._read(self._sections(node.value, scope), node.slice, scope)

  def _called(self, module, caller, node):
    """Returns the functions that a call may mean: of the named module, or methods."""
    if isinstance(node.func, ast.Name):
      if node.func.id in self._scopes[caller].parameters:
        return []  # a function that the caller receives
      named = self._by_name[node.func.id]
      imported = self._imported[module].get(node.func.id)
      functions = [x for x in named if f'{x[0]}.{x[1].name}' == imported or x[0] == module]
      return functions or [x for x in named if not method(x[1])]
    if not isinstance(node.func, ast.Attribute):
      return []
    named, receiver = self._by_name[node.func.attr], getattr(node.func.value, 'id', '')
    functions = [x for x in named if x[0] == self._imported[module].get(receiver)]
    return functions or [x for x in named if method(x[1])]

  def _call(self, module, caller, node, scope):
    for _, function in self._called(module, caller, node):
      positional, named = parameters(function)
      positional = positional[1:] if method(function) else positional
      pairs = list(zip(positional, node.args, strict=False))
      by_name = {argument.arg: argument for argument in (*positional, *named)}
      pairs += [(by_name[x.arg], x.value) for x in node.keywords if x.arg in by_name]
      for argument, value in pairs:
        values = self._value(value, scope)
        if values:
          self._add(function, argument.arg, values)

  def _loop(self, node, scope):
    """Yields (name, values) of the variables of a loop over a literal."""
    for element in getattr(node.iter, 'elts', ()):
      pairs = [(node.target, element)]
      if isinstance(node.target, ast.Tuple) and isinstance(element, ast.Tuple):
        pairs = zip(node.target.elts, element.elts, strict=True)
      for target, value in pairs:
        if isinstance(target, ast.Name):
          yield target.id, self._value(value, scope)

  def _value(self, node, scope):
    """Returns the sections (paths) and texts (str) that are possible values of an expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      return {node.value}
    if isinstance(node, ast.Name):
      return scope[node.id]
    if isinstance(node, ast.Attribute):
      paths = self._paths(node, scope) & SECTIONS
      if not self._sections(node.value, scope) and ast.unparse(node.value) not in NO_SECTIONS:
        # `log.data`, `session.config`: an attribute of this name is the section.
        paths = self._attributes.get(node.attr, set())
      return paths
    if isinstance(node, ast.Subscript):
      return self._paths(node, scope) & SECTIONS
    return set()

  def _paths(self, node, scope):
    """Returns the paths of an attribute or a subscript of a section."""
    keys = {node.attr} if isinstance(node, ast.Attribute) else self._value(node.slice, scope)
    sections = self._sections(node.value, scope)
    return {(*x, key) for x in sections for key in keys if isinstance(key, str)}

  def _sections(self, node, scope):
    return {x for x in self._value(node, scope) if isinstance(x, tuple)}

  def _read(self, sections, key, scope):
    """Records that a key of sections is read, which is a text or an f-string."""
    texts = {x for x in self._value(key, scope) if isinstance(x, str)}
    self.read |= {(*section, text) for section in sections for text in texts}
    if isinstance(key, ast.JoinedStr):
      pattern = ''.join(self._pattern(part, scope) for part in key.values)
      self.patterns |= {(section, pattern) for section in sections}

  def _pattern(self, part, scope):
    """Returns a pattern for a part of an f-string: its text, or its possible values."""
    if isinstance(part, ast.Constant):
      return re.escape(part.value)
    texts = {x for x in self._value(part.value, scope) if isinstance(x, str)}
    return f'(?:{"|".join(map(re.escape, sorted(texts)))})' if texts else '(.+)'

  def contains(self, path: Path, words: set[str]) -> bool:
    """Whether a field is read; in `x[f'{kind}_features']` the kind must be a word of the code."""
    if path in self.read:
      return True
    for section, pattern in self.patterns:
      match = re.fullmatch(pattern, path[-1])
      if section == path[:-1] and match and words.issuperset(match.groups()):
        return True
    return False


def leaves(config, path=()):
  """Yields the paths of all fields, but for the section of the model."""
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
  unread = ['.'.join(path) for path in FIELDS if not READS.contains(path, WORDS)]
  assert not unread, f'no code reads the config fields {unread}; use them or remove them'


def test_no_invented_field_counts_as_read():
  """Not even one with a name that code uses for something else, in any section."""
  names = {node.attr for tree in CODE.values() for node in ast.walk(tree) if hasattr(node, 'attr')}
  methods = set(dir(ml_collections.ConfigDict))  # no field has such a name, see test_config.py
  names = {name for name in names | WORDS if name.isidentifier()} - methods
  assert len(names) > 1000 and len(SECTIONS) > 6
  invented = {(*section, name) for section in SECTIONS - {('model',)} for name in names}
  existing = set(FIELDS) | SECTIONS | {('optimizer', 'dense', 'rows')}  # only tables have `rows`
  wrong = ['.'.join(x) for x in invented - existing if READS.contains(x, WORDS)]
  assert not wrong, f'these count as read: {wrong}'


def read_by(cls) -> set[str]:
  """Returns the fields that a model class, its bases, or code with a model read."""
  classes = {base.__name__ for base in cls.__mro__}
  names = {x[1] for x in READS.read if x[:1] == ('model',) and len(x) == 2}
  for module, tree in CODE.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.ClassDef) and node.name in classes and module.startswith('models'):
        names |= {
          x.attr
          for x in ast.walk(node)
          if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name) and x.value.id == 'self'
        }
      elif isinstance(node, ast.Attribute) and ast.unparse(node.value).split('.')[-1] == 'model':
        names.add(node.attr)
  return names


@pytest.mark.parametrize('task', MODELS)
def test_every_field_of_a_model_is_read(task):
  for name, cls in MODELS[task].items():
    fields = {field.name for field in dataclasses.fields(cls)} & set(
      configs.base(name, task).model
    ) - {'name'}
    unread = fields - read_by(cls)
    assert not unread, f'no code reads the fields {sorted(unread)} of {name}'
    assert 'invented' not in read_by(cls)
