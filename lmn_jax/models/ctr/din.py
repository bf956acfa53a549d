"""DIN: the history, weighted by its relevance to the target.

Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018.
"""

from lmn_jax.layers.target_attention import TargetAttention
from lmn_jax.models.ctr.base import CTRModel, Encoded


class DIN(CTRModel):
  """A sum of the behaviours with weights of a local activation unit (section 4.3).

      encode = sum_l mask_l a(e_i, s_l) s_l          a: target_attention.TargetAttention

  Attributes:
    attention: hidden width of the activation unit.
    softmax: whether to normalise the weights over the history; the paper does not. [ours]
  """

  attention: int = 32
  softmax: bool = False
  positive_fields = ('attention',)
  has_time_bias = True

  def encode(self, x, batch, read, train):
    gate = 'softmax' if self.softmax else 'none'
    unit = TargetAttention(self.attention, gate=gate, dtype=self.dtype, name='attention')
    return Encoded(unit(x.i_BQI, x.s_BLI, x.mask_BL, bias_BL=self.time_bias(batch))[0])
