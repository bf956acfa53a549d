"""The scripts on training with long histories: a run of each, on one device."""

import json

import pytest

from lmn_jax.distributed import mesh as meshes
from tests.runs import load_experiment, mesh_of

request_batches = load_experiment('request_batches')
train_lengths = load_experiment('train_lengths')


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(meshes, 'make_mesh', lambda model, devices=None: mesh_of(1))


@pytest.mark.slow
def test_requests_have_about_the_same_number_of_labels(tmp_path):
  path = tmp_path / 'out.json'
  request_batches.main([
    '--models=pooling', '--targets=1,4', '--length=8', '--users=20', '--impressions=60',
    '--batch=64', '--passes=1', '--steps=2', '--bias=-2', '--labels=200', '--seeds=3',
    f'--json={path}',
  ])  # fmt: skip
  one, four = json.loads(path.read_text())['rows']
  assert one['targets'] == 1 and one['requests'] == 64 and one['ratio'] == one['cpu_ratio'] == 1
  assert four['targets'] == 4 and 16 < four['requests'] < 64
  assert all(row['labels_per_s'] > 0 and 0 < row['auc_3'] < 1 for row in (one, four))


@pytest.mark.slow
def test_laws_of_lengths_have_their_mean_and_an_auc(tmp_path):
  path = tmp_path / 'out.json'
  train_lengths.main([
    '--models=pooling', '--laws=full,beta:0.2', '--length=64', '--recent=8', '--users=20',
    '--steps=40', '--seeds=3', f'--json={path}',
  ])  # fmt: skip
  full, beta = json.loads(path.read_text())['rows']
  assert (full['law'], full['mean'], full['cost']) == ('full', 1.0, 1.0)
  assert beta['law'] == 'beta:0.2' and 0.1 < beta['mean'] < 0.9
  assert all(row['cpu_seconds'] > 0 and 0 < row['auc_3'] < 1 for row in (full, beta))
