"""Histories: named histories, each with its own length and encoder, side by side.

So DMT has a transformer for each of the user's lists of clicks, carts and orders: Gu et al., Deep
Multifaceted Transformers for Multi-objective Ranking in Large-Scale E-commerce Recommender Systems,
CIKM 2020.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lmn_jax.data.named_histories import of_history
from lmn_jax.errors import UserError, one_of
from lmn_jax.models.ctr.base import CTRModel, Encoded
from lmn_jax.models.ctr.encoders import ENCODERS

SHARED = frozenset(field.name for field in dataclasses.fields(CTRModel))


@functools.cache
def encoder_class(model: type[CTRModel]) -> type[CTRModel]:
  """Returns a class with the fields of a click model whose call is its `encode` alone."""

  @nn.compact
  def call(self, x, batch, read, train):
    return self.encode(x, batch, read, train)

  return type(model.__name__, (model,), {'__call__': call, '__module__': model.__module__})


def own_fields(name: str) -> list[str]:
  """Returns the fields of an encoder that not all click models have, sorted."""
  return sorted({field.name for field in dataclasses.fields(ENCODERS[name])} - SHARED)


class Histories(CTRModel):
  """One encoder for each named history of config.data.histories (section 3.2). [ours: any encoder]

      encode = [encode_1(e_i, s_1) ; ... ; encode_n(e_i, s_n)]    s_k: the events of history k,
                                                                  in the order of their names
      L      = BCE + sum_k of the auxiliary losses of encoder k

  Users, items, contexts and events have the same rows and matrices in all histories, and targets
  are embedded once. An auxiliary loss has the weight of its name, config.loss.NAME_weight, in every
  encoder, and one that several encoders have is their sum. Monitors are logged as `orders/NAME`. An
  encoder of LMN has its queries from the user and the target, and injects the events of its
  history. The main history is not read. [ours]

  Attributes:
    encoders: {history: click model}, such as {'clicks': 'sam', 'orders': 'din'}.
    encoder_arguments: {history: {field: value}} of the fields of the encoder's own; the others,
      such as `width` and `time`, are those of this model.
  """

  encoders: Mapping[str, str] = dataclasses.field(default_factory=dict)
  encoder_arguments: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  has_time_bias = True  # `check` of the encoders

  @property
  def any_length(self) -> bool:
    """Whether all encoders accept histories padded to another length."""
    return all(ENCODERS[name].any_length for name in self.encoders.values())

  @property
  def histories(self) -> tuple[str, ...]:
    return tuple(sorted(self.encoders))

  def check(self):
    super().check()
    if not self.encoders:
      raise UserError(
        "config.model.encoders={} must name an encoder for each history, such as {'clicks': 'sam', "
        "'orders': 'din'}"
      )
    for history in self.encoder_arguments:
      one_of('config.model.encoder_arguments: history', history, self.encoders)
    for history in self.encoders:
      self._check_encoder(history)
    memories = [x for x, name in self.encoders.items() if ENCODERS[name].tables != CTRModel.tables]
    if len(memories) > 1:
      raise UserError(
        f'config.model.encoders: {" and ".join(memories)} both have a memory, '
        f'{self.encoders[memories[0]]!r}, and there is one; give one of them another encoder'
      )

  def _own_fields(self, history: str) -> dict[str, Any]:
    """Returns the fields of an encoder that are not those of this model, as configured.

    Raises:
      UserError: the encoder is unknown, or has no such field.
    """
    name = one_of(f'config.model.encoders.{history}', self.encoders[history], ENCODERS)
    fields, path = (
      self.encoder_arguments.get(history, {}),
      f'config.model.encoder_arguments.{history}',
    )
    if not isinstance(fields, Mapping):
      raise UserError(f'{path}={fields!r:.80} must be a dict of fields')
    for field, value in fields.items():
      one_of(f'{path}: field', field, own_fields(name))
      default = getattr(ENCODERS[name], field)
      if type(value) is not type(default) and (type(value), type(default)) != (int, float):
        raise UserError(
          f'{path}.{field}={value!r:.80} is of the type {type(value).__name__}; it must be of the '
          f'type {type(default).__name__}, such as {default!r}'
        )
    return dict(fields)

  def _encoder(self, history: str, **place: Any) -> CTRModel:
    """Returns the encoder of a history. place: the name or the parent of the module."""
    own, model = self._own_fields(history), ENCODERS[self.encoders[history]]
    shared = {name: getattr(self, name) for name in SHARED - {'parent', 'name'}}
    return encoder_class(model)(**shared, **own, **place)

  def _check_encoder(self, history: str) -> None:
    """Checks the fields of an encoder; its errors name them as they are in this config."""
    encoder = self._encoder(history, parent=None)
    try:
      encoder.check()
    except UserError as error:
      name, message = self.encoders[history], str(error)
      for field in own_fields(name):
        path = f'config.model.encoder_arguments.{history}.{field}='
        message = message.replace(f'config.model.{field}=', path)
      raise UserError(f'config.model.encoders.{history}={name!r}: {message}') from None

  def tables(self):
    tables = super().tables()
    for history in self.encoders:
      tables |= self._encoder(history, parent=None).tables()
    return tables

  def encode(self, x, batch, read, train):
    encoded = {}
    for history, (s_BLI, mask_BL) in x.named.items():
      encoder = self._encoder(history, name=f'encoder_{history}')
      of_this = x._replace(s_BLI=s_BLI, mask_BL=mask_BL, named={})
      encoded[history] = encoder(of_this, of_history(batch, history), read, train)

    def losses(logit):
      sums = {}
      for of_encoder in encoded.values():
        for name, loss in of_encoder.losses(logit).items():
          sums[name] = sums[name] + loss if name in sums else loss
      return sums

    monitors = {
      f'{history}/{name}': value
      for history, of_encoder in encoded.items()
      for name, value in of_encoder.monitors.items()
    }
    features = [of_encoder.x_BQE for of_encoder in encoded.values()]
    return Encoded(jnp.concatenate(features, axis=-1), losses, monitors)
