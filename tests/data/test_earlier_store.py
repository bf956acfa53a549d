"""A store of an earlier version is opened and gives the examples and batches that it gave then."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lmn_jax.data import store_folder
from lmn_jax.data.batches import BatchSource
from lmn_jax.data.lanes import LaneSource
from lmn_jax.data.splits import SPLITS

# A store of 160 rows with labels, ties in time, unknown ids and every kind of feature, written by
# version 0.1.0 of 2026-11-28, with what that version read of it: all examples with their histories
# by raw ids, and the first three batches of each kind.
ARCHIVE = Path(__file__).parent / 'store_of_an_earlier_version.tar.xz'


@pytest.fixture(scope='module')
def unpacked(tmp_path_factory):
  """(store, answers, file of batches)."""
  folder = tmp_path_factory.mktemp('earlier')
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(folder, filter='data')
  answers = json.loads((folder / 'answers.json').read_text())
  return store_folder.find(folder, answers['fingerprint']), answers, folder / 'batches.npz'


def texts(store, time):
  return [str(moment) for moment in store.raw_times(time).to_pylist()]


def test_examples_and_histories_are_those_read_then(unpacked):
  store, answers, _ = unpacked
  assert len(store.parts) == 5 and store.protocol == answers['protocol']
  assert {name: store.raw_ids(name).to_pylist() for name in store.vocabulary} == answers['raw_ids']
  assert list(store.clock) == answers['clock'] and store.manifest['bins'] == answers['bins']
  items, examples = answers['raw_ids']['item'], []
  for number, part in enumerate(store.parts):
    users = store.user_ids(number).to_pylist()
    for row, user in enumerate(part.examples['user']):
      first = part.users['offset'][user]
      events = slice(first, first + part.examples['end'][row])
      history = zip(
        texts(store, part.history['time'][events]),
        [items[item] for item in part.history['item'][events]],
        strict=True,
      )
      examples.append(
        [
          int(part.examples['split'][row]),
          users[user],
          *texts(store, part.examples['time'][row : row + 1]),
          items[part.examples['item'][row]],
          float(part.examples['label'][row]),
          int(part.examples['place'][row]),
          [list(event) for event in history],
        ]
      )
  assert examples == answers['examples']
  assert {example[0] for example in examples} == {0, 1, 2} and any(row[-1] for row in examples)


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('kind', ['click', 'histories', 'windows'])
def test_batches_are_those_read_then(unpacked, kind, split):
  store, _, batches = unpacked
  order = dict(seed=1, shuffle=split == 'train')
  if kind == 'click':
    source = BatchSource(store.path, split, 32, 4, **order)
  else:
    source = LaneSource(store.path, split, 2, 4, whole=kind == 'histories', **order)
  with np.load(batches) as saved:
    for step in range(3):
      batch, prefix = source[step], f'{kind}/{split}/{step}/'
      names = {name.removeprefix(prefix) for name in saved if name.startswith(prefix)}
      assert batch.keys() == names and names
      for name, column in batch.items():
        assert column.dtype == saved[prefix + name].dtype
        np.testing.assert_array_equal(column, saved[prefix + name], err_msg=name)
