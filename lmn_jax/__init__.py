"""lmn_jax: memory-augmented recommendation over long behaviour histories, in JAX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from lmn_jax.experiment import Experiment

__version__ = '0.1.0'
__all__ = ['Experiment']


def __getattr__(name: str):
  # Imported when it is used: the command line answers a mistake before JAX is loaded.
  if name == 'Experiment':
    from lmn_jax.experiment import Experiment

    return Experiment
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
