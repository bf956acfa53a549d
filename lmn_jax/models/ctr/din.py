"""DIN: the history weighted by its relevance to the target (Zhou et al. 2018, section 4.3)."""

from lmn_jax.layers.target_attention import TargetAttention
from lmn_jax.models.ctr.base import CTRModel, Encoded


class DIN(CTRModel):
  """`encode = sum_l mask_l a(e_i, s_l) s_l`, `a` the local activation unit.

  Attributes:
    attention: hidden width of the activation unit.
    softmax: normalise the weights over the history (the paper does not).
  """

  attention: int = 32
  softmax: bool = False
  positive_fields = ('attention',)

  def encode(self, x, batch, read, train):
    gate = 'softmax' if self.softmax else 'none'
    unit = TargetAttention(self.attention, gate=gate, dtype=self.dtype, name='attention')
    return Encoded(unit(x.i_BQI, x.s_BLI, x.mask_BL)[0])
