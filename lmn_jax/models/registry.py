"""The models, by the name a config gives them."""

import dataclasses

from lmn_jax.errors import UserError, one_of
from lmn_jax.layers.basic import Schema
from lmn_jax.models.base import Model
from lmn_jax.models.ctr.base import CTRModel
from lmn_jax.models.ctr.bst import BST
from lmn_jax.models.ctr.dien import DIEN
from lmn_jax.models.ctr.din import DIN
from lmn_jax.models.ctr.eta import ETA
from lmn_jax.models.ctr.lmn import LMN
from lmn_jax.models.ctr.mimn import MIMN
from lmn_jax.models.ctr.pooling import Pooling
from lmn_jax.models.ctr.sam import SAM
from lmn_jax.models.ctr.sasrec import SASRec
from lmn_jax.models.ctr.sdim import SDIM
from lmn_jax.models.ctr.sim import SIM
from lmn_jax.models.ctr.twin import TWIN
from lmn_jax.models.ctr.ubr4ctr import UBR4CTR
from lmn_jax.models.next_item.base import NextItemModel
from lmn_jax.models.next_item.caser import Caser
from lmn_jax.models.next_item.dman import DMAN
from lmn_jax.models.next_item.gru4rec import GRU4Rec
from lmn_jax.models.next_item.hpmn import HPMN
from lmn_jax.models.next_item.hstu import HSTU
from lmn_jax.models.next_item.sasrec import SASRecNext
from lmn_jax.models.next_item.sdm import SDM
from lmn_jax.models.next_item.shan import SHAN

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
CLICK: dict[str, type[CTRModel]] = {
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


# By task, then by name.
MODELS: dict[str, dict[str, type[Model]]] = {'click': CLICK, 'next_item': NEXT_ITEM}


def defaults(name: str, task: str = 'click') -> dict:
  """The fields of a model with their default values, as a config section.

  Raises:
    UserError: if there is no such model.
  """
  known = MODELS[one_of('config.task', task, MODELS)]
  model = known[one_of('config.model.name', name, known)]
  skip = {'schema', 'parent', 'name'}
  return {'name': name} | {
    field.name: field.default for field in dataclasses.fields(model) if field.name not in skip
  }


def build(config: dict, schema: Schema, task: str = 'click') -> Model:
  """Makes the model of a config section.

  Args:
    config: the section `model`: the name and every field of that model.
    schema: what the store's batches hold. task: of which it is a model.

  Raises:
    UserError: for an unknown model, a field it does not have, or a value out of its bounds.
  """
  fields = dict(config)
  name = fields.pop('name')
  known = set(defaults(name, task)) - {'name'}
  if strange := sorted(set(fields) - known):
    given = ', '.join(f'config.model.{field}' for field in strange)
    raise UserError(
      f'{given}: no field of model {name!r}, which has '
      f'{", ".join(sorted(known))}. To change the model, start from its own config file.'
    )
  fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
  model = MODELS[task][name](schema=schema, **fields)
  model.check()
  return model
