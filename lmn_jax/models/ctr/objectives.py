"""The loss of a click model, by the name in config.model.loss."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmn_jax import plugins
from lmn_jax.errors import UserError, one_of
from lmn_jax.layers import click_losses
from lmn_jax.layers.losses import click_loss, custom_loss


class Examples(NamedTuple):
  """The labelled examples of a batch: B, or B * Q with Q targets of each request.

  label_N: 0 or 1, or a number, standardised for built-in losses. weight_N: 0 on rows that do not
  count. group_N: of a loss within groups.
  """

  label_N: Float[Array, 'N']
  weight_N: Float[Array, 'N']
  group_N: Int[Array, 'N']


class Settings(NamedTuple):
  """Fields of config.model that losses read: of 'focal', of losses within groups, of 'huber'."""

  gamma: float
  ranking: float
  delta: float


class Loss(NamedTuple):
  """A built-in loss.

  function: (outputs of the head [N], or [N, 2] for two outputs; examples; settings) -> float32
  scalar. outputs: numbers of the head for a label: 1, the log-odds, or 2, whose difference they
  are. grouped: whether it compares the examples of a group. kind: of the labels; '' is any.
  """

  function: Callable[[Array, Examples, Settings], Float[Array, '']]
  outputs: int = 1
  grouped: bool = False
  kind: str = 'click'


def _bce(logit_N, x, settings):
  return click_loss(logit_N, x.label_N, x.weight_N)


def _focal(logit_N, x, settings):
  return click_losses.focal_loss(logit_N, x.label_N, x.weight_N, settings.gamma)


def _with_bce(ranking_loss, logit_N, x, settings):
  """`(1 - r) BCE + r L_rank`, so that the scores stay log-odds. [ours: for pairs and lists]"""
  ranking = ranking_loss(logit_N, x.label_N, x.weight_N, x.group_N)
  return (1 - settings.ranking) * _bce(logit_N, x, settings) + settings.ranking * ranking


def _jrc(z_N2, x, settings):
  ranking = click_losses.jrc_loss(z_N2, x.label_N, x.weight_N, x.group_N)
  calibration = _bce(z_N2[:, 1] - z_N2[:, 0], x, settings)
  return (1 - settings.ranking) * calibration + settings.ranking * ranking


def _mse(value_N, x, settings):
  return click_losses.squared_loss(value_N, x.label_N, x.weight_N)


def _huber(value_N, x, settings):
  return click_losses.huber_loss(value_N, x.label_N, x.weight_N, settings.delta)


LOSSES = {
  'bce': Loss(_bce),
  'focal': Loss(_focal),
  'pairwise': Loss(functools.partial(_with_bce, click_losses.pairwise_loss), grouped=True),
  'listwise': Loss(functools.partial(_with_bce, click_losses.listwise_loss), grouped=True),
  'jrc': Loss(_jrc, outputs=2, grouped=True),
  'mse': Loss(_mse, kind='number'),
  'huber': Loss(_huber, kind='number'),
}


def loss_of(name: str) -> Loss:
  """Returns the loss of a name: a built-in one, or MODULE:FUNCTION.

  Raises:
    UserError: there is no such loss, or it cannot be loaded.
  """
  if not plugins.is_plugin(name):
    return LOSSES[one_of('config.model.loss', name, [*LOSSES, 'MODULE:FUNCTION'])]
  plugins.load_function('config.model.loss', name)
  return Loss(
    lambda score_N, x, settings: custom_loss(name, score_N, x.label_N, x.weight_N), kind=''
  )


def check_kind(name: str, kind: str) -> None:
  """Checks that a loss is one of the labels' kind.

  Raises:
    UserError: it is not.
  """
  if loss_of(name).kind not in ('', kind):
    fitting = [other for other, loss in LOSSES.items() if loss.kind == kind]
    raise UserError(
      f'config.model.loss={name!r} does not fit config.data.label_kind={kind!r}; use one of '
      f'{", ".join(fitting)}, MODULE:FUNCTION'
    )


def check_settings(settings: Settings) -> None:
  """Checks the fields that losses read.

  Raises:
    UserError: a value is out of its bounds.
  """
  if not settings.gamma >= 0:
    raise UserError(f'config.model.gamma={settings.gamma} must be at least 0')
  if not settings.delta > 0:
    raise UserError(f'config.model.delta={settings.delta} must be above 0')
  if not 0 <= settings.ranking <= 1:
    raise UserError(f'config.model.ranking={settings.ranking} must be in [0, 1]')


def examples_of(batch: dict[str, Array], labels: int, grouped: bool = True) -> list[Examples]:
  """Returns the labelled examples of a batch, for each label.

  Examples of one user are a group; with several targets of a request, those of a request. An
  example without a label has the weight 0 for it.

  Args:
    batch: label [B] or [B, Q], with K labels [B, K] or [B, Q, K], NaN where one is missing; weight
      [B] or [B, Q]; if `grouped`, user_index [B].
    labels: K. grouped: whether a loss reads the groups; without, all are 0.
  """
  label, weight = batch['label'], batch['weight']
  if not grouped:
    group = jnp.zeros(weight.shape, jnp.int32)
  elif weight.ndim > 1:
    group = jnp.broadcast_to(jnp.arange(len(weight), dtype=jnp.int32)[:, None], weight.shape)
  else:
    group = batch['user_index']
  if labels == 1:
    return [Examples(label.reshape(-1), weight.reshape(-1), group.reshape(-1))]
  examples = []
  for k in range(labels):
    missing = jnp.isnan(label[..., k])
    arrays = jnp.where(missing, 0, label[..., k]), jnp.where(missing, 0, weight), group
    examples.append(Examples(*(x.reshape(-1) for x in arrays)))
  return examples
