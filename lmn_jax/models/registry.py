"""The models by their name in a config: a built-in name, or MODULE:CLASS for a user's model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import ml_collections

from lmn_jax import plugins
from lmn_jax.errors import UserError, one_of
from lmn_jax.layers.basic import Schema
from lmn_jax.models.base import Model
from lmn_jax.models.ctr.base import CTRModel
from lmn_jax.models.ctr.encoders import ENCODERS
from lmn_jax.models.ctr.histories import Histories
from lmn_jax.models.next_item.base import NextItemModel
from lmn_jax.models.next_item.caser import Caser
from lmn_jax.models.next_item.dman import DMAN
from lmn_jax.models.next_item.gru4rec import GRU4Rec
from lmn_jax.models.next_item.hpmn import HPMN
from lmn_jax.models.next_item.hstu import HSTU
from lmn_jax.models.next_item.sasrec import SASRecNext
from lmn_jax.models.next_item.sdm import SDM
from lmn_jax.models.next_item.shan import SHAN

KINDS = (int, float, str, bool, type(None))  # types of values in a config

NEXT_ITEM: dict[str, type[NextItemModel]] = {
  'gru4rec': GRU4Rec,
  'caser': Caser,
  'sasrec': SASRecNext,
  'shan': SHAN,
  'hpmn': HPMN,
  'sdm': SDM,
  'hstu': HSTU,
  'dman': DMAN,
}
CLICK = ENCODERS


# By task, then by name. `histories` has no defaults that can be trained: it needs named histories.
MODELS: dict[str, dict[str, type[Model]]] = {
  'click': CLICK | {'histories': Histories},
  'next_item': NEXT_ITEM,
}
BASES: dict[str, type[Model]] = {'click': CTRModel, 'next_item': NextItemModel}


def model_class(name: str, task: str = 'click') -> type[Model]:
  """Returns the class of a model.

  Args:
    name: one of MODELS[task], or MODULE:CLASS of a class outside lmn_jax. task: of the model.

  Raises:
    UserError: there is no such task or model, the module cannot be imported, or the class is not a
      model of the task.
  """
  models = MODELS[one_of('config.task', task, MODELS)]
  if not isinstance(name, str):
    raise UserError(f'config.model.name={name!r:.80} must be a text, such as lmn')
  if not plugins.is_plugin(name):
    return models[one_of('config.model.name', name, [*models, 'MODULE:CLASS'])]
  model, base = plugins.load('config.model.name', name), BASES[task]
  field, base_name = f'config.model.name={name!r}', f'{base.__module__}.{base.__name__}'
  if not (isinstance(model, type) and issubclass(model, base)):
    for other_task, other_base in BASES.items():
      if isinstance(model, type) and issubclass(model, other_base):
        raise UserError(
          f'{field} is a model of the task {other_task!r}, but config.task={task!r}; start the '
          f'config with base({name!r}, {other_task!r}), or make it a subclass of {base_name}'
        )
    raise UserError(f'{field} is {model!r:.80}, not a model; make it a subclass of {base_name}')
  if model.encode is base.encode and model.__call__ is base.__call__:
    raise UserError(f'{field} has no encode(); define it as described in {base_name}')
  return model


def defaults(name: str, task: str = 'click') -> dict:
  """Returns the fields of a model with their default values, as a config section.

  Raises:
    UserError: there is no such model, or it has a field that a config cannot hold.
  """
  model = model_class(name, task)
  return {'name': name} | {
    field.name: _default(name, field)
    for field in dataclasses.fields(model)
    if field.name not in ('schema', 'parent', 'name')
  }


def _default(name, field):
  where = f'config.model.name={name!r}: the field {field.name!r}'
  if field.name in dir(ml_collections.ConfigDict):
    raise UserError(f'{where} has the name of a method of ConfigDict; rename it')
  value = field.default
  if field.default_factory is not dataclasses.MISSING:
    value = field.default_factory()
  if value is dataclasses.MISSING:
    raise UserError(f'{where} has no default; add one, such as {field.name}: int = 8')
  if value == {}:  # a section of names of the user
    return value
  if not all(isinstance(x, KINDS) for x in (value if isinstance(value, tuple | list) else [value])):
    raise UserError(
      f'{where} has the default {value!r:.80}, which a config cannot hold; use numbers, strings, '
      'True, False, None, tuples of them, or an empty dict'
    )
  return value


def any_length(model: ml_collections.ConfigDict) -> bool:
  """Returns whether a click model accepts histories padded to another length.

  Args:
    model: the section of the config; of a model with encoders all of them must accept it.
  """
  names = list(model.get('encoders', {}).values()) or [model.name]
  return all(model_class(name).any_length for name in names)


def loss_weights(name: str, task: str = 'click') -> dict[str, float]:
  """Returns the section `loss` of a config: NAME_weight of all built-in models and of this model.

  Raises:
    UserError: there is no such model.
  """
  built_in = [model for models in MODELS.values() for model in models.values()]
  return {
    f'{loss}_weight': weight
    for model in (*built_in, model_class(name, task))
    for loss, weight in model.loss_weights.items()
  }


def build(config: dict, schema: Schema, task: str = 'click') -> Model:
  """Builds the model of a config section.

  Args:
    config: the section `model`: the name and every field of that model.
    schema: the fields of the store's batches. task: of the model.

  Raises:
    UserError: for an unknown model, an unknown field, or a value out of its bounds.
  """
  fields = dict(config)
  name = fields.pop('name')
  valid = set(defaults(name, task)) - {'name'}
  if unknown := sorted(set(fields) - valid):
    names = ', '.join(f'config.model.{field}' for field in unknown)
    raise UserError(
      f'{names}: unknown fields of model {name!r}; its fields are {", ".join(sorted(valid))}. To '
      'use another model, start from its config file'
    )
  fields = {k: _hashable(v) for k, v in fields.items()}
  if not plugins.is_plugin(name):
    model = model_class(name, task)(schema=schema, **fields)
    model.check()
    return model
  with plugins.explained(f'config.model.name={name!r}'):
    model = model_class(name, task)(schema=schema, **fields)
    model.check()
  return model


def _hashable(value: Any) -> Any:
  """Returns a value of a config with tuples for lists, and hashable dicts."""
  if isinstance(value, Mapping):
    return flax.core.FrozenDict({k: _hashable(x) for k, x in value.items()})
  return tuple(value) if isinstance(value, list) else value
