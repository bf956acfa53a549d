"""The copy of the loader in every export, as a package `bundle`."""

import re
from pathlib import Path

from lmn_jax.data import item_index, texts, times
from lmn_jax.export.runtime import (
  bundle,
  click,
  histories,
  ids,
  labels,
  manifest,
  next_item,
  padding,
  platforms,
  programs,
  raw_values,
  requests,
  users,
)
from lmn_jax.inference import segment_states

PACKAGE = 'bundle'
# Modules that are copied; they import nothing of lmn_jax but each other.
COPIED = (
  bundle, click, histories, ids, item_index, labels, manifest, next_item, padding, platforms,
  programs, raw_values, requests, segment_states, texts, times, users,
)  # fmt: skip
INIT = '''"""The loader of this export; see bundle.py."""

from bundle.bundle import Bundle
from bundle.manifest import FolderError
from bundle.programs import PlatformError
from bundle.raw_values import RequestError

__all__ = ['Bundle', 'FolderError', 'PlatformError', 'RequestError']
'''


def copy_loader(folder: Path) -> None:
  """Writes the package `bundle` into a folder: the modules of COPIED, with imports changed."""
  target = folder / PACKAGE
  target.mkdir()
  (target / '__init__.py').write_text(INIT)
  for module in COPIED:
    assert module.__file__
    source = Path(module.__file__).read_text(encoding='utf-8')
    (target / Path(module.__file__).name).write_text(relocated(source), encoding='utf-8')


def relocated(source: str) -> str:
  """Returns source that imports from the package `bundle` instead of the folders of lmn_jax.

  `from lmn_jax.data import texts` becomes `from bundle import texts`, and
  `from lmn_jax.data.texts import value` becomes `from bundle.texts import value`.
  """
  modules = {module.__name__ for module in COPIED}

  def moved(match):
    name = match[1]
    return f'from {PACKAGE}.{name.rsplit(".")[-1]}' if name in modules else f'from {PACKAGE}'

  return re.sub(r'^from (lmn_jax[\w.]*)(?= import )', moved, source, flags=re.MULTILINE)
