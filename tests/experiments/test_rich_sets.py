"""The experiment of rich events: the sets are read, and the table is that of the reports."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmn_jax.errors import UserError
from lmn_jax.training import loop
from tests.runs import load_experiment

compare = load_experiment('compare')
sets = load_experiment('rich_sets')
rich = load_experiment('rich_events')

# ml_collections loads config files in a way that Python is going to drop.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
USERS, ROWS = 24, 12
rng = np.random.default_rng(0)
USER, ITEM = np.repeat(np.arange(USERS), ROWS), rng.integers(0, 9, USERS * ROWS)
STEP = np.tile(np.arange(ROWS), USERS)


def flags():
  """A column of 0 and 1."""
  return rng.integers(0, 2, USERS * ROWS)


def text(separator, *columns):
  """Columns as lines of text."""
  return '\n'.join(separator.join(map(str, row)) for row in zip(*columns, strict=True)) + '\n'


def kuairand(folder):
  names = ['is_click', 'long_view', 'is_follow', 'is_comment', 'is_profile_enter']
  head = ['user_id', 'video_id', 'time_ms', *names, 'play_time_ms', 'duration_ms', 'hourmin']
  columns = [flags() for _ in names]
  lines = text(
    '\t', USER, ITEM, 1_649_581_149_287 + 60_000 * STEP, *columns, 100 * STEP, 1000 * ITEM, STEP
  )
  (folder / 'interactions.csv').write_text('\t'.join(head) + '\n' + lines)


def complete_journey(folder):
  def write(name, **columns):
    pq.write_table(pa.table(columns), folder / f'{name}.parquet')

  one = np.ones(USERS * ROWS)
  write(
    'transactions', household_id=USER, product_id=ITEM, store_id=ITEM, basket_id=STEP,
    quantity=flags(), sales_value=2 * one, retail_disc=0 * one, coupon_disc=0 * one,
    transaction_timestamp=pa.array(1_483_273_590 + 3_600 * STEP, pa.timestamp('s')),
  )  # fmt: skip
  kinds = ['department', 'brand', 'product_category', 'product_type']
  write('products', product_id=np.arange(8), **{k: list('abcdefgh') for k in kinds})
  traits = ['age', 'income', 'household_size', 'kids_count']
  write('demographics', household_id=np.arange(9), **{k: list('abcdefghi') for k in traits})


def instacart(folder):
  order, days = STEP // 3, np.where(STEP < 3, '', '7.0')
  lines = text(',', USER, order, order % 7, 8 + STEP // 3, days, ITEM, STEP % 3, flags())
  head = 'user_id,order_number,order_dow,order_hour_of_day,days_since_prior_order,product_id'
  (folder / 'df_sample.csv').write_text(f'{head},add_to_cart_order,reordered\n{lines}')


def jdata(folder):
  for month in (1, 2):
    minutes = [f'2016-0{month}-28 23:{k:02}:09' for k in STEP]
    kind = rng.integers(1, 7, USER.size)
    lines = text(',', [f'{u}.0' for u in USER], ITEM, minutes, kind, ITEM % 3, ITEM % 5)
    path = folder / f'JData_Action_20160{month}.csv'
    path.write_text(f'user_id,sku_id,time,type,cate,brand\n{lines}')
  users = text(',', range(USERS), ['36-45岁'] * USERS, [1] * USERS, [2] * USERS)
  file = folder / 'JData_User.csv'
  file.write_text(f'user_id,age,sex,user_lv_cd\n{users}', encoding='gbk')


def taobao(folder):
  kind = rng.choice(['pv', 'pv', 'buy', 'cart', 'fav'], USER.size)
  (folder / 'UserBehavior.csv').write_text(text(',', USER, ITEM, ITEM % 3, kind, 1e9 + STEP))


WRITERS = {
  'kuairand': kuairand, 'complete-journey': complete_journey, 'instacart': instacart,
  'jdata': jdata, 'taobao': taobao,
}  # fmt: skip


@pytest.mark.parametrize('name', sets.SETS)
def test_a_set_has_its_features(tmp_path, name):
  WRITERS[name](tmp_path)
  real, log = sets.SETS[name], tmp_path / 'log.parquet'
  if real.query:
    rich.write_log(name, tmp_path, 0.5, log)
    assert 4 < len(pq.read_table(log, columns=[real.log['user']])[0].unique()) < 20
  changes = [*sets.files_of(name, tmp_path, log), '--config.batch_size=32']
  for task in sets.TASKS:
    entries = rich.entries_of(name, task, (sets.MODELS[task][0], 'all'), ['0.1'], changes)
    store = compare.share_data(entries, [0], tmp_path / 'stores')
    declared = {
      f'{kind}.{x}'
      for addition in sets.additions_of(name, task)
      for kind in ('user', 'item', 'context', 'event')
      for x in real.additions[addition].get(f'{kind}_features', ())
    }
    keys = {k for of in (store.features, store.numbers) for keys in of.values() for k in keys}
    assert keys == declared and store.examples['test']
    # A column that no row joins would have the unknown alone.
    assert min(n for key, n in store.vocabulary.items() if key in declared) > 1


def value(features, rate, seed, split):
  """The AUC that a fake training reports: the best rate in validation is 0.2, in the test 0.8."""
  best = 0.2 if split == 'valid' else 0.8
  return 0.6 + 0.01 * len(features) - 0.001 * abs(rate - best) + 0.0001 * seed


def fake_train(config, workdir, store):
  """A report whose metrics depend on the features, the rate and the seed."""
  labels, features = list(config.data.labels), workdir.name.split('-rate')[0]
  names = [f'{label}/' for label in labels] or ['']
  columns = [f'{name}{metric}' for name in names for metric in ('auc', 'log_loss')]

  def of(split):
    auc = value(features, config.optimizer.embedding.rate, config.seed, split)
    return {'overall': {x: auc + k for k, x in enumerate(columns)}}

  report = {
    'config': config.to_dict(), 'columns': columns, 'step': 4, 'commit': '', 'devices': '1 device',
    'protocol': 'fake', 'fingerprint': store.fingerprint, 'counts': store.manifest['counts'],
    'test': of('test'), 'valid': of('valid'),
    'baselines': {'test': {'item_mean': {'overall': {x: 0.5 for x in columns}}}},
  }  # fmt: skip
  workdir.mkdir()
  (workdir / 'report.json').write_text(json.dumps(report))
  return report


def test_rates_are_chosen_on_validation(tmp_path, monkeypatch, capsys):
  kuairand(tmp_path)
  trained = []

  def train(config, workdir, store):
    trained.append(workdir.name)
    return fake_train(config, workdir, store)

  monkeypatch.setattr(loop, 'train', train)
  few = {k: sets.KUAIRAND.additions[k] for k in ('time', 'one-label')}
  monkeypatch.setitem(sets.SETS, 'kuairand', sets.KUAIRAND._replace(additions=few))
  argv = ['--set=kuairand', f'--data={tmp_path}', '--models=din', '--seeds=0,1', '--rates=.2,.8']
  argv += [f'--workdir={tmp_path / "runs"}', f'--log={tmp_path / "LOG.md"}']
  argv += ['--config.batch_size=32']
  result = rich.main(argv)
  rows = ['ids', 'all', 'time', 'one-label']
  assert list(result['lines']) == ['item_mean', *(f'din {x}' for x in rows)]
  # Two rates with the first seed, the best with the other.
  assert len(trained) == 3 * len(rows) and sum('rate=.8' in x for x in trained) == len(rows)
  ids, everything, alone = (result['lines'][f'din {x}'] for x in ('ids', 'all', 'one-label'))
  assert ids['rate'] == everything['rate'] == '.2'
  tests = [value('din-ids', 0.2, seed, 'test') for seed in (0, 1)]
  np.testing.assert_allclose(ids['is_click/auc'], compare.spread(tests), rtol=1e-12)
  np.testing.assert_allclose(everything['over_ids'], [0, 0], atol=1e-12)  # names of one length
  longer = 0.01 * (len('one-label') - len('ids'))
  np.testing.assert_allclose(alone['over_ids'], [longer, 0], atol=1e-12)
  assert alone['long_view/auc'] is None and alone['is_click/auc'][0] > ids['is_click/auc'][0]
  log = (tmp_path / 'LOG.md').read_text()
  assert (
    result['table'] in log
    and 'all users' in log
    and '% of the test rows have' in log
    and str(tmp_path) not in log
  )

  # Again: no run is trained.
  monkeypatch.setattr(loop, 'train', None)
  assert rich.main(argv)['table'] == result['table'] and result['table'] in capsys.readouterr().out
  short = rich.main([*argv, '--features=ids,time', '--log='])['lines']
  assert short == {row: result['lines'][row] for row in ('item_mean', 'din ids', 'din time')}
  reports = {row: [dict(x)] for row, (x, _) in result['reports'].items()}
  reports['din time'][0]['counts'] = {'examples': {'train': 7}}
  with pytest.raises(UserError, match="'din time' has other examples than 'din ids'"):
    rich.check_examples(reports)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--set=kuai'], "--set='kuai' is unknown"),
    (['--set=taobao', '--task=clicks'], "--task='clicks' is unknown"),
    (['--set=taobao', '--users=.5'], '--users=.5: taobao is small'),
    (['--set=instacart', '--users=2'], "--users='2' must be a number above 0"),
    (['--set=taobao', '--features=all'], "--features='all' must have 'ids'"),
    (['--set=instacart'], '--data=.*No files found'),
  ],
)
def test_wrong_flags_are_refused(tmp_path, arguments, message):
  with pytest.raises(UserError, match=message):
    rich.main([*arguments, f'--data={tmp_path}', f'--workdir={tmp_path}', '--log='])


def test_a_row_is_a_config_of_the_file():
  config = sets.get_config('kuairand/click/sam/time+impressions')
  assert (config.model.name, config.model.time, config.data.history) == ('sam', 'buckets', 'all')
  assert tuple(config.data.event_features) == ('is_click',)
  assert sets.get_config('kuairand/click/din/ids').model.time == 'none'
  with pytest.raises(UserError, match="FEATURES='impressions' is unknown"):
    sets.get_config('kuairand/next_item/hstu/impressions')


def test_the_config_of_kuairand_is_the_row_with_all_features():
  folder = Path(sets.__file__).parents[1] / 'configs'
  other = {'format': 'tsv', 'source': 'interactions.csv'}
  changes = [f'--config.data.{field}={value}' for field, value in other.items()]
  config = compare.read_entry(str(folder / 'kuairand.py'), 'sam', [], changes).config.to_dict()
  row = sets.get_config('kuairand/click/sam/all')
  row.data.source = other['source']
  assert config == row.to_dict()
