"""The settings of all tests: eight simulated devices, no silent promotion of rank or dtype."""

import collections
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

# These must be set before JAX creates its devices.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
# Small programs run once: compiling them fast matters more than running them fast.
jax.config.update('jax_disable_most_optimizations', True)
# XLA's older kernels for CPUs take two thirds of the time to compile; programs that are not split
# for many cores take nine tenths. On a busy machine eight simulated devices may wait for each other
# for longer than the 40 seconds after which XLA aborts the process. JAX 0.11 does not accept the
# first flag. Programs that tests start get the flags too; the headline run of .ci/run does not.
if jax.__version_info__ < (0, 11):
  flags = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
  flags += ' --xla_cpu_collective_call_terminate_timeout_seconds=600'
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'
# Compiled programs are cached in a folder of this session. The workers of xdist and the hosts that
# test_processes.py starts share it; other programs that tests start, and tests with the fixture
# `uncached`, do not use it.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  os.environ['LMN_TEST_COMPILED'] = tempfile.mkdtemp(prefix='lmn_jax_compiled_')
for name, value in runs.compiled_in(os.environ['LMN_TEST_COMPILED']).items():
  jax.config.update(name, value)


@pytest.hookimpl(tryfirst=True)  # before the selection by marks
def pytest_collection_modifyitems(items):
  """Of the cases of a parametrised test, the first and the last are fast, the others slow tests."""
  cases = collections.defaultdict(list)
  for item in items:
    if not item.get_closest_marker('slow'):
      cases[item.nodeid.partition('[')[0]].append(item)
  for between in cases.values():
    for item in between[1:-1]:
      item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
  """Makes garbage collection rarer: tracing creates so many objects that it takes a tenth of the
  time, mostly for the millions of objects of the imported libraries."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 50)


def pytest_unconfigure():
  if 'PYTEST_XDIST_WORKER' not in os.environ:
    shutil.rmtree(os.environ['LMN_TEST_COMPILED'])


# No deadline: a first call compiles, and the machine may be shared. The same examples each time.
settings.register_profile('lmn_jax', deadline=None, derandomize=True, max_examples=50)
settings.load_profile('lmn_jax')


# JAX keeps a compiled program with its function, and a program is some thirty pieces of memory.
# Linux allows a process 65,530 pieces (vm.max_map_count); beyond that XLA ends with a segmentation
# fault. Without this the tests of one worker have more.
PROGRAMS = 1000
compiled = 0


def count_programs(event, seconds, **_):
  global compiled
  compiled += event.endswith('backend_compile_duration')


jax.monitoring.register_event_duration_secs_listener(count_programs)


def pytest_runtest_teardown():
  """Frees all programs after a thousand; the cache on the disk still has them."""
  global compiled
  if compiled > PROGRAMS:
    jax.clear_caches()
    compiled = 0


@pytest.fixture(scope='session')
def tiny_store(tmp_path_factory):
  """Returns the prepared store of `runs.tiny_config`."""
  return prepare.prepare(runs.tiny_config().data, tmp_path_factory.mktemp('stores'))


@pytest.fixture
def uncached():
  """Disables the compilation cache, for tests that read the output of the compiler."""
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()
  yield
  jax.config.update('jax_enable_compilation_cache', True)
  compilation_cache.reset_cache()


@pytest.fixture
def hears_ctrl_c():
  """Restores the handler of Ctrl-C: processes that a shell starts in the background ignore it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)
