"""The click models of one history by their name in a config; `histories` has them as encoders."""

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

ENCODERS: dict[str, type[CTRModel]] = {
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
