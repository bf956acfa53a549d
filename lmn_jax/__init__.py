"""Trains and serves memory-augmented recommenders over long behaviour histories, in JAX.

In: a log of interactions. Out: trained models, their answers, and exports to serve.
Read first: training/loop.py, how a model is trained; config.py, every field of a config.
"""

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
