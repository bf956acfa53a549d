"""The bytes of exported functions."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import lmn_jax
from lmn_jax.distributed import block_sizes
from lmn_jax.export import functions
from lmn_jax.export.runtime.platforms import PLATFORMS
from tests.examples import SCHEMA, make_batch
from tests.runs import tiny_config, untrained

MODEL = """
import jax.numpy as jnp
from lmn_jax.layers.basic import repeat
from lmn_jax.models.ctr.base import CTRModel, Encoded


class Last(CTRModel):
  def encode(self, x, batch, read, train):
    return Encoded(repeat(jnp.tanh(x.s_BLI[:, -1]), x.i_BQI.shape[1]))
"""


def model_at(path, source):
  path.parent.mkdir(parents=True)
  path.write_text(source)
  spec = importlib.util.spec_from_file_location('model_file', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.Last(SCHEMA, width=4, hidden=(8,))


def test_a_function_has_the_same_bytes_wherever_its_code_is(tmp_path):
  """The bytes contain neither paths nor line numbers."""
  batch = {key: x for key, x in make_batch().items() if key not in ('label', 'weight', 'total')}
  written = []
  for path, source in (
    (tmp_path / 'a/one.py', MODEL),
    (tmp_path / 'far/away/x.py', '\n\n' + MODEL),
  ):
    model = model_at(path, source)
    tables = {
      name: {'rows': jax.ShapeDtypeStruct((spec.rows, spec.width), np.float32)}
      for name, spec in model.tables().items()
    }

    def init(key, batch, model=model):
      return model.init(key, batch, lambda name, ids: jnp.zeros((*ids.shape, model.width)))

    variables = jax.eval_shape(init, jax.random.key(0), batch)
    dense = traverse_util.flatten_dict(variables, sep='/')
    exported, _ = functions.click_functions(model, dense, tables, batch)
    before = jax.config.jax_traceback_in_locations_limit
    # Lowered before with the tracebacks of its operations, as in training.
    jax.jit(exported['score'].fn).trace(*concrete(exported['score'].shapes)).lower()
    written.append(functions.serialized(exported['score']))
    assert jax.config.jax_traceback_in_locations_limit == before
  assert written[0] == written[1]
  assert b'.py' not in written[0]


def test_each_platform_has_its_own_sizes():
  function = functions.Function(
    lambda x: x + block_sizes.sizes().unit_floats, (jax.ShapeDtypeStruct((), jnp.int32),)
  )
  exported = jax.export.deserialize(bytearray(functions.serialized(function)))
  assert exported.platforms == PLATFORMS
  for sizes in block_sizes.SIZES.values():
    assert f'dense<{sizes.unit_floats}>' in exported.mlir_module()
  assert exported.call(jnp.int32(0)) == block_sizes.CPU.unit_floats


def concrete(shapes):
  """Returns the shapes with 2 in place of each symbol."""

  def shape(x):
    return jax.ShapeDtypeStruct([n if isinstance(n, int) else 2 for n in x.shape], x.dtype)

  return jax.tree.map(shape, shapes)


EXPORT = """
import sys
from pathlib import Path
from lmn_jax.data import prepare
from lmn_jax.distributed import mesh as meshes
from lmn_jax.export import export
from tests.runs import mesh_of, tiny_config
meshes.make_mesh = lambda *_: mesh_of(1)
config, folder = tiny_config('lmn'), Path(sys.argv[1])
store = prepare.prepare(config.data, folder / 'stores')
report = export.export(config, folder / 'run', store, Path(sys.argv[2]), 'int8')
print(report['folder'].removeprefix(sys.argv[3]))
"""


@pytest.mark.slow
def test_exports_of_a_checkpoint_from_two_folders_have_one_fingerprint(tmp_path):
  untrained(tiny_config('lmn'), tmp_path)
  root, names = Path(lmn_jax.__file__).parents[1], []
  for name in ('here', 'a/folder/elsewhere'):
    for package in ('lmn_jax', 'tests'):
      shutil.copytree(root / package, tmp_path / name / package)
    to = tmp_path / f'export-{len(names)}'
    ran = subprocess.run(
      [sys.executable, '-c', EXPORT, str(tmp_path), str(to), to.name],
      capture_output=True, text=True, cwd=tmp_path / name,
      env=os.environ | {'PYTHONPATH': str(tmp_path / name), 'JAX_PLATFORMS': 'cpu'},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    names.append(ran.stdout.split()[-1])
  assert names[0] == names[1]
