"""Whole runs small enough for a test: a log of 40 users, a model that compiles in a second."""

import contextlib
import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from jax.sharding import AxisType, Mesh

from lmn_jax import config as configs
from lmn_jax.data import prepare
from lmn_jax.data.batches import loader
from lmn_jax.training import setup as setups
from lmn_jax.training.checkpoint import Checkpoints
from lmn_jax.training.step_folders import steps_of

LOG = dict(users=40, items=60, categories=20, impressions=30)


def compiled_in(folder):
  """JAX's settings by which programs are kept in a folder, compiled."""
  return {
    'jax_compilation_cache_dir': folder,
    'jax_persistent_cache_min_compile_time_secs': 0.2,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }


def tiny_config(model='pooling', **fields):
  """An experiment on the tiny log; the fields of the model are `make_config`'s."""
  config = configs.base(model)
  config.data = configs.douyin_data(**LOG)
  config.data.rows_per_part = 400  # several parts
  config.model.update(dict(width=4, hidden=(8,)) | fields)
  if model == 'lmn':
    small = dict(slots_per_axis=8, top_k=3, query_width=8, query_hidden=8, positions=2, attention=4)
    config.model.update(small | fields)
  config.update(
    dict(history_length=8, batch_size=32, eval_batch_size=64, steps=16, log_every=2, eval_every=4,
         save_every=3)
  )  # fmt: skip
  return config


def tiny_next(model='dman', **fields):
  """An experiment of the next item on the tiny log's clicks; the fields are the model's."""
  config = configs.base(model, 'next_item')
  config.data = configs.douyin_data(**LOG)
  config.data.update(name='tiny_next', rows_per_part=400)
  config.data.split.protocol = 'leave_one_out'
  config.model.update(dict(width=4) | fields)
  if model == 'dman':
    config.model.slots = 3
  config.update(
    dict(history_length=4, batch_size=16, eval_batch_size=8, steps=16, log_every=2, eval_every=4,
         save_every=3)
  )  # fmt: skip
  return config


def untrained(config, folder):
  """(config, workdir, store) of a run whose only checkpoint is of weights as they begin.

  On one device: nothing of eight is compiled.
  """
  store = prepare.prepare(config.data, folder / 'stores')
  workdir = folder / 'run'
  workdir.mkdir()
  with pytest.MonkeyPatch.context() as patch, Checkpoints(workdir / 'checkpoints') as kept:
    patch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
    setup = setups.set_up(config, store)
    identity = config.to_dict() | {'store': store.fingerprint}
    kept.save(setup.trainer.init(config.seed), loader(setup.sources['train']), {}, identity)
    kept.validated(0, 0.5)
  return config, workdir, store


@contextlib.contextmanager
def compilations():
  """A list to which every program that is compiled meanwhile adds its seconds."""
  compiled = []

  def listen(event, seconds, **_):
    if event.endswith('backend_compile_duration'):
      compiled.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield compiled
    seen = len(compiled)
    jax.jit(lambda x: x + 1)(1)
    assert compiled.pop() and len(compiled) == seen, 'the event has another name'
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def saved(folder, state, source, taken, aucs):
  """Saves `state` under the steps of `aucs`, in order, each validated unless its AUC is None.

  The data have given `taken` batches.
  """
  data = loader(source)
  for _ in range(taken):
    next(data)
  with Checkpoints(folder) as checkpoints:
    for step, auc in aucs.items():
      checkpoints.save(state._replace(step=jnp.int32(step)), data, {'in_row': step}, {'seed': 0})
      if auc is not None:
        checkpoints.validated(step, auc)
    checkpoints.prune()
    return checkpoints.best(), checkpoints.latest()


def forget_flags(monkeypatch, argv):
  """Makes flags as they were before any command line, and `argv` the one to be parsed."""
  monkeypatch.setattr(sys, 'argv', argv)  # where config_flags looks for overrides
  for name in list(flags.FLAGS):
    if name.startswith(('config.', 'serve')):  # an override of the command line before
      delattr(flags.FLAGS, name)
    elif flags.FLAGS[name].present:
      flags.FLAGS[name].unparse()
  sys.modules.pop('config_config', None)  # ml_collections loads into the module of that name


def but_slow(cases, chosen):
  """Cases of a parametrised test, of which those whose number is not chosen are slow.

  cases: values, or tuples of them; a value that is a tuple stands in one.
  """
  return [
    pytest.param(
      *(case if isinstance(case, tuple) else (case,)),
      marks=() if number in chosen else pytest.mark.slow,
    )
    for number, case in enumerate(cases)
  ]


def load_experiment(name):
  """The module of a script in experiments/, which is no package: scripts import each other."""
  folder = str(Path(__file__).resolve().parents[1] / 'experiments')
  if folder not in sys.path:
    sys.path.append(folder)
  return importlib.import_module(name)


def mesh_of(data, model=1):
  """A mesh of the first data * model devices."""
  devices = np.array(jax.devices()[: data * model]).reshape(data, model)
  return Mesh(devices, ('data', 'model'), axis_types=(AxisType.Auto, AxisType.Auto))


def lines(workdir):
  """metrics.jsonl as dicts."""
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def steps_kept(workdir):
  """The steps that have a checkpoint."""
  return steps_of(workdir / 'checkpoints')
