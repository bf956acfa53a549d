"""The models, by the name a config gives them."""

import dataclasses

from lmn_jax.errors import UserError, one_of
from lmn_jax.layers import Schema
from lmn_jax.models.bst import BST
from lmn_jax.models.ctr import CTRModel
from lmn_jax.models.dien import DIEN
from lmn_jax.models.din import DIN
from lmn_jax.models.eta import ETA
from lmn_jax.models.lmn import LMN
from lmn_jax.models.mimn import MIMN
from lmn_jax.models.pooling import Pooling
from lmn_jax.models.sam import SAM
from lmn_jax.models.sasrec import SASRec
from lmn_jax.models.sdim import SDIM
from lmn_jax.models.sim import SIM
from lmn_jax.models.twin import TWIN
from lmn_jax.models.ubr4ctr import UBR4CTR

MODELS: dict[str, type[CTRModel]] = {
  'pooling': Pooling,
  'din': DIN,
  'dien': DIEN,
  'mimn': MIMN,
  'sasrec': SASRec,
  'bst': BST,
  'sim': SIM,
  'ubr4ctr': UBR4CTR,
  'eta': ETA,
  'sdim': SDIM,
  'twin': TWIN,
  'sam': SAM,
  'lmn': LMN,
}


def defaults(name: str) -> dict:
  """The fields of a model with their default values, as a config section.

  Raises:
    UserError: if there is no such model.
  """
  model = MODELS[one_of('config.model.name', name, MODELS)]
  skip = {'schema', 'parent', 'name'}
  return {'name': name} | {
    field.name: field.default for field in dataclasses.fields(model) if field.name not in skip
  }


def build(config: dict, schema: Schema) -> CTRModel:
  """Makes the model of a config section.

  Args:
    config: the section `model`: the name and every field of that model.
    schema: what the store's batches hold.

  Raises:
    UserError: for an unknown model, a field it does not have, or a value out of its bounds.
  """
  fields = dict(config)
  name = fields.pop('name')
  known = set(defaults(name)) - {'name'}
  if strange := sorted(set(fields) - known):
    given = ', '.join(f'config.model.{field}' for field in strange)
    raise UserError(
      f'{given}: no field of model {name!r}, which has '
      f'{", ".join(sorted(known))}. To change the model, start from its own config file.'
    )
  fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
  model = MODELS[name](schema=schema, **fields)
  model.check()
  return model
