"""The mesh holds all devices, and a batch is sharded over its data axis."""

import jax
import numpy as np
import pytest

from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError


@pytest.mark.parametrize('model', [1, 2, 8])
def test_the_mesh_holds_all_devices(model):
  mesh = meshes.make_mesh(model)
  assert dict(mesh.shape) == {'data': 8 // model, 'model': model}
  assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}


def test_the_mesh_holds_chosen_devices():
  mesh = meshes.make_mesh(2, jax.devices()[2:6])
  assert dict(mesh.shape) == {'data': 2, 'model': 2}
  assert {device.id for device in mesh.devices.flat} == {2, 3, 4, 5}
  with pytest.raises(UserError, match='the number of devices, 4; use 1 or 2 or 4'):
    meshes.make_mesh(3, jax.devices()[2:6])


@pytest.mark.parametrize('model', [0, 3, 16, -1])
def test_a_model_axis_that_does_not_divide_the_devices_is_refused(model):
  message = (
    f'config.mesh.model={model} does not divide the number of devices, 8; use 1 or 2 or 4 or 8'
  )
  with pytest.raises(UserError, match=message):
    meshes.make_mesh(model)


def test_a_batch_is_sharded_over_the_data_axis():
  batch = {'item': np.arange(16, dtype=np.int32), 'history': np.zeros((16, 3), np.int32)}
  placed = meshes.place(meshes.make_mesh(2), batch)
  for name, array in placed.items():
    np.testing.assert_array_equal(array, batch[name])
    for shard in array.addressable_shards:
      assert shard.data.shape[0] == 4
      np.testing.assert_array_equal(shard.data, batch[name][shard.index])
  starts = {shard.device: shard.index[0].start or 0 for shard in placed['item'].addressable_shards}
  assert sorted(starts.values()) == [0, 0, 4, 4, 8, 8, 12, 12]  # each twice, along the model axis


def test_a_single_host_reads_the_whole_batch():
  for model in (1, 4, 8):
    np.testing.assert_array_equal(meshes.share(meshes.make_mesh(model), 16), np.arange(16))


def test_the_platform_is_that_of_the_devices_of_the_mesh():
  seen = []

  def trace(x):
    seen.append(meshes.platform())
    return x

  assert meshes.platform() == 'cpu'  # without a mesh
  mesh = meshes.make_mesh(2)
  with meshes.use_mesh(mesh):
    jax.eval_shape(meshes.each_device(trace, meshes.BATCH, meshes.BATCH), np.zeros(8, np.float32))
  with meshes.use_platform('tpu'):
    jax.eval_shape(trace, np.zeros(8, np.float32))
  with meshes.use_platform('cuda'):
    assert meshes.platform() == 'gpu'
  assert seen == ['cpu', 'tpu'] and meshes.platform() == 'cpu'


@pytest.mark.parametrize(
  'error, cause',
  [
    (RuntimeError("Unable to initialize 'foo' (set JAX_PLATFORMS)\nmore"), "Unable .* 'foo'"),
    (AssertionError(), 'JAX finds no device'),
  ],
)
def test_a_platform_that_jax_does_not_have_is_one_line(monkeypatch, error, cause):
  def devices():
    raise error

  monkeypatch.setattr(jax, 'devices', devices)
  message = rf"^JAX_PLATFORMS='?[a-z]*'?: {cause}; set it to cpu, or install JAX for .*"
  with pytest.raises(UserError, match=message) as raised:
    meshes.make_mesh()
  assert '\n' not in str(raised.value)


def test_an_unknown_platform_is_refused():
  message = "JAX runs on the platform 'metal'; lmn_jax runs on cpu, gpu, tpu; set JAX_PLATFORMS=cpu"
  with meshes.use_platform('metal'), pytest.raises(UserError, match=message):
    meshes.platform()
