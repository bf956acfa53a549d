"""The settings of Sphinx; `./launch.sh --docs` builds the documentation, warnings as errors."""

import inspect
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402

from lmn_jax import __version__  # noqa: E402

project = 'lmn_jax'
release = version = __version__
copyright = 'the authors of lmn_jax, Apache-2.0'
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
# Flags keep their two dashes: no typographic dashes.
smartquotes = False
source_suffix = {'.md': 'myst-nb', '.ipynb': 'myst-nb'}
# The notebook is run by every build, in a folder of its own; a cell that fails ends the build.
nb_execution_mode = 'force'
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
exclude_patterns = ['reference/generated/*.md']
myst_heading_anchors = 3
# In docstrings, as in Markdown, a single backtick is code.
default_role = 'code'
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
# Fields of a class are a list; as separate objects, autodoc would describe some twice.
napoleon_use_ivar = True
python_use_unqualified_type_names = True
html_theme = 'furo'
html_title = 'lmn_jax'
html_copy_source = False
html_show_sourcelink = False
html_static_path = ['static']
html_css_files = ['tables.css']

SECTION = re.compile(r'(Args|Attributes|Returns|Raises|Yields):$')


def markdown_docstring(app, what, name, obj, options, lines):
  """Converts a docstring, Markdown with the sections of Google, to the input of napoleon.

  An indented block after an empty line, or after a colon, becomes a literal block: it is an
  equation or a list. Code between single backticks stays code. Other characters that mean something
  in reStructuredText are escaped.
  """
  converted: list[str] = []
  text: list[str] = []  # lines outside of literal blocks, which are escaped together

  def flush():
    converted.extend(_escaped('\n'.join(text)).split('\n') if text else ())
    text.clear()

  in_section = literal = False
  names = _names(obj)
  for line in [part for whole in lines for part in _split_arguments(whole, names)]:
    indented = line.startswith(' ')
    if SECTION.match(line):
      in_section, literal = True, False
    elif line.strip() and not indented:
      in_section = literal = False
    elif indented and not in_section and not literal:
      before = (text or converted or [''])[-1]
      if not before or before.endswith(':'):
        flush()
        converted += ['', '::', '']
        literal = True
    if literal and not indented and line.strip():
      literal = False
    if literal:
      converted.append(line)
    else:
      text.append(line)
  flush()
  lines[:] = converted


def without_description(app, what, name, obj, skip, options):
  """Whether to skip a member: the fields of a NamedTuple, described only by their number."""
  return True if (getattr(obj, '__doc__', None) or '').startswith('Alias for field') else None


def _names(obj):
  """The names of the arguments of a function, or of the fields of a class."""
  if inspect.isclass(obj):
    return list(inspect.get_annotations(obj))
  try:
    return list(inspect.signature(obj).parameters)
  except (TypeError, ValueError):
    return []


def _split_arguments(line, names):
  """Splits `a: text. b: text` into a line for each argument, as napoleon needs."""
  if not names or not line.startswith('  '):
    return [line]
  name = r'\*{0,2}(?:' + '|'.join(map(re.escape, names)) + ')'
  first, *others = re.split(rf'(?<=[.;)\]]) (?={name}(?:, {name})*: )', line)
  return [first, *(f'  {other}' for other in others)]


def _escaped(text):
  # Code may continue on the next line, not in the next paragraph.
  pieces = re.split(r'(`(?:(?!\n\s*\n)[^`])*`)', text)
  for k, piece in enumerate(pieces):
    if k % 2:
      # Code must end before a space or a sign, not as in `ConfigDict`s.
      pieces[k] = f'`{piece}`' + ('\\ ' if pieces[k + 1][:1].isalnum() else '')
    else:
      pieces[k] = re.sub(r'(?m)(?<!^)(?<! {2})([*|\\])|_(?!\w)', lambda m: '\\' + m[0], piece)
  return ''.join(pieces)


def unbroken_deviations(app, name, source):
  """Joins a figure and its deviation by no-break spaces, so that they stay in one line."""
  source[0] = re.sub(r'(?<=\d) ± (?=\.?\d)', '\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}', source[0])


def setup(app):
  """Writes the generated pages before Sphinx reads any."""
  app.connect('builder-inited', lambda app: generate.write(HERE / 'reference/generated'))
  app.connect('source-read', unbroken_deviations)
  app.connect('autodoc-skip-member', without_description)
  app.connect('autodoc-process-docstring', markdown_docstring, priority=400)
