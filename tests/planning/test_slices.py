"""Slices by name, and the devices that the TPU compiler gives for them."""

import importlib.util
import math

import jax
import pytest

from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.planning import slices


@pytest.mark.parametrize(
  'topology, message',
  [
    ('', '--mode=plan needs a TPU slice; for example --topology=v5e:16x16'),
    (
      'v5e:16x61',
      "--topology='v5e:16x61' is unknown; did you mean 'v5e:16x16'? available: v4:2x2x1",
    ),
    ('v5:16x16', "--topology='v5:16x16' is unknown; did you mean 'v5e:16x16'?"),
    (
      'H100:8',
      "--topology='H100:8': only TPU slices are planned, such as v5e:16x16; on a GPU run "
      'experiments/accelerator.py',
    ),
    ('gpu', "--topology='gpu': only TPU slices are planned"),
  ],
)
def test_an_unknown_slice(topology, message):
  with pytest.raises(UserError) as caught:
    slices.slice_of(topology)
  assert str(caught.value).startswith(message)


def test_without_the_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError) as caught:
    slices.slice_of('v5e:16x16')
  assert str(caught.value) == (
    '--mode=plan needs the TPU compiler, libtpu, which is not installed; '
    f'pip install "jax[tpu]=={jax.__version__}"'
  )


@pytest.mark.parametrize('topology', ['v4:2x2x2', 'v5e:1x1', 'v5e:16x16', 'v5p:4x4x4', 'v6e:2x4'])
def test_a_slice_has_one_device_for_each_chip(topology):
  pytest.importorskip('libtpu')
  devices = slices.slice_of(topology)
  assert len(devices) == math.prod(map(int, topology.split(':')[1].split('x')))
  assert {device.platform for device in devices} == {'tpu'}
  assert jax.default_backend() == 'cpu'
  mesh = meshes.make_mesh(1, devices)
  assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}


def test_the_compiler_knows_every_listed_slice():
  pytest.importorskip('libtpu')
  for name, chip in slices.CHIPS.items():
    for shape in chip.slices.split():
      assert slices.slice_of(f'{name}:{shape}')
