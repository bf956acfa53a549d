"""Batches that devices cut from the columns of a store equal those of the host, bit for bit."""

import jax
import numpy as np
import pytest
from stores import event, make_store, store_of_features, store_of_fields, store_of_labels

from lmn_jax import config as configs
from lmn_jax.data import prepare, resident
from lmn_jax.data.batches import BatchSource
from lmn_jax.data.lanes import LaneSource
from lmn_jax.data.reads import Reads
from lmn_jax.data.resident import Resident, residents
from lmn_jax.data.splits import SPLITS
from lmn_jax.data.times import Clock
from lmn_jax.data.train_lengths import BLOCK
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from tests.runs import but_slow

MESHES = {'1': (1, 1), '8 x 1': (8, 1), '4 x 2': (8, 2), '1 x 4': (4, 4)}


def mesh_of(name):
  devices, model = MESHES[name]
  return meshes.make_mesh(model, jax.devices()[:devices])


@pytest.fixture(scope='module', params=['one part', 'parts', 'row histories', 'labels'])
def store(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('resident')
  if request.param == 'row histories':
    return store_of_row_histories(folder)
  if request.param == 'labels':
    return store_of_labels(folder)
  return store_of_features(folder, 90 if request.param == 'parts' else 2**20)


def store_of_row_histories(folder):
  """Each row has a history of its own, so users have several records."""
  rng = np.random.default_rng(1)
  with (folder / 'log.csv').open('w') as file:
    file.write('user,item,time,label,past\n')
    for k in range(203):
      past = ' '.join(f'i{j}' for j in rng.integers(30, size=rng.integers(0, 12)))
      file.write(f'u{rng.integers(12)},i{rng.integers(30)},{k},{rng.integers(2)},{past}\n')
  source = dict(source=str(folder / 'log.csv'), name='log', row_history='past', rows_per_part=90)
  store = prepare.prepare(configs.data(**source), folder / 'stores')
  assert 'row_histories' in store.manifest['notes'] and len(store.parts) > 1
  return store


def assert_equal_batches(source, mesh, steps, programs=1):
  """Compares the cut of each step with the source, and its layout with that of a placed batch."""
  on_devices = Resident(source, mesh)
  columns = on_devices.put()
  for name, shape in on_devices.shapes.items():
    assert columns[name].shape == shape.shape and columns[name].dtype == shape.dtype
    assert columns[name].sharding == shape.sharding
  held = sum(column.addressable_shards[0].data.nbytes for column in columns.values())
  assert held == on_devices.bytes
  cut = jax.jit(on_devices.cut)
  for step in steps:
    expected = meshes.place(mesh, source[step])
    with meshes.use_mesh(mesh):
      batch = cut(columns, source.plan(step))
    assert batch.keys() == expected.keys()
    for name, column in expected.items():
      assert batch[name].dtype == column.dtype and batch[name].shape == column.shape, name
      assert batch[name].sharding.is_equivalent_to(column.sharding, column.ndim), name
      np.testing.assert_array_equal(
        np.asarray(batch[name]).view(np.uint32), np.asarray(column).view(np.uint32), err_msg=name
      )
  assert cut._cache_size() == programs


SHAPES = [(name, 9) for name in MESHES] + [('4 x 2', 1), ('4 x 2', 600)]


@pytest.mark.parametrize('mesh, length', SHAPES)
@pytest.mark.parametrize('split', SPLITS)
def test_batches_of_clicks_are_those_of_the_host(store, mesh, split, length):
  source = BatchSource(store.path, split, 16, length, seed=3, shuffle=split == 'train')
  last = source.batches - 1  # padded in evaluation, two epochs in training
  assert source.examples % 16
  assert_equal_batches(source, mesh_of(mesh), [0, 1, last])


@pytest.fixture(scope='module', params=['one part', 'parts'])
def rich(request, tmp_path_factory):
  """A store with numbers and event features of every kind, and events that are not examples."""
  parts = 90 if request.param == 'parts' else 2**20
  clock = dict(time=Clock('number', '', 7, '', 900, 1999)._asdict())
  return store_of_fields(tmp_path_factory.mktemp('rich'), parts, clock)


READS = {
  'time': Reads(True),
  'one': Reads(False, ('event.dwell',)),
  'all': Reads(True, ('event.kind', 'event.tags', 'event.dwell', 'event.price')),
}


@pytest.mark.parametrize('mesh, length', [('8 x 1', 9), ('1', 600)])
@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('reads', READS)
def test_events_of_clicks_are_those_of_the_host(rich, mesh, length, split, reads):
  source = BatchSource(rich.path, split, 16, length, 3, split == 'train', reads=READS[reads])
  assert ('time_gap' in source[0]) == READS[reads].time
  assert_equal_batches(source, mesh_of(mesh), [0, 1, source.batches - 1])


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('targets, stale_events', [(2, 0), (5, 3), (16, 1000)])
def test_requests_are_those_of_the_host(store, mesh, targets, stale_events):
  requests = dict(targets=targets, stale_events=stale_events)
  source = BatchSource(store.path, 'train', 16, 9, seed=3, shuffle=True, **requests)
  assert_equal_batches(source, mesh_of(mesh), [0, source.batches - 1, 2**35])


@pytest.mark.parametrize('mesh', ['1', '8 x 1'])
@pytest.mark.parametrize('train_length', ['full', 'beta'])
def test_requests_with_events_are_those_of_the_host(rich, mesh, train_length):
  source = BatchSource(
    rich.path, 'train', 16, 9, 3, True, reads=READS['all'], targets=3, stale_events=2,
    train_length=train_length,
  )  # fmt: skip
  batch = source[0]
  assert np.isnan(batch['context.price'][batch['weight'] == 0]).all()
  assert (batch['time_gap'] >= 0).all()
  steps = {source.lengths.at(step): step for step in range(0, 200, BLOCK)}
  assert_equal_batches(source, mesh_of(mesh), steps.values(), len(steps))


@pytest.mark.parametrize('mesh', ['1', '8 x 1'])
def test_requests_with_labels_and_weights_are_those_of_the_host(tmp_path, mesh):
  store = store_of_labels(tmp_path)
  source = BatchSource(store.path, 'train', 16, 9, 3, True, targets=4, stale_events=5)
  batch = source[0]
  assert batch['label'].shape == (16, 4, 2) and (batch['weight'].sum(axis=0) > 0).all()
  assert_equal_batches(source, mesh_of(mesh), [0, source.batches - 1])


@pytest.mark.parametrize('mesh, targets', [('1', 3), ('4 x 2', 1)])
def test_batches_of_random_lengths_are_those_of_the_host(store, mesh, targets):
  source = BatchSource(
    store.path, 'train', 16, 24, 3, True, targets=targets, train_length='beta',
    train_length_mean=0.4,
  )  # fmt: skip
  ladder = source.lengths.ladder
  steps = {source.lengths.at(step): step for step in range(0, 400, BLOCK)}
  assert ladder == (1, 3, 6, 12, 24) and steps.keys() == set(ladder)
  assert_equal_batches(source, mesh_of(mesh), steps.values(), len(ladder))


def test_requests_of_a_split_that_ends(store):
  source = BatchSource(store.path, 'valid', 16, 9, targets=3, stale_events=2)
  assert_equal_batches(source, mesh_of('8 x 1'), [0, source.batches - 1])


LANES = {
  'whole': dict(),
  'windows': dict(whole=False),
  'packed': dict(whole=False, packed=True),
  'latest': dict(whole=False, latest=True),
  'latest, packed': dict(whole=False, latest=True, packed=True),
}


@pytest.fixture(scope='module', params=['leave_one_out', 'global_time'])
def events(request, tmp_path_factory):
  """Users with 1 to 40 events in several parts, some of them at the same time."""
  rng, rows = np.random.default_rng(0), []
  for user in range(25):
    for _ in range(1 + int(rng.integers(40))):
      row = event(len(rows), f'u{user:02d}', f'i{rng.integers(30)}', int(rng.integers(60)))
      rows.append(row)
  split = dict(protocol=request.param, valid=0.15, test=0.15)
  folder = tmp_path_factory.mktemp('lanes') / 'store'
  store = make_store(folder, rows, split=split, rows_per_part=200, min_count=3)
  assert len(store.parts) > 2
  return store


@pytest.mark.parametrize('mesh, length', [('8 x 1', 6), ('4 x 2', 1), ('1', 25)])
@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('lanes', LANES)
def test_batches_of_lanes_are_those_of_the_host(events, mesh, length, split, lanes):
  arguments = dict(seed=3, shuffle=split == 'train', **LANES[lanes])
  source = LaneSource(events.path, split, 8, length, **arguments)
  last = source.batches - 1  # with finished lanes in evaluation, next rounds in training
  assert_equal_batches(source, mesh_of(mesh), sorted({0, min(1, last), last}))


@pytest.mark.parametrize('mesh, length', [('8 x 1', 6), ('1', 40)])
@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('lanes', LANES)
def test_events_of_lanes_are_those_of_the_host(rich, mesh, length, split, lanes):
  arguments = dict(seed=3, shuffle=split == 'train', reads=READS['all'], **LANES[lanes])
  source = LaneSource(rich.path, split, 8, length, **arguments)
  assert source[0].keys() > {'time', 'time_gap', *READS['all'].events}
  assert_equal_batches(source, mesh_of(mesh), sorted({0, min(1, source.batches - 1)}))


@pytest.mark.parametrize('mesh', ['1', '4 x 2'])
@pytest.mark.parametrize('lanes', ['whole', 'packed'])
@pytest.mark.parametrize('sampler', ['uniform', 'popularity', 'in_batch'])
def test_negatives_drawn_by_devices_are_those_of_the_host(events, mesh, lanes, sampler):
  arguments = dict(seed=3, shuffle=True, sampler=sampler, negatives=5, **LANES[lanes])
  source = LaneSource(events.path, 'train', 8, 6, **arguments)
  assert ('negative' in source[0]) == (sampler != 'in_batch')
  assert_equal_batches(source, mesh_of(mesh), [0, 5, 2**35])


def test_cuts_of_equal_settings_are_equal(store):
  def cut(split='train', length=5, mesh='8 x 1', targets=1):
    source = BatchSource(store.path, split, 16, length, shuffle=split == 'train', targets=targets)
    return Resident(source, mesh_of(mesh)).cut

  assert cut() == cut() and hash(cut()) == hash(cut())
  assert (cut() == cut('valid')) != store.weighted  # sample weights are of training alone
  assert cut() != cut(length=6) and cut() != cut(mesh='1')
  assert cut() != cut(targets=2) and cut(targets=2) == cut(targets=2)


def test_splits_share_the_columns_of_the_store(store):
  mesh = mesh_of('8 x 1')
  sources = {split: BatchSource(store.path, split, 16, 5) for split in SPLITS}
  on_devices = residents(sources, mesh)
  columns = {split: on_devices[split].put() for split in SPLITS}
  unique = {id(x): x for by_name in columns.values() for x in by_name.values()}
  assert len(unique) == len(columns['train']) + len(SPLITS) - 1  # examples are of one split
  held = sum(column.addressable_shards[0].data.nbytes for column in unique.values())
  assert resident.bytes_of(on_devices.values()) == held
  for split, source in sources.items():
    with meshes.use_mesh(mesh):
      batch = jax.jit(on_devices[split].cut)(columns[split], source.plan(0))
    for name, column in source[0].items():
      np.testing.assert_array_equal(batch[name], column, err_msg=name)


def test_a_store_that_int32_cannot_count_is_an_error(store, monkeypatch):
  source = BatchSource(store.path, 'train', 16, 5)
  on_device = Resident(source, mesh_of('1'))
  words = {on_device.bytes_of(name) // 4: name for name in on_device.shapes}
  most = max(words)
  monkeypatch.setattr(resident, 'MOST', most - 1)
  message = f'{words[most]} has .* {most:,} places, .*; set config.store_on='
  with pytest.raises(UserError, match=message) as error:
    Resident(source, mesh_of('1'))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('seed', but_slow(range(3), {0}))
def test_batches_of_random_settings_are_those_of_the_host(store, events, seed):
  rng = np.random.default_rng(seed)
  size, length = 4 * int(rng.integers(1, 20)), int(rng.integers(1, 40))
  arguments = dict(seed=int(rng.integers(2**63)), shuffle=True)
  clicks = BatchSource(store.path, 'train', size, length, **arguments)
  kind = LANES[rng.choice([*LANES])]
  lanes = LaneSource(events.path, 'train', 4 * int(rng.integers(1, 5)), length, **arguments, **kind)
  for source in (clicks, lanes):
    assert_equal_batches(source, mesh_of('4 x 2'), rng.integers(2**40, size=3).tolist())
