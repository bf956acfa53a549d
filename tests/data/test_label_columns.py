"""Labels and sample weights: from the log to the batches, and every mistake in their columns."""

import re

import numpy as np
import pytest
from stores import store_of_labels

from lmn_jax import config
from lmn_jax.data import prepare
from lmn_jax.data.batches import BatchSource
from lmn_jax.data.counts import table_of
from lmn_jax.errors import UserError

NAN = float('nan')
LOG = 'user,item,time,label,price\na,x,1,1,2\nb,y,2,0,0.5\na,y,3,1,0\nb,x,4,0,1\n'


TWO = 'user,item,time,click,order\na,x,1,1,0\nb,y,2,0,\na,y,3,1,1\nb,x,4,0,nan\na,x,5,1,1\n'


def prepared(folder, text=LOG, **fields):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'log.csv').write_text(text)
  fields = dict(name='log', split=dict(valid=0.25, test=0.25)) | fields
  return prepare.prepare(config.data(source=str(folder / 'log.csv'), **fields), folder / 'stores')


def by_example(store, *names):
  """Returns (user, time) -> values of columns of the examples."""
  return {
    (user_id, int(time)): tuple(values)
    for number, part in enumerate(store.parts)
    for user_id, time, *values in zip(
      store.user_ids(number).take(part.examples['user']).to_pylist(),
      part.examples['time'],
      *(part.examples[name].tolist() for name in names),
      strict=True,
    )
  }


def test_weights_are_those_of_the_rows(tmp_path):
  store = prepared(tmp_path, weight='price')
  assert store.weighted and store.parts[0].examples['weight'].dtype == np.float32
  assert by_example(store, 'weight') == {
    ('a', 1): (2.0,), ('b', 2): (0.5,), ('a', 3): (0.0,), ('b', 4): (1.0,),
  }  # fmt: skip


def test_a_store_without_weights_has_no_column_of_them(tmp_path):
  store = prepared(tmp_path)
  assert not store.weighted and 'weight' not in store.parts[0].examples


def test_sampled_negatives_have_the_weight_of_their_positive(tmp_path):
  lines = [f'u{k % 3},i{k % 5},{k},{1 + k % 7}\n' for k in range(60)]
  text = 'user,item,time,price\n' + ''.join(lines)
  store = prepared(tmp_path, text, label='', weight='price', negatives=2)
  examples = store.parts[0].examples
  assert len(examples['weight']) == 3 * (examples['label'] > 0).sum()
  np.testing.assert_array_equal(examples['weight'], 1 + examples['time'] % 7)


def test_weights_count_in_training_only(tmp_path):
  store = store_of_labels(tmp_path)
  weight = np.concatenate(
    [part.examples['weight'][slice(*part.bounds['train'])] for part in store.parts]
  )
  n = store.examples['train']
  batch = BatchSource(store.path, 'train', n, 5, shuffle=True)[0]
  np.testing.assert_array_equal(batch['weight'], weight)
  assert len(set(weight.tolist())) == 5 and weight.min() == 0
  for split in ('train', 'valid', 'test'):
    source = BatchSource(store.path, split, 1000, 5)
    assert source[0]['weight'].tolist() == [1.0] * source.examples + [0.0] * (
      1000 - source.examples
    )


@pytest.mark.parametrize('value', ['-1', '', 'much', 'nan', 'inf', '1e39', 'NULL'])
def test_an_invalid_weight_is_refused_with_its_row(tmp_path, value):
  text = LOG.replace('a,y,3,1,0', f'a,y,3,1,{value}')
  with pytest.raises(UserError, match="log.csv: row 3: the weight column 'price' holds"):
    prepared(tmp_path, text, weight='price')
  store = prepared(tmp_path, text, weight='price', bad_lines='skip')
  assert sum(store.examples.values()) == 3 and store.manifest['notes']['rows_skipped'] == 1


def test_weights_that_are_all_zero_in_training_are_refused(tmp_path):
  text = LOG.replace('1,1,2', '1,1,0').replace('2,0,0.5', '2,0,0')
  with pytest.raises(UserError, match="config.data.weight='price' is 0 in all 2 training examples"):
    prepared(tmp_path, text, weight='price')


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'weight': 'cost'}, "config.data.weight .*'cost'"),
    ({'weight': 'label'}, "config.data.weight='label' is also the column of the labels"),
  ],
)
def test_a_wrong_column_is_refused(tmp_path, fields, message):
  with pytest.raises(UserError, match=message) as error:
    prepared(tmp_path, **fields)
  assert '\n' not in str(error.value)


def test_the_first_label_is_the_main_one_and_others_may_be_missing(tmp_path):
  store = prepared(tmp_path, TWO, labels=('click', 'order'))
  assert store.labels == ('click', 'order') and store.label_columns == ('label', 'label.order')
  assert str(dict(sorted(by_example(store, *store.label_columns).items()))) == str({
    ('a', 1): (1.0, 0.0), ('a', 3): (1.0, 1.0), ('a', 5): (1.0, 1.0), ('b', 2): (0.0, NAN),
    ('b', 4): (0.0, NAN),
  })  # fmt: skip
  assert store.manifest['counts']['events'] == 3  # the clicks
  counts = store.manifest['counts']['labels']
  assert counts['click']['labelled'] == store.examples
  assert counts['order'] == {
    'labelled': {'train': 2, 'valid': 0, 'test': 1}, 'clicks': {'train': 1, 'valid': 0, 'test': 1},
  }  # fmt: skip
  assert re.search('^label order, train +2 labelled, 1 clicks$', table_of(store), re.M)


def test_the_order_of_labels_chooses_the_main_one(tmp_path):
  text = TWO.replace('2,0,', '2,0,1').replace('4,0,nan', '4,0,0')
  store = prepared(tmp_path, text, labels=('order', 'click'))
  assert by_example(store, *store.label_columns)['b', 2] == (1.0, 0.0)
  assert store.manifest['counts']['events'] == 3


def test_one_of_several_labels_is_the_label(tmp_path):
  store = prepared(tmp_path, TWO, labels=('click',))
  other = prepared(tmp_path / 'other', TWO, label='click')
  assert store.labels == ('label',) and store.fingerprint == other.fingerprint


def test_a_threshold_applies_to_each_label(tmp_path):
  text = TWO.replace(',1,0\n', ',4.5,2\n').replace(',1,1\n', ',5,3\n')
  store = prepared(tmp_path, text, labels=('click', 'order'), label_threshold=3.0)
  examples = by_example(store, *store.label_columns)
  assert [examples['a', time] for time in (1, 3, 5)] == [(1, 0), (1, 1), (1, 1)]


def test_sampled_negatives_have_no_label_at_all(tmp_path):
  lines = [f'u{k % 3},i{k % 5},{k},1,{["", 1][k % 2]}\n' for k in range(60)]
  text = 'user,item,time,click,order\n' + ''.join(lines)
  examples = prepared(tmp_path, text, labels=('click', 'order'), negatives=1).parts[0].examples
  drawn = examples['label'] == 0
  assert drawn.sum() == (~drawn).sum() > 0 and not examples['label.order'][drawn].any()
  expected = np.where(examples['time'] % 2, 1, NAN)[~drawn]
  np.testing.assert_array_equal(examples['label.order'][~drawn], expected)


def test_a_batch_has_all_labels(tmp_path):
  store = store_of_labels(tmp_path)
  assert len(store.parts) > 2
  expected = np.concatenate(
    [
      np.stack(
        [part.examples[name][slice(*part.bounds['test'])] for name in store.label_columns], 1
      )
      for part in store.parts
    ]
  )
  batch = BatchSource(store.path, 'test', store.examples['test'], 5)[0]
  assert batch['label'].dtype == np.float32 and np.isnan(expected).any()
  np.testing.assert_array_equal(batch['label'], expected)


@pytest.mark.parametrize(
  'text, fields, message',
  [
    (TWO.replace('2,0,', '2,,'), {}, "row 2: the labels column 'click' holds None; 0 or 1 is"),
    (TWO.replace('2,0,', '2,0,2'), {}, "row 2: the labels column 'order' holds '2'; 0 or 1 is"),
    (TWO.replace('2,0,', '2,0,x'), {'label_threshold': 1.0}, "'order' holds 'x'; a number is"),
    (TWO, {'labels': ('click', 'CLICK')}, "the name 'click' is empty, has a slash or is there twi"),
    (TWO, {'labels': ('click', 'a/b')}, "the name 'a/b' is empty, has a slash or is there twice"),
    (TWO, {'labels': ('click', 'buy')}, "config.data.labels='buy'"),
    (TWO, {'label': 'click'}, "labels=.* and config.data.label='click' both give the label; rem"),
    (TWO, {'positive_behaviours': ('buy',)}, 'and config.data.positive_behaviours=.* both give'),
    (TWO, {'candidates': 'item'}, "and config.data.candidates='item' with labels both give the"),
    (TWO, {'context_features': ('order',)}, "labels are computed from the column 'order', so as a"),
  ],
)
def test_a_wrong_label_is_refused(tmp_path, text, fields, message):
  with pytest.raises(UserError, match=message) as error:
    prepared(tmp_path, text, **{'labels': ('click', 'order')} | fields)
  assert '\n' not in str(error.value)


NUMBERS = 'user,item,time,label,dwell\na,x,1,3.5,1\nb,y,2,-2,\na,y,3,1e6,4\nb,x,4,0,7\n'
NUMBER = dict(label_kind='number', history='all')


def test_labels_may_be_numbers(tmp_path):
  store = prepared(tmp_path, NUMBERS, **NUMBER)
  assert store.label_kind == 'number' and store.labels == ('label',)
  assert by_example(store, 'label') == {
    ('a', 1): (3.5,), ('b', 2): (-2.0,), ('a', 3): (1e6,), ('b', 4): (0.0,),
  }  # fmt: skip
  counts = store.manifest['counts']
  assert 'clicks' not in counts and counts['events'] == 4
  assert counts['labels'] == {
    'label': {'labelled': {'train': 2, 'valid': 1, 'test': 1}, 'mean': 0.75, 'deviation': 2.75}
  }
  assert re.search('^label label, mean of training +0.75, deviation 2.75$', table_of(store), re.M)


SPLIT = dict(valid=0.0, test=0.25)


def test_several_numbers_have_their_own_moments(tmp_path):
  store = prepared(tmp_path, NUMBERS, labels=('label', 'dwell'), split=SPLIT, **NUMBER)
  counts = store.manifest['counts']['labels']['dwell']
  assert counts['labelled'] == {'train': 2, 'valid': 0, 'test': 1}
  assert counts['mean'] == 2.5 and counts['deviation'] == 1.5


@pytest.mark.parametrize('rows_per_part', [20, 2**20])
def test_moments_of_parts_are_those_of_the_whole(tmp_path, rows_per_part):
  rng = np.random.default_rng(0)
  numbers = 1e6 + rng.normal(size=200)  # sums of squares about 0 would lose the deviation
  lines = [f'u{k % 17},i{k % 5},{k},{x!r}\n' for k, x in enumerate(numbers.tolist())]
  text = 'user,item,time,label\n' + ''.join(lines)
  store = prepared(tmp_path, text, rows_per_part=rows_per_part, **NUMBER)
  training = numbers[:100].astype(np.float32).astype(np.float64)
  moments = store.manifest['counts']['labels']['label']
  assert moments['mean'] == pytest.approx(training.mean(), rel=1e-12)
  assert moments['deviation'] == pytest.approx(training.std(), rel=1e-9)


@pytest.mark.parametrize(
  'text, fields, message',
  [
    (NUMBERS, {'history': 'positive'}, "config.data.history='positive' with .*: no row is a posi"),
    (NUMBERS, {'label': ''}, "config.data.label='' with .*: name the column of the numbers"),
    (NUMBERS, {'label_threshold': 1.0}, 'config.data.label_threshold=1.0 with .*: remove it, or'),
    (NUMBERS, {'negatives': 2}, 'config.data.negatives=2 with .*: a drawn item has no number'),
    (NUMBERS, {'split': dict(protocol='leave_one_out')}, "protocol='leave_one_out' with .*use us"),
    (NUMBERS, {'label_kind': 'dwell'}, "config.data.label_kind='dwell' is unknown"),
    (NUMBERS.replace('-2', 'two'), {}, "row 2: the label column 'label' holds 'two'; a number is"),
    (NUMBERS.replace('-2', 'true'), {}, "row 2: the label column 'label' holds 'true'; a number"),
    (NUMBERS.replace('-2', ''), {}, "row 2: the label column 'label' holds None; a number is"),
    (NUMBERS.replace('-2', 'inf'), {}, "row 2: the label column 'label' holds 'inf'; a number is"),
    (NUMBERS.replace('1e6', '1e39'), {}, "row 3: the label column 'label' holds '1e39'; a number"),
  ],
)
def test_a_wrong_number_is_refused(tmp_path, text, fields, message):
  with pytest.raises(UserError, match=message) as error:
    prepared(tmp_path, text, **NUMBER | fields)
  assert '\n' not in str(error.value)
