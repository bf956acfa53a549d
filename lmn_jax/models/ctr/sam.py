"""SAM: the target attends to the history in passes; each pass has the memory of earlier passes.

Lin et al., Sparse Attentive Memory Network for Click-through Rate Prediction with Long Sequences,
CIKM 2022. Only the abstract of the paper is public: [code] marks what is from the released code of
the authors, [ours] our choices.
"""

import flax.linen as nn
import jax.numpy as jnp

from lmn_jax.errors import one_of
from lmn_jax.layers.basic import Inputs
from lmn_jax.layers.target_attention import TargetAttention
from lmn_jax.models.ctr.base import CTRModel, Encoded

PASSES = {'2P': 2, '3P': 3, '3P+': 3}
FEEDBACKS = ('iter', 'stk')
MAP = 16  # width of the features of an attention map [code]
HOPS = 3  # of memory enhancement [code]
UNIT = nn.initializers.normal(1.0)


class SAM(CTRModel):
  """P passes over the history: O(L) operations in a number of steps independent of L. [paper]

      m_0 = q, the target
      w_j = mask_j sigmoid(w2_t . sigmoid(W1_t x_j + b1_t) + b2_t)           pass t = 1..P [code]
      x_j = [q - v_j ; q * v_j ; m_{t-1} - v_j ; m_{t-1} * v_j]              no softmax [code]
      p_t = sum_j w_j v_j
      m_t = GRU(p_t, m_{t-1})                                      one cell for all passes [code]
      g_t = relu(Wg_t w / sqrt(L) + b_t) in R^16                   the weights as features [code]
      2P, 3P: encode = BatchNorm([g_1 ; m_1 ; ... ; g_P ; m_P])                            [code]
      3P+:    e_0 = m_P,  e_k = GRU2([A_k e_{k-1} + c_k ; q], e_{k-1}),  k = 1..3
              encode = [g_P ; e_3]                                                         [code]

  g_t has a weight for each position, oldest event first, so a trained SAM accepts only histories of
  the length of its training. [ours: the order]

  The entries of Wg_t start with standard deviation 1; with the factor 1 / sqrt(L), g_t starts with
  the scale of a plain Dense layer. A step of Adam, which moves every entry, then changes g_t by an
  amount proportional to sqrt(L) instead of L. Without the factor, over 10,000 events the moving
  statistics of the norm lag behind, and scores are not calibrated. [ours: 1 / sqrt(L)] The moving
  statistics cover about ten steps (momentum 0.9): with those of a hundred steps, evaluation lags
  behind training. [ours: constants of the norm] The GRU resets after the product, as in cuDNN.
  [ours: GRU]

  Attributes:
    variant: '2P', '3P' or '3P+'.
    feedback: 'iter' uses m_{t-1} in x_j, as in the paper; 'stk' uses q instead of m_{t-1} in every
      x_j, the default of the released code. The state of the GRU is updated in both. [ours: our
      reading of stk, which the paper does not describe]
    attention: width of the hidden layer of a pass.
  """

  variant: str = '3P'
  feedback: str = 'iter'
  attention: int = 8
  positive_fields = ('attention',)
  has_time_bias = True
  any_length = False  # Wg_t has a weight for each position

  def check(self):
    super().check()
    one_of('config.model.variant', self.variant, PASSES)
    one_of('config.model.feedback', self.feedback, FEEDBACKS)

  def encode(self, x: Inputs, batch, read, train):
    q_BQI, P = x.i_BQI, PASSES[self.variant]
    D = q_BQI.shape[-1]
    # It differs from recurrent.gru_cell: the reset gate multiplies m U_n + b_n, with a bias b_n.
    cell = nn.GRUCell(D, dtype=self.dtype, name='gru')
    m_BQI, s_BLI, features = q_BQI, x.s_BLI, []
    bias_BL = self.time_bias(batch)  # of all passes
    for t in range(1, P + 1):
      unit = TargetAttention(self.attention, gate='sigmoid', dtype=self.dtype, name=f'pass_{t}')
      second_BQI = m_BQI if self.feedback == 'iter' else q_BQI
      p_BQI, w_BLQ, s_BLI = unit(q_BQI, s_BLI, x.mask_BL, second_BQI, bias_BL)
      m_BQI, _ = cell(m_BQI, p_BQI)
      if self.variant == '3P+' and t < P:
        continue  # only the last map is a feature
      w_BQL = w_BLQ.swapaxes(1, 2) / w_BLQ.shape[1] ** 0.5
      g_BQF = nn.relu(nn.Dense(MAP, dtype=self.dtype, kernel_init=UNIT, name=f'map_{t}')(w_BQL))
      features += [g_BQF, m_BQI]
    if self.variant == '3P+':
      return Encoded(jnp.concatenate([g_BQF, self._enhance(m_BQI, q_BQI)], axis=-1))
    # The statistics are float32 for every compute type, and without the padding of requests.
    o_BQE = jnp.concatenate(features, axis=-1).astype(jnp.float32)
    real_BQ1 = None if x.real_BQ is None else x.real_BQ[:, :, None]
    norm = nn.BatchNorm(not train, momentum=0.9, name='norm')
    return Encoded(norm(o_BQE, mask=real_BQ1).astype(self.dtype))

  def _enhance(self, e_BQI, q_BQI):
    """Returns e_3 from e_0, the memory enhancement of 3P+."""
    D = q_BQI.shape[-1]
    cell = nn.GRUCell(D, dtype=self.dtype, name='enhance')
    for k in range(1, HOPS + 1):
      hop_BQI = nn.Dense(D, dtype=self.dtype, name=f'hop_{k}')(e_BQI)
      e_BQI, _ = cell(e_BQI, jnp.concatenate([hop_BQI, q_BQI], axis=-1))
    return e_BQI
