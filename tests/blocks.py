"""Sizes of blocks for tests: those of another platform, or small ones, on the CPU of the tests."""

import pytest

from lmn_jax.distributed import block_sizes
from lmn_jax.distributed import mesh as meshes


def set_sizes(monkeypatch: pytest.MonkeyPatch, platform: str = 'cpu', **sizes: int) -> None:
  """Makes functions that are traced from now on compute as on `platform`, but with `sizes`."""
  changed = block_sizes.SIZES[platform]._replace(**sizes)
  monkeypatch.setitem(block_sizes.SIZES, platform, changed)
  monkeypatch.setattr(meshes, 'platform', lambda: platform)
