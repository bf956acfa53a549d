"""What every test runs under: eight simulated devices, no silent promotion of rank or dtype."""

import gc
import os
import shutil
import signal
import tempfile

import jax
import pytest
from hypothesis import settings
from jax.experimental.compilation_cache import compilation_cache

from lmn_jax.data import prepare
from tests import runs

# Before the first device is asked for; afterwards it is too late.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
# Small programs run once: compiling them fast matters more than running them fast.
jax.config.update('jax_disable_most_optimizations', True)
# XLA's older kernels for CPU compile in two thirds of the time, and programs that are not split in
# parts for many cores in nine tenths; JAX 0.11 ends at the first flag. Programs that tests start
# have them too; the headline of .ci/run is compiled as a user's.
if jax.__version_info__ < (0, 11):
  flags = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'
# What one test has compiled the others take from a folder of this session: those of the other
# worker of xdist, and the hosts that test_processes.py starts. Other programs that tests start do
# without it, and so do the tests with the fixture `uncached`.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  os.environ['LMN_TEST_COMPILED'] = tempfile.mkdtemp(prefix='lmn_jax_compiled_')
for name, value in runs.compiled_in(os.environ['LMN_TEST_COMPILED']).items():
  jax.config.update(name, value)


def pytest_collection_finish():
  """The collector looks at millions of objects of the libraries after a few thousand new ones, as
  tracing makes them: a tenth of all the time."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 50)


def pytest_unconfigure():
  if 'PYTEST_XDIST_WORKER' not in os.environ:
    shutil.rmtree(os.environ['LMN_TEST_COMPILED'])


# A first call compiles, and the machine may be shared: no deadline. The same examples each time.
settings.register_profile('lmn_jax', deadline=None, derandomize=True, max_examples=50)
settings.load_profile('lmn_jax')


@pytest.fixture(scope='session')
def tiny_store(tmp_path_factory):
  """The prepared store of `runs.tiny_config`."""
  return prepare.prepare(runs.tiny_config().data, tmp_path_factory.mktemp('stores'))


@pytest.fixture
def uncached():
  """What is compiled is compiled here and now, for tests that read what the compiler made."""
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()
  yield
  jax.config.update('jax_enable_compilation_cache', True)
  compilation_cache.reset_cache()


@pytest.fixture
def hears_ctrl_c():
  """What a shell starts in the background ignores Ctrl-C, and so does all that it starts."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)
