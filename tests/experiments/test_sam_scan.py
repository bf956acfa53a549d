"""The pass of SAM: both forms compute the same, and all results are reported."""

import argparse
import json

import jax
import pytest

from tests.runs import load_experiment

sam_scan = load_experiment('sam_scan')
SMALL = ['--batch=2', '--length=5', '--width=4', '--hidden=3', '--calls=1', '--passes=2']


@pytest.fixture(autouse=True)
def as_a_script():
  """Allows promotion of ranks, as in the script: the plain form needs it."""
  with jax.numpy_rank_promotion('allow'):
    yield


@pytest.mark.parametrize('queries', [1, 3])
def test_a_run(tmp_path, capsys, queries):
  path = tmp_path / 'out.json'
  sam_scan.main([*SMALL, f'--queries={queries}', f'--json={path}'])
  result = json.loads(path.read_text())
  assert [(row['who'], row['what']) for row in result['rows']] == [
    (f'jax {form}', what) for form in ('block', 'plain') for what in ('forward', 'gradient')
  ]
  assert all(0 < row['ms_low'] <= row['ms'] <= row['ms_high'] for row in result['rows'])
  assert max(result['difference'].values()) < 1e-4
  assert '| jax block | gradient |' in capsys.readouterr().out


def test_the_error_of_a_failed_peer_is_shown():
  args = argparse.Namespace(peers_python='/bin/false', **sam_scan.SIZES)
  with pytest.raises(RuntimeError, match='/bin/false torch_sam.py: status 1'):
    sam_scan.peers(args)
