"""Splits keep rows of one time together, begin at the times of the config, and log their shares."""

import pytest
from stores import event, make_store

from lmn_jax import config
from lmn_jax.data import prepare
from lmn_jax.errors import UserError


def test_rows_of_one_time_are_in_one_split(tmp_path):
  rows = [event(i, f'u{i}', 'x', 0 if i < 5 else 1) for i in range(10)]
  # 70 % of the rows end within the second time, whose rows stay together: it is the last split.
  for k, test in enumerate((0.3, 0.5)):
    split = dict(protocol='global_time', valid=0.0, test=test)
    store = make_store(tmp_path / f'{k}', rows, split=split)
    assert store.examples == dict(train=5, valid=0, test=5)
  assert store.protocol.startswith('global time split: training before 1, test from 1;')


def test_few_times_give_each_split_at_least_one(tmp_path, caplog):
  rows = [event(i, f'u{i}', 'x', i // 30 if i < 90 else 2) for i in range(100)]
  split = dict(protocol='global_time', valid=0.3, test=0.1)
  store = make_store(tmp_path / 's', rows, split=split)
  assert store.examples == dict(train=30, valid=30, test=40)
  assert 'validation has 0.300 and test 0.400 of the examples, where valid=0.3' in caplog.text
  with pytest.raises(UserError, match='left for training .* smaller shares .0 leaves a split out'):
    make_store(tmp_path / 't', rows[:60], split=split)


def dated(tmp_path, form, **split):
  """A store with 30, 30 and 40 rows of three times, which are dates or numbers of seconds."""
  day = {'date': '2024-01-0{}', 'number': '170400000{}'}[form]
  rows = [f'u{i % 7},i{i % 5},{day.format(1 + min(i // 30, 2))},{i % 2}' for i in range(100)]
  (tmp_path / 'log.csv').write_text('\n'.join(['user,item,time,label', *rows]))
  data = config.data(source=str(tmp_path / 'log.csv'), history='all', split=split)
  return prepare.prepare(data, tmp_path / 'stores')


@pytest.mark.parametrize(
  'form, begins', [('date', ('2024-01-02', '2024-01-03')), ('number', (1704000002, 1704000003.0))]
)
def test_splits_begin_at_the_times_of_the_config(tmp_path, form, begins):
  store = dated(tmp_path, form, valid_from=begins[0], test_from=begins[1])
  assert store.examples == dict(train=30, valid=30, test=40)
  store = dated(tmp_path, form, test=0.0, valid_from=begins[1])
  assert store.examples == dict(train=60, valid=40, test=0)


@pytest.mark.parametrize(
  'split, message',
  [
    (dict(valid=0.0, test_from='2025-01-01'), "test_from='2025-01-01': test has no example then"),
    (dict(valid=0.0, test_from='1704000003'), "test_from='1704000003' is no time of this log"),
    (dict(test_from='2024-01-03'), "valid_from='' but config.data.split.valid=0.1"),
    (
      dict(valid_from='2024-01-03', test_from='2024-01-02'),
      "valid_from='2024-01-03': valid has no example then",
    ),
    (dict(protocol='user_ratio', test_from='2024-01-02'), 'are of protocol=global_time'),
    (dict(valid=0.0, test_from='2024-01-01'), 'none of 100 examples is left for training'),
  ],
)
def test_times_without_examples_and_times_of_other_protocols_are_errors(tmp_path, split, message):
  with pytest.raises(UserError, match=message) as error:
    dated(tmp_path, 'date', **split)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('history, kept', [('positive', [5]), ('all', [4, 5, 6])])
def test_max_history_counts_rows_of_any_label(tmp_path, history, kept):
  log = tmp_path / 'log.csv'
  rows = '\n'.join(f'u,i{k},{k},{k % 2}' for k in range(7))
  log.write_text(f'user,item,time,label\n{rows}\n')
  data = config.data(source=str(log), max_history=3, history=history)
  store = prepare.prepare(data, tmp_path / 'stores')
  assert store.parts[0].history['time'].tolist() == kept
