"""Arguments of `Experiment`: paths, and the config and its fields."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from lmn_jax import config as configs
from lmn_jax.data import frames
from lmn_jax.distributed import compilation_cache
from lmn_jax.errors import UserError, one_of


def path_of(argument: str, value: Any) -> Path | None:
  """Returns an argument as a path; None is None.

  Raises:
    UserError: it is no path.
  """
  if value is None:
    return None
  if not frames.is_path(value):
    text = ' '.join(f'{value!r:.80}'.split())
    raise UserError(f'{argument}={text} of the type {type(value).__name__} must be a path')
  return Path(value)


def text_of(argument: str, value: Any) -> str:
  """Returns an argument that is a path as text, '' for none; `Path('')` is the current folder.

  Raises:
    UserError: it is no path.
  """
  path = path_of(argument, value)
  return str(path) if path is not None and str(value) else ''


def folder_of(argument: str, value: Any, default: Path) -> Path:
  """Returns an argument as the path of a folder; None is the default.

  Raises:
    UserError: it is no path, or an empty text, which would be the current folder.
  """
  if isinstance(value, str) and not value:
    raise UserError(f"{argument}='' is empty; name a folder, or leave it out for {default}")
  return path_of(argument, value) or default


def cache_of(value: Any, beside: Path) -> Path | None:
  """Returns the folder of compiled programs; None, 'off', stores no programs.

  Args:
    value: of the argument or flag; None is the default. beside: the folder that the default is in.

  Raises:
    UserError: it is no path, or an empty text.
  """
  folder = folder_of('compilation_cache', value, beside / compilation_cache.FOLDER)
  return None if folder == Path(compilation_cache.OFF) else folder


def copy_of(config: Any) -> ml_collections.ConfigDict:
  """Returns a copy of a config. References between its fields are kept: one may follow another.

  Raises:
    UserError: it is no ConfigDict, or has no data, model or task.
  """
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f'config is of the type {type(config).__name__}; give a ConfigDict, or the name or path of a '
      'config file'
    )
  if isinstance(config, ml_collections.FrozenConfigDict):
    config = ml_collections.ConfigDict(config)
  configs.check_sections(config)
  return copy.deepcopy(config)


def new_config(fields: Mapping[str, Any]) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
  """Returns a config for `model` and `task` of the fields, and the other fields."""
  fields = dict(fields)
  model = fields.pop('model', 'lmn')
  if isinstance(model, Mapping):
    fields['model'] = model
    model = model.get('name', 'lmn')
  return configs.base(model, fields.pop('task', 'click')), fields


def change(
  config: ml_collections.ConfigDict, fields: Mapping[str, Any], defaults: Any, path: str = 'config'
) -> None:
  """Sets fields of a config; sections are changed field by field.

  Args:
    config: the config to change. fields: name -> value. defaults: a config with all existing
      fields; an empty section, such as config.data.multi, takes any name. path: path of the
      section, for messages.

  Raises:
    UserError: a field does not exist, or a value has another type.
  """
  for name, value in fields.items():
    if len(defaults):
      one_of(f'{path} field', name, defaults)
    if isinstance(defaults.get(name), ml_collections.ConfigDict):
      if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise UserError(f'{path}.{name}={value!r} must be a dict of fields')
      change(config[name], value, defaults[name], f'{path}.{name}')
      continue
    if isinstance(value, np.generic):
      value = value.item()
    before = defaults.get(name)
    try:
      if isinstance(value, bool) and type(before) in (int, float):
        raise TypeError  # Python takes True for 1
      with config.unlocked():
        config[name] = value
    except (TypeError, ValueError):
      text = ' '.join(f'{value!r:.200}'.split())
      raise UserError(
        f'{path}.{name}={text} is of the type {type(value).__name__}; it must be of the type '
        f'{type(before).__name__}, such as {before!r}'
      ) from None
