"""Programs are compiled once: later processes load them, and a useless folder does no harm."""

import logging
import os

import filelock
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from lmn_jax import Experiment
from lmn_jax.distributed import compilation_cache
from lmn_jax.errors import UserError
from tests.runs import lines, tiny_config


@pytest.fixture
def unset(monkeypatch):
  """The state of a process that has set no cache yet; every program is stored."""
  monkeypatch.setitem(compilation_cache.OPTIONS, 'jax_persistent_cache_min_compile_time_secs', 0)
  names = ('jax_compilation_cache_dir', *compilation_cache.OPTIONS)
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update('jax_compilation_cache_dir', None)
  jax_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  jax_cache.reset_cache()


@pytest.fixture
def hits():
  """The number of programs loaded from the cache, as a list of one."""
  count = [0]

  def listen(event, **_):
    count[0] += event == '/jax/compilation_cache/cache_hits'

  jax.monitoring.register_event_listener(listen)
  yield count
  jax.monitoring.unregister_event_listener(listen)


def compile_anew(number=2.0):
  """Compiles a function as a new process would; returns its result."""
  jax.clear_caches()
  return jax.jit(lambda x: jnp.sin(x) * number)(jnp.arange(3.0)).tolist()


def programs(folder):
  return sorted(path.name for path in folder.glob('*-cache'))


def test_a_program_is_stored_and_loaded(unset, hits, tmp_path):
  folder = tmp_path / 'stores' / '.compiled'
  compilation_cache.enable(folder)
  first, stored, before = compile_anew(), programs(folder), hits[0]
  jax_cache.reset_cache()
  assert compile_anew() == first
  assert stored and programs(folder) == stored and hits[0] > before
  compilation_cache.enable(tmp_path / 'other')  # the first folder of a process counts
  assert not (tmp_path / 'other').exists()


def test_the_least_recently_used_are_removed(unset, monkeypatch, tmp_path):
  compilation_cache.enable(tmp_path / 'all')
  compile_anew(2.0)
  sizes = [path.stat().st_size for path in (tmp_path / 'all').glob('*lambda*-cache')]
  jax.config.update('jax_compilation_cache_dir', None)
  jax_cache.reset_cache()
  monkeypatch.setitem(
    compilation_cache.OPTIONS, 'jax_compilation_cache_max_size', int(2.5 * max(sizes))
  )
  compilation_cache.enable(tmp_path / 'some')
  for number in range(6):
    compile_anew(number + 0.5)
  assert 1 <= len(programs(tmp_path / 'some')) <= 3


def test_what_a_killed_process_left_is_removed(unset, hits, caplog, tmp_path):
  compilation_cache.enable(tmp_path)
  first = compile_anew()
  half = next(tmp_path.glob('*lambda*-cache'))
  half.write_bytes(half.read_bytes()[:100])
  half.with_name(half.name.replace('-cache', '-atime')).unlink()
  jax.config.update('jax_compilation_cache_dir', None)
  jax_cache.reset_cache()
  compilation_cache.enable(tmp_path)
  assert compile_anew() == first and half.stat().st_size > 100 and not caplog.records


def test_a_folder_that_cannot_be_used(unset, caplog, monkeypatch, tmp_path):
  (tmp_path / 'file').touch()
  compilation_cache.enable(tmp_path / 'file' / '.compiled')
  monkeypatch.setattr(compilation_cache, 'LOCK_S', 0.1)
  (tmp_path / 'held').mkdir()
  with filelock.FileLock(tmp_path / 'held' / '.lockfile'):
    compilation_cache.enable(tmp_path / 'held')
  warnings = [record.getMessage() for record in caplog.records]
  assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
  assert all('\n' not in line and '--compilation_cache=off none' in line for line in warnings)
  assert f'{tmp_path}/file' in warnings[0] and 'Not a directory' in warnings[0]
  assert jax.config.jax_compilation_cache_dir is None
  assert compile_anew()


def test_settings_of_the_user_stay(unset, monkeypatch, tmp_path):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_MAX_SIZE', '12345')
  jax.config.update('jax_compilation_cache_max_size', 12345)
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'own'))
  compilation_cache.enable(tmp_path / 'stores')
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'own')
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.enable(tmp_path / 'stores')
  assert jax.config.jax_compilation_cache_max_size == 12345
  assert jax.config.jax_compilation_cache_dir == os.path.realpath(tmp_path / 'stores')


def test_the_folder_of_an_experiment(tmp_path):
  def folder_of(**arguments):
    return Experiment('lmn_douyin', workdir=tmp_path / 'run', **arguments).compilation_cache

  assert folder_of() == tmp_path / 'stores' / '.compiled'
  assert folder_of(compilation_cache=tmp_path) == tmp_path
  assert folder_of(compilation_cache='off') is None
  with pytest.raises(UserError, match="compilation_cache='' is empty"):
    folder_of(compilation_cache='')


@pytest.mark.slow
def test_loaded_programs_train_the_same_bits(unset, hits, caplog, tmp_path):
  """The second run computes with programs that were compiled for the first one."""
  fields = dict(steps=4, eval_every=4, save_every=4)
  runs = []
  for name in ('first', 'second'):
    workdir, before = tmp_path / name, hits[0]
    jax.clear_caches()
    report = Experiment(tiny_config('lmn'), workdir=workdir, **fields).train()
    runs.append((report['test'], lines(workdir)))
    jax_cache.reset_cache()
  assert runs[0] == runs[1]
  assert hits[0] - before >= 4  # init, update, finite, predict
  assert 'jit_update' in ''.join(programs(tmp_path / 'stores' / '.compiled'))
  assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
