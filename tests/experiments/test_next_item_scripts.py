"""The experiments of the next-item task."""

import json
import time

import jax
import numpy as np
import pytest

from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.training import loop
from tests.runs import load_experiment, mesh_of

compare = load_experiment('compare')
tables = load_experiment('dman_tables')
next_item = load_experiment('next_item')
speed = load_experiment('next_item_speed')
cost = load_experiment('history_cost')
ranks = load_experiment('rank_speed')
item_fields = load_experiment('item_fields')

# ml_collections loads config files in a way that Python is going to drop.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
SMALL = [
  'model.width=4', 'batch_size=8', 'eval_batch_size=8', 'steps=4', 'eval_every=4',
  'optimizer.warmup_steps=0',
]  # fmt: skip
CHANGES = [f'--config.{change}' for change in SMALL]


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(meshes, 'make_mesh', lambda model, devices=None: mesh_of(1))


@pytest.fixture
def source(tmp_path):
  """Writes a log of twelve users with eight to nineteen of forty films; returns its path."""
  rng = np.random.default_rng(0)
  lines = ['user_id\tgender\tmovie_ids_in_time_order']
  for user in range(12):
    films = rng.permutation(40)[: 8 + user]
    lines.append(f'{user}\tF\t{",".join(map(str, films))}')
  path = tmp_path / 'sequences.tsv'
  path.write_text('\n'.join(lines) + '\n')
  return str(path)


def test_every_row_of_table_3_is_an_experiment():
  entries = tables.entries_of(3, [], CHANGES)
  assert list(entries) == list(tables.PAPER)
  for name, (label, config) in entries.items():
    assert config.model.name == name.rstrip('*') and config.latest == name.endswith('*')
    assert label == name.replace('*', '-latest') and config.data.name == 'movielens_1m_next'
    assert config.history_length == 20 or not name.endswith('*')


def test_both_models_of_a_pair_read_a_store_with_the_genres(source, tmp_path):
  films = tmp_path / 'movies.dat'
  lines = [f'{n}::Café {n}::{"Drama|War" if n % 3 else "Drama"}' for n in range(40)]
  films.write_text('\n'.join(lines), encoding='latin-1')
  changes = [*CHANGES, f'--config.data.source={source}']
  entries = item_fields.entries_of(['sasrec', 'hstu'], str(films), changes)
  assert [entry.config.model.item_fields for entry in entries] == [False, True] * 2
  store = compare.share_data(entries, [0], tmp_path / 'stores')
  assert store.widths['item.genres'] == 2
  of_film = dict(zip(store.raw_ids('item').to_pylist(), store.items['item.genres'], strict=False))
  genre = store.raw_ids('item.genres').to_pylist().index
  assert of_film['4'].tolist() == [genre('Drama'), genre('War')]
  assert of_film['3'][0] == genre('Drama') and of_film['3'][1] == store.vocabulary['item.genres']


def test_table_5_has_the_ablations():
  entries = tables.entries_of(5, [], CHANGES)
  variants = {k: e.config.model.get('variant') for k, e in entries.items()}
  assert variants == {
    'dman': 'full', 'sasrec': None, 'dman-xl': 'xl', 'dman-fifo': 'fifo', 'dman-nran': 'nran',
  }  # fmt: skip
  assert {e.config.data.source for e in entries.values()} == {'synthetic:interests'}


def fake_train(config, workdir, store):
  """A fake training: a report with invented numbers that depend on the name of the model."""
  columns = [f'{name}@{k}' for name in ('ndcg', 'hr') for k in (10, 50, 100)]

  def of(name):
    return {'overall': {'rows': 12} | {x: (k + len(name)) / 64 for k, x in enumerate(columns)}}

  report = {
    'config': config.to_dict(), 'columns': columns, 'step': 4, 'commit': '', 'devices': '1 device',
    'protocol': 'fake', 'fingerprint': store.fingerprint, 'counts': store.manifest['counts'],
    'test': of(config.model.name), 'baselines': {'test': {'markov': of('markov')}},
  }  # fmt: skip
  workdir.mkdir()
  (workdir / 'report.json').write_text(json.dumps(report))
  return report


@pytest.mark.parametrize('trains', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_table_has_the_numbers_of_the_paper(
  one_device, source, tmp_path, capsys, monkeypatch, trains
):
  if not trains:
    monkeypatch.setattr(loop, 'train', fake_train)
  flags = [f'--source={source}', '--models=dman,sasrec*', '--seeds=0', *CHANGES]
  result = tables.main([*flags, f'--workdir={tmp_path}', f'--log={tmp_path / "LOG.md"}'])
  dman = json.loads((tmp_path / 'dman-seed0' / 'report.json').read_text())
  overall = dman['test']['overall']
  assert overall['rows'] == 12 and result['lines']['dman']['hr@10'] == [overall['hr@10'], None]
  latest = json.loads((tmp_path / 'sasrec-latest-seed0' / 'report.json').read_text())
  assert latest['config']['latest'] and latest['config']['model']['name'] == 'sasrec'
  printed = capsys.readouterr().out
  rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in printed.splitlines()]
  by_name = {row[0]: row for row in rows if row}
  assert by_name[''][1:] == ['HR@10', 'HR@50', 'NDCG@100', 'the paper']
  assert by_name['dman'][1] == f'{overall["hr@10"]:.4f}'
  assert by_name['dman'][-1] == '25.18 / 53.24 / 22.03'
  assert by_name['sasrec*'][-1] == '21.02 / 47.28 / 19.05' and by_name['markov'][-1] == ''
  assert by_name['dman'][-1] in (tmp_path / 'LOG.md').read_text()


@pytest.mark.slow
def test_every_model_runs_on_another_set(one_device, tmp_path, capsys):
  rng = np.random.default_rng(0)
  path = tmp_path / 'Beauty_item_org_rank.txt'
  path.write_text(
    ''.join(
      f'{user} {" ".join(map(str, 1 + rng.permutation(40)[: 8 + user]))}\n' for user in range(12)
    )
  )
  flags = ['--set=amazon-beauty', f'--source={path}', '--models=sasrec,hpmn', '--seeds=0', *CHANGES]
  result = next_item.main([*flags, f'--workdir={tmp_path}', f'--log={tmp_path / "LOG.md"}'])
  printed = capsys.readouterr().out
  assert list(result['lines']) == ['popularity', 'markov', 'sasrec', 'hpmn']
  assert result['counts']['examples']['test'] == 12 and result['data'] == 'beauty_next'
  for name in ('sasrec', 'hpmn'):
    report = json.loads((tmp_path / f'{name}-seed0' / 'report.json').read_text())
    assert report['config']['model']['name'] == name
    assert f'{report["test"]["overall"]["ndcg@10"]:.4f}' in printed
  assert 'ties count against the model' in (tmp_path / 'LOG.md').read_text()
  with pytest.raises(UserError, match="--set='beauty'"):
    next_item.main(['--set=beauty', f'--source={path}'])


def test_entries_of_two_tasks_have_no_table(source, tmp_path):
  click = compare.read_entry('', f'{tables.CONFIGS}/douyin.py:din', [], [])
  following = tables.entries_of(3, ['dman'], CHANGES)['dman']
  with pytest.raises(UserError, match="dman is of the task 'next_item', douyin:din of 'click'"):
    compare.share_data([click, following], [0], tmp_path)


PEER = """#!/bin/sh
echo "$@" >>"$0.turns"
turns=$(wc -l <"$0.turns")
echo "{\\"targets_per_s\\": $turns, \\"users_per_s\\": 2, \\"hr10\\": 0.5, \\"train_s\\": 3}"
"""


@pytest.mark.slow
def test_speed_beside_a_peer(one_device, source, tmp_path):
  """The peer trains on 1, 2 and 3 targets a second in its three passes."""
  peer, path = tmp_path / 'python', tmp_path / 'out.json'
  peer.write_text(PEER)
  peer.chmod(0o755)
  sizes = ['--length=6', '--batch=4', '--width=4', '--segment=4', '--lanes=4', '--steps=2']
  speed.main([f'--source={source}', *sizes, f'--peers-python={peer}', f'--json={path}'])
  sasrec, dman, rectools = json.loads(path.read_text())['rows']
  assert [x['who'] for x in (sasrec, dman, rectools)] == ['sasrec', 'dman', 'RecTools sasrec']
  assert rectools['targets_per_s'] == 2 and rectools['high_targets_per_s'] == 3
  assert rectools['hr10'] == 0.5
  for row in (sasrec, dman):
    assert 0 < row['low_targets_per_s'] <= row['targets_per_s'] <= row['high_targets_per_s']
    assert row['by_targets_per_s'] == pytest.approx(row['targets_per_s'] / 2, rel=0.01)
    assert row['by_users_per_s'] == pytest.approx(row['users_per_s'] / 2, rel=0.01)
  assert '--length=6 --width=4 --batch=4' in (tmp_path / 'python.turns').read_text()


@pytest.mark.slow
def test_a_model_trains_for_half_of_the_minutes(one_device, source, tmp_path):
  sizes = ['--length=6', '--batch=4', '--width=4', '--steps=5', '--minutes=0.02']
  args = speed.parse([f'--source={source}', *sizes])
  began = time.perf_counter()
  result = speed.learn('sasrec', tmp_path, args)
  assert 0 <= result['hr10'] <= 1 and 0.1 < result['train_s'] < time.perf_counter() - began


@pytest.mark.slow
def test_targets_are_counted_without_padding(one_device, source, tmp_path):
  args = speed.parse([f'--source={source}', '--segment=6', '--lanes=4', '--width=4'])
  turn = speed.Turn('dman', tmp_path, args)
  setup = turn.training.setup
  V, source = setup.model.items, setup.sources['train']
  targets, _ = turn.training.steps(lambda batch: speed.targets(batch, V), 2, np.inf)
  batches = [source[k] for k in range(2)]
  assert targets == sum(((b['target'] > 0) & (b['target'] < V)).sum() for b in batches)
  assert targets < 2 * 4 * 6


def test_the_error_of_a_failed_peer_is_shown(source):
  args = speed.parse([f'--source={source}', '--peers-python=/bin/false'])
  with pytest.raises(RuntimeError, match='/bin/false rectools_sasrec.py: status 1'):
    speed.peer(args)


def test_ranking_in_blocks_beside_all_scores(monkeypatch, tmp_path):
  monkeypatch.setattr(ranks, 'SEEN', 5)
  path = tmp_path / 'out.json'
  ranks.main(['--items=30,300', '--width=4', '--passes=1', f'--json={path}'])
  rows = json.loads(path.read_text())['rows']
  assert [(x['items'], x['form']) for x in rows] == [
    (30, 'blocks'), (30, 'matrix'), (300, 'blocks'), (300, 'matrix'),
  ]  # fmt: skip
  assert all(x['users_per_s'] > 0 and x['held_mib'] > 0 for x in rows)
  # At least the matrix and the mask of all candidates.
  assert rows[3]['held_mib'] > 5 * 256 * 300 / 2**20
  wrong = jax.jit(lambda *x, mesh, V: x[2], static_argnames=('mesh', 'V'))
  monkeypatch.setattr(ranks, 'plain', wrong)
  with pytest.raises(AssertionError, match='Arrays are not equal'):
    ranks.main(['--items=30', '--width=4', '--passes=1'])


@pytest.mark.slow
def test_the_cost_of_histories(one_device, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(cost, 'USERS', 8)
  path = tmp_path / 'out.json'
  lengths, names = (96, 192), ('dman', 'sasrec')
  flags = [f'--lengths={",".join(map(str, lengths))}', f'--models={",".join(names)}']
  flags += ['--segment=4', '--width=4', '--passes=2', '--calls=2']
  cost.main([*flags, f'--json={path}'])
  rows = json.loads(path.read_text())['rows']
  assert [(x['model'], x['length']) for x in rows] == [(m, n) for m in names for n in lengths]
  # The state has the same size for any history.
  assert {x['state_kib'] for x in rows if x['model'] == 'dman'} == {rows[0]['state_kib']}
  assert rows[0]['state_kib'] > 0.5
  # Only the whole history costs more.
  assert all(row[name] > 0 for row in rows for name in ('step_ms', 'update_ms', 'score_ms'))
  assert '| dman ' in capsys.readouterr().out
