"""Runs of an earlier version: today's code evaluates and continues them with the same numbers."""

import json
import tarfile
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest

from lmn_jax import config as configs
from lmn_jax.training import loop, run_store, trained_run
from lmn_jax.training import setup as setups
from lmn_jax.training.checkpoint import Checkpoints
from tests.runs import lines

# Runs of pooling and DMAN with their stores, trained to step 8 on 8 CPU devices by version 0.1.0 of
# 2026-11-28, commit 765a2ee, when the package had no folders (JAX 0.10.2). after.npz and after.json
# of a run: the state, metrics and scores of that version after its continuation to step 12.
RUNS = Path(__file__).parent / 'runs_of_flat_package.tar.xz'
MODELS = ['pooling', pytest.param('dman', marks=pytest.mark.slow)]


def set_fields(section, fields):
  """Sets the fields of a section from JSON; a field that no longer exists is skipped."""
  for name, value in fields.items():
    if isinstance(section.get(name), ml_collections.ConfigDict) and len(section[name]):
      set_fields(section[name], value)
    elif name in section:
      with section.unlocked(), section.ignore_type():
        section[name] = tuple(value) if isinstance(value, list) else value


@pytest.fixture
def open_run(tmp_path):
  """Unpacks a run; returns (config, workdir, store, the results after step 12)."""

  def open_run(name):
    with tarfile.open(RUNS) as archive:
      archive.extractall(tmp_path, filter='data')
    folder = tmp_path / name
    saved = json.loads((folder / 'run/config.json').read_text())
    config = configs.base(saved['model']['name'], saved['task'])
    set_fields(config, saved)
    store = run_store.store_to_train(config, folder / 'run', folder / 'stores')
    assert store.fingerprint == saved['store']
    return config, folder / 'run', store, folder

  return open_run


def assert_same_numbers(values, expected):
  """Asserts equal structures of JSON. On the same machine all numbers are equal; compilers for
  other processors round differently."""

  def close(x, y):
    assert x == (pytest.approx(y, rel=1e-6, abs=1e-6) if isinstance(y, float) else y)

  jax.tree.map(close, json.loads(json.dumps(values)), expected)


@pytest.mark.parametrize('name', MODELS)
def test_evaluation_gives_the_metrics_of_then(name, open_run):
  config, workdir, store, _ = open_run(name)
  expected = json.loads((workdir / 'report.json').read_text())
  report = trained_run.evaluate_best(config, workdir, store)
  assert report['step'] == 8
  for part in ('valid', 'test', 'baselines', 'columns', 'parameters', 'tables'):
    assert_same_numbers(report[part], expected[part])


@pytest.mark.parametrize('name', MODELS)
def test_training_continues_to_the_state_of_then(name, open_run, capsys):
  config, workdir, store, folder = open_run(name)
  expected = json.loads((folder / 'after.json').read_text())
  config.steps = 12
  report = loop.train(config, workdir, store)
  assert 'resumed from step 8' in capsys.readouterr().err
  for part in ('valid', 'test'):
    assert_same_numbers(report[part], expected[part])
  assert_same_numbers(lines(workdir), expected['lines'])
  setup = setups.set_up(config, store)
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    assert (checkpoints.latest(), checkpoints.best()) == (12, expected['best'])
    assert_same_numbers(checkpoints.scores, expected['scores'])
    state = jax.device_get(checkpoints.restore(12, setup.trainer.abstract).state)
  arrays = {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }
  with np.load(folder / 'after.npz') as after:
    assert set(after) == set(arrays)
    for key, array in after.items():  # the rows of tables without their padding
      rows = arrays[key][: len(array)] if array.ndim else arrays[key]
      np.testing.assert_allclose(rows, array, rtol=1e-6, atol=1e-6, err_msg=key)
