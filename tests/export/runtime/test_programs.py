"""The device that answers: arrays are moved to it once, batches are as it likes them."""

import tarfile

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.export.runtime.manifest import FolderError
from lmn_jax.export.runtime.padding import pieces
from lmn_jax.export.runtime.platforms import JOINING, PLATFORMS
from lmn_jax.export.runtime.programs import PlatformError, Programs, device_of, platform_of
from lmn_jax.planning import slices
from tests.export.runtime.test_bundle import OLD_EXPORTS
from tests.runs import compilations

SIZES = dict(batch_sizes=(1, 4), candidate_sizes=(8, 16))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """The folder of two exports: `clicks` of LMN, `nexts` of DMAN."""
  folder = tmp_path_factory.mktemp('exports')
  with tarfile.open(OLD_EXPORTS) as archive:
    archive.extractall(folder, filter='data')
  return folder


def record_calls(bundle):
  """Returns a list that gets (name, arguments) of every call of a program."""
  calls = []

  def recorded(name, function):
    def call(*arguments):
      calls.append((name, arguments))
      return function(*arguments)

    return call

  functions = bundle._programs._functions
  functions.update({name: recorded(name, function) for name, function in functions.items()})
  return calls


def requests(bundle, users):
  items = [bundle.ids('item').raw(1 + k % bundle.items) for k in range(5)]
  return [bundle.ask(f'user {k}', items, items[: k + 1]) for k in range(users)]


def test_a_platform_that_jax_does_not_have():
  assert platform_of(device_of()) == platform_of(device_of('cpu')) == 'cpu'
  with pytest.raises(PlatformError, match="^JAX sees no device of the platform 'cuda', but cpu; "):
    device_of('cuda')


def test_functions_for_other_platforms_are_refused(tmp_path):
  function = jax.jit(lambda dense, x: dense['w'] * x)
  exported = jax.export.export(function, platforms=('cuda', 'tpu'))({'w': jnp.ones(3)}, jnp.ones(3))
  (tmp_path / 'functions').mkdir()
  (tmp_path / 'functions/score.jax').write_bytes(exported.serialize())
  np.savez(tmp_path / 'dense.npz', w=np.ones(3, np.float32))
  message = "score.jax is for cuda, tpu, and the device is of the platform 'cpu'; use another"
  with pytest.raises(FolderError, match=message):
    Programs(tmp_path, {'tables': {}}, ['score'], None, device_of('cpu'))


@pytest.mark.parametrize('name', ['clicks', 'nexts'])
def test_tables_are_on_the_device_and_requests_send_little(folder, name):
  bundle = Bundle(folder / name, **SIZES, platform='cpu')
  programs = bundle._programs
  placed = jax.tree.leaves((programs.dense, programs.tables))
  assert all(x.committed and x.devices() == {bundle.device} for x in placed)
  rows = np.load(folder / name / 'tables/item.npy', mmap_mode='r')
  # On CPU the rows are not copied: changes of the file would be seen.
  on_cpu = programs.place(rows)
  assert on_cpu.unsafe_buffer_pointer() == rows.ctypes.data or rows.ctypes.data % 64
  calls = record_calls(bundle)
  bundle.score(requests(bundle, 3))
  sent = [x for _, arguments in calls for x in jax.tree.leaves(arguments)]
  assert sum(x.nbytes for x in sent if isinstance(x, np.ndarray)) < 20_000
  # The vectors of users stay on the device between two programs.
  assert all(isinstance(arguments[1], jax.Array) for x, arguments in calls if x == 'rate')


@pytest.mark.parametrize('name', ['clicks', 'nexts'])
def test_programs_are_compiled_in_threads_and_never_again(folder, name):
  bundle, progress = Bundle(folder / name, **SIZES), []
  bundle.warm(threads=4, note=lambda *numbers: progress.append(numbers))
  count = progress[-1][1]
  assert progress == [(done, count) for done in range(count + 1)] and count >= 4
  assert bundle.compiled() == count
  with compilations() as compiled:
    for users in (1, 3, 9):
      bundle.score(requests(bundle, users))
    bundle.recommend(requests(bundle, 1), [3], [[]])
  assert not compiled and bundle.compiled() == count


def test_batches_are_cut_or_padded():
  def cut(count, pads):
    return [len(piece) for piece in pieces(range(count), [1, 4, 8], pads)]

  assert cut(7, pads=False) == [4, 1, 1, 1] and cut(7, pads=True) == [7]
  assert cut(19, pads=False) == [8, 8, 1, 1, 1] and cut(19, pads=True) == [8, 8, 3]
  assert set(JOINING) == set(PLATFORMS)


@pytest.mark.parametrize('name', ['clicks', 'nexts'])
def test_a_padded_batch_has_the_scores_of_a_cut_one(folder, monkeypatch, name):
  cut = Bundle(folder / name, **SIZES)
  expected = cut.score(requests(cut, 3))
  monkeypatch.setitem(JOINING, 'cpu', JOINING['cpu']._replace(pads=True))
  padded = Bundle(folder / name, **SIZES)
  calls = record_calls(padded)
  scores = padded.score(requests(padded, 3))
  assert len({function for function, _ in calls}) == len(calls)  # one call for the three
  for one, other in zip(scores, expected, strict=True):
    np.testing.assert_allclose(one.values, other.values, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['clicks', 'nexts'])
def test_the_functions_compile_for_a_tpu(folder, name):
  pytest.importorskip('libtpu')
  bundle = Bundle(folder / name, **SIZES)
  calls = record_calls(bundle)
  bundle.warm()
  (chip,) = slices.slice_of('v5e:1x1')
  sharding = SingleDeviceSharding(chip)
  for function, arguments in dict(calls).items():
    path = folder / name / f'functions/{function}.jax'
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == PLATFORMS
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    assert jax.jit(exported.call).lower(*shapes).compile().memory_analysis()
