"""SAM: the target reads the history in passes, each with what the ones before it found.

Sparse Attentive Memory (Lin et al., CIKM 2022). The paper is public as an abstract: what is marked
[code] was read in the authors' released code, what is marked [ours] is our choice.
"""

import flax.linen as nn
import jax.numpy as jnp

from lmn_jax.errors import one_of
from lmn_jax.layers.basic import Inputs
from lmn_jax.layers.target_attention import TargetAttention
from lmn_jax.models.ctr.base import CTRModel, Encoded

PASSES = {'2P': 2, '3P': 3, '3P+': 3}
FEEDBACKS = ('iter', 'stk')
MAP = 16  # width of an attention map's features [code]
HOPS = 3  # of memory enhancement [code]
UNIT = nn.initializers.normal(1.0)


class SAM(CTRModel):
  """P passes over the history: O(L) work, and a number of steps that does not grow with L. [paper]

      m_0 = q, the target
      w_j = mask_j sigmoid(w2_t . sigmoid(W1_t x_j + b1_t) + b2_t)           pass t = 1..P [code]
      x_j = [q - v_j ; q * v_j ; m_{t-1} - v_j ; m_{t-1} * v_j]              no softmax [code]
      p_t = sum_j w_j v_j
      m_t = GRU(p_t, m_{t-1})                                      one cell for all passes [code]
      g_t = relu(Wg_t w / sqrt(L) + b_t) in R^16                   the weights as features [code]
      2P, 3P: encode = BatchNorm([g_1 ; m_1 ; ... ; g_P ; m_P])                            [code]
      3P+:    e_0 = m_P,  e_k = GRU2([A_k e_{k-1} + c_k ; q], e_{k-1}),  k = 1..3
              encode = [g_P ; e_3]                                                         [code]

  g_t has a weight for each position, oldest event first: a trained SAM takes histories of the
  length it was trained with. Wg_t begins with entries of deviation 1, so that with 1 / sqrt(L) g_t
  begins as that of a plain Dense; but one step of Adam, which moves every entry, moves it by what
  grows with sqrt(L) and not with L. Over 10,000 events the norm's statistics lag behind a plain
  Dense: scores are no probabilities then. [ours: 1 / sqrt(L)] The statistics are those of the last
  ten steps or so (momentum 0.9), for with those of a hundred a model that has just learnt something
  is scored as if it had not. The GRU resets after the product, as cuDNN's. [ours: order, GRU,
  constants of the norm]

  Attributes:
    variant: '2P', '3P' or '3P+'.
    feedback: 'iter' asks again with m_{t-1}, as the paper says; 'stk' has q for m_{t-1} in every
      x_j, as the released code has unless told otherwise. The GRU's state moves on in both. [ours:
      so we read stk, which the paper does not describe]
    attention: width of the hidden layer of a pass.
  """

  variant: str = '3P'
  feedback: str = 'iter'
  attention: int = 8
  positive_fields = ('attention',)
  any_length = False  # each position has a weight of its own

  def check(self):
    super().check()
    one_of('config.model.variant', self.variant, PASSES)
    one_of('config.model.feedback', self.feedback, FEEDBACKS)

  def encode(self, x: Inputs, batch, read, train):
    q_BQI, P = x.i_BQI, PASSES[self.variant]
    D = q_BQI.shape[-1]
    # Unlike recurrent.gru_cell, with a bias in the product that the reset gate multiplies. [ours]
    cell = nn.GRUCell(D, dtype=self.dtype, name='gru')
    m_BQI, s_BLI, features = q_BQI, x.s_BLI, []
    for t in range(1, P + 1):
      unit = TargetAttention(self.attention, gate='sigmoid', dtype=self.dtype, name=f'pass_{t}')
      second_BQI = m_BQI if self.feedback == 'iter' else q_BQI
      p_BQI, w_BLQ, s_BLI = unit(q_BQI, s_BLI, x.mask_BL, second_BQI)
      m_BQI, _ = cell(m_BQI, p_BQI)
      if self.variant == '3P+' and t < P:
        continue  # only the last map is a feature
      w_BQL = w_BLQ.swapaxes(1, 2) / w_BLQ.shape[1] ** 0.5
      g_BQF = nn.relu(nn.Dense(MAP, dtype=self.dtype, kernel_init=UNIT, name=f'map_{t}')(w_BQL))
      features += [g_BQF, m_BQI]
    if self.variant == '3P+':
      return Encoded(jnp.concatenate([g_BQF, self._enhance(m_BQI, q_BQI)], axis=-1))
    # Statistics are of float32, whatever the passes compute in.
    o_BQE = jnp.concatenate(features, axis=-1).astype(jnp.float32)
    return Encoded(nn.BatchNorm(not train, momentum=0.9, name='norm')(o_BQE).astype(self.dtype))

  def _enhance(self, e_BQI, q_BQI):
    """e_3 of e_0, the memory enhancement of 3P+."""
    D = q_BQI.shape[-1]
    cell = nn.GRUCell(D, dtype=self.dtype, name='enhance')
    for k in range(1, HOPS + 1):
      asked_BQI = nn.Dense(D, dtype=self.dtype, name=f'hop_{k}')(e_BQI)
      e_BQI, _ = cell(e_BQI, jnp.concatenate([asked_BQI, q_BQI], axis=-1))
    return e_BQI
