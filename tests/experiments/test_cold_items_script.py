"""The script on cold items: a small run."""

import json

import pytest

from lmn_jax.distributed import mesh as meshes
from tests.runs import load_experiment, mesh_of

cold_items = load_experiment('cold_items')


@pytest.mark.slow
def test_rows_of_a_run(tmp_path, monkeypatch):
  monkeypatch.setattr(meshes, 'make_mesh', lambda model, devices=None: mesh_of(1))
  path = tmp_path / 'out.json'
  cold_items.main([
    '--models=pooling', '--rates=0.1', '--users=20', '--items=40', '--impressions=60', '--length=5',
    '--steps=5', '--batch=32', '--seeds=3', f'--json={path}',
  ])  # fmt: skip
  rows = json.loads(path.read_text())['rows']
  expected = [('item_user_mean', 'unknown'), ('pooling', 'unknown'), ('pooling', 'cold, 0.1')]
  assert [(row['who'], row['items']) for row in rows] == expected
  assert all(0 < row[f'{name}_3'] < 1 for row in rows for name in ('cold', 'known', 'all'))
