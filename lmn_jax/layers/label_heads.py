"""Heads for several labels of an example, which share layers: shared bottom, MMoE, PLE."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lmn_jax.layers.basic import MLP

KINDS = ('shared', 'mmoe', 'ple')


class LabelHeads(nn.Module):
  """Outputs for K labels from one vector of features x.

      shared   y_k = t_k(f(x))                                                     shared bottom
      mmoe     y_k = t_k(sum_i g_k(x)_i f_i(x)),       g_k(x) = softmax(W_k x)
      ple      x_k <- sum_i g_k(x_k)_i [E_k(x_k) ; E_s(x_s)]_i                     in each level
               x_s <- sum_i g_s(x_s)_i [E_1(x_1) ; ... ; E_K(x_K) ; E_s(x_s)]_i    but the last
               y_k = t_k(x_k)

  MMoE is Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate
  Mixture-of-Experts, KDD 2018, section 4. PLE is Tang et al., Progressive Layered Extraction,
  RecSys 2020, section 4; one level is their customized gate control. f and the experts E are MLPs
  of the widths `hidden`; the towers t_k are MLPs of the widths `tower` and a linear layer.

  Attributes:
    labels: K. outputs: numbers of each label.
    kind: one of KINDS.
    hidden: widths of the shared layers, or of each expert.
    tower: widths of the hidden layers of each label.
    experts: number of experts of MMoE, or of shared experts of a level of PLE.
    label_experts: number of experts that a label has for itself in a level of PLE.
    levels: of PLE.
    dropout: share of hidden units dropped in training.
    dtype: compute type. Gates, whose differences are small, and outputs are float32.
  """

  labels: int
  outputs: int
  kind: str
  hidden: tuple[int, ...]
  tower: tuple[int, ...]
  experts: int
  label_experts: int
  levels: int
  dropout: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, '... F'], train: bool) -> Float[Array, '... K O']:
    """Computes the outputs.

    Args:
      x: features. train: training behaviour (dropout).
    """
    mix = {'shared': self._shared, 'mmoe': self._mmoe, 'ple': self._ple}[self.kind]
    towers = [
      MLP(
        self.tower, self.outputs, dropout=self.dropout, dtype=self.dtype, final_dtype=jnp.float32,
        name=f'tower_{k}',
      )(x_k, train)
      for k, x_k in enumerate(mix(x, train))
    ]  # fmt: skip
    return jnp.stack(towers, axis=-2)

  def _shared(self, x, train):
    return [self._expert(x, train, 'bottom')] * self.labels

  def _mmoe(self, x, train):
    values = self._experts(x, train, self.experts, 'expert')
    return [self._gated(x, values, f'gate_{k}') for k in range(self.labels)]

  def _ple(self, x, train):
    own, shared = [x] * self.labels, x
    for level in range(self.levels):
      of_labels = [
        self._experts(x_k, train, self.label_experts, f'expert_{level}_{k}')
        for k, x_k in enumerate(own)
      ]
      common = self._experts(shared, train, self.experts, f'expert_{level}_shared')
      own = [
        self._gated(x_k, values + common, f'gate_{level}_{k}')
        for k, (x_k, values) in enumerate(zip(own, of_labels, strict=True))
      ]
      if level < self.levels - 1:
        shared = self._gated(shared, sum(of_labels, []) + common, f'gate_{level}_shared')
    return own

  def _experts(self, x, train, count, name) -> list[Array]:
    return [self._expert(x, train, f'{name}_{i}') for i in range(count)]

  def _expert(self, x, train, name):
    return MLP(self.hidden, dropout=self.dropout, dtype=self.dtype, name=name)(x, train)

  def _gated(self, x, values: Sequence[Array], name: str) -> Array:
    """The mean of the experts' values with the weights of a gate of x."""
    gate = nn.softmax(nn.Dense(len(values), use_bias=False, dtype=jnp.float32, name=name)(x))
    stacked = jnp.stack(values, axis=-2).astype(jnp.float32)
    return jnp.einsum('...i,...ih->...h', gate, stacked).astype(self.dtype)
