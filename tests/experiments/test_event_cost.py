"""The script of the cost of event features runs every variant."""

import json

import pytest

from tests.runs import load_experiment

event_cost = load_experiment('event_cost')


@pytest.mark.slow
@pytest.mark.parametrize(
  'task, name, variants',
  [
    ('click', 'din', ['ids', 'numbers', 'events', 'buckets', 'bias']),
    ('next_item', 'gru4rec', ['ids', 'events', 'buckets']),
  ],
)
def test_a_run(tmp_path, capsys, task, name, variants):
  path = tmp_path / 'out.json'
  small = ['--batch=4', '--length=5', '--width=4', '--passes=2', '--calls=1']
  event_cost.main([f'--task={task}', f'--models={name}', *small, f'--json={path}'])
  rows = json.loads(path.read_text())['rows']
  assert [row['variant'] for row in rows] == variants
  assert rows[0]['to_ids'] == 1 and all(row['ms'] > 0 for row in rows)
  assert f'| {name} ' in capsys.readouterr().out
