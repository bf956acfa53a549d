"""The speed of training: full histories for both, and ratios of the medians."""

import json

import numpy as np
import pytest

from lmn_jax.data.batches import BatchSource
from lmn_jax.data.prepare import prepare
from lmn_jax.distributed import mesh as meshes
from tests.runs import load_experiment, mesh_of

train_speed = load_experiment('train_speed')
SMALL = [
  '--users=6', '--items=9', '--samples=40', '--batch=8', '--width=4', '--attention=3',
  '--hidden=5', '--passes=3', '--steps=2',
]  # fmt: skip


def test_every_impression_has_a_full_history(tmp_path):
  folder, args = tmp_path / 'set', train_speed.parse(SMALL)
  train_speed.make_set(folder, 7, args)
  data = train_speed.make_config('din', folder, 7, args).data
  source = BatchSource(prepare(data, tmp_path / 'stores').path, 'train', 40, 7)
  assert (source.examples, source.batches) == (40, 1)
  assert source[0]['length'].tolist() == [7] * 40
  assert len(np.unique(source[0]['history'])) > 3 and len(np.unique(source[0]['user'])) > 3
  assert source[0]['label'].mean() == 0.5


PEER = """#!/bin/sh
echo "$@" >>"$0.turns"
echo "{\\"samples_per_s\\": $(wc -l <"$0.turns")}"
"""


def test_a_run(tmp_path, monkeypatch, capsys):
  """The peer trains on 1, 2 and 3 samples a second in its three passes."""
  monkeypatch.setattr(meshes, 'make_mesh', lambda model, devices=None: mesh_of(1))
  peer, path = tmp_path / 'python', tmp_path / 'out.json'
  peer.write_text(PEER)
  peer.chmod(0o755)
  flags = ['--lengths=3', '--models=din', f'--peers-python={peer}', f'--json={path}']
  train_speed.main([*SMALL, *flags])
  din, fuxi = json.loads(path.read_text())['rows']
  assert (din['who'], fuxi['who']) == ('din', 'FuxiCTR din') and din['length'] == 3
  assert 0 < din['low'] <= din['samples_per_s'] <= din['high']
  assert (fuxi['low'], fuxi['samples_per_s'], fuxi['high']) == (1, 2, 3)
  assert din['by_fuxictr'] == pytest.approx(din['samples_per_s'] / 2, rel=0.01)
  assert '--length=3 --users=6' in (tmp_path / 'python.turns').read_text()
  assert '| din ' in capsys.readouterr().out


def test_the_error_of_a_failed_peer_is_shown(tmp_path):
  args = train_speed.parse([*SMALL, '--peers-python=/bin/false'])
  with pytest.raises(RuntimeError, match='/bin/false fuxi_din.py: status 1'):
    train_speed.peer(tmp_path, 3, args)
