"""Runs that are small enough for a test: a log of 40 users, a model that compiles in a second."""

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
from lmn_jax.training import setup as setups
from lmn_jax.training.checkpoint import Checkpoints
from lmn_jax.training.initial_state import initial_state
from lmn_jax.training.step_folders import steps_of

LOG = dict(users=40, items=60, categories=20, impressions=30)


def compiled_in(folder):
  """The settings of JAX that cache compiled programs in a folder."""
  return {
    'jax_compilation_cache_dir': folder,
    'jax_persistent_cache_min_compile_time_secs': 0.2,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }


def tiny_config(model='pooling', **fields):
  """A config of the click task on the tiny log. fields: of the model."""
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
  """A config of the next-item task on the tiny log's clicks. fields: of the model."""
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


def promotion_of(config):
  """A context for tracing a model: strict promotion of types, but not for BST in bfloat16, which
  calls JAX's attention, which promotes its float32 scores."""
  promotes = config.model.name == 'bst' and config.model.bf16
  return jax.numpy_dtype_promotion('standard' if promotes else 'strict')


def untrained(config, folder):
  """(config, workdir, store) of a run whose only checkpoint has the initial weights.

  On one device, so that no program for eight devices is compiled.
  """
  store = prepare.prepare(config.data, folder / 'stores')
  workdir = folder / 'run'
  workdir.mkdir()
  with pytest.MonkeyPatch.context() as patch, Checkpoints(workdir / 'checkpoints') as checkpoints:
    patch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
    setup = setups.set_up(config, store)
    identity = config.to_dict() | {'store': store.fingerprint}
    checkpoints.save(initial_state(setup, store, config.seed), {}, identity)
    checkpoints.validated(0, 0.5)
  return config, workdir, store


@contextlib.contextmanager
def compilations():
  """A list that gets the seconds of every compilation within the `with` block."""
  compiled = []

  def listen(event, seconds, **_):
    if event.endswith('backend_compile_duration'):
      compiled.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield compiled
    before = len(compiled)
    jax.jit(lambda x: x + 1)(1)
    assert compiled.pop() and len(compiled) == before, 'the event has another name'
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def saved(folder, state, aucs):
  """Saves `state` once for each step of `aucs`.

  Args:
    folder: of the checkpoints. state: of a trainer.
    aucs: step -> AUC of its validation; None if it is not validated.

  Returns:
    The best and the latest checkpoint.
  """
  with Checkpoints(folder) as checkpoints:
    for step, auc in aucs.items():
      checkpoints.save(state._replace(step=jnp.int32(step)), {'in_row': step}, {'seed': 0})
      if auc is not None:
        checkpoints.validated(step, auc)
    checkpoints.prune()
    return checkpoints.best(), checkpoints.latest()


def forget_flags(monkeypatch, argv):
  """Resets the flags to their state before any command line, and sets `argv` as the next one."""
  monkeypatch.setattr(sys, 'argv', argv)  # where config_flags looks for overrides
  for name in list(flags.FLAGS):
    if name.startswith(('config.', 'serve')):  # an override of the previous command line
      delattr(flags.FLAGS, name)
    elif flags.FLAGS[name].present:
      flags.FLAGS[name].unparse()
  sys.modules.pop('config_config', None)  # ml_collections loads config files as this module


def but_slow(cases, chosen):
  """The cases of a parametrised test; all but those with a chosen number are marked slow.

  cases: values, or tuples of values; a value that is itself a tuple is within another tuple.
  """
  return [
    pytest.param(
      *(case if isinstance(case, tuple) else (case,)),
      marks=() if number in chosen else pytest.mark.slow,
    )
    for number, case in enumerate(cases)
  ]


def load_experiment(name):
  """Imports a script of experiments/, which is not a package: scripts import each other by name."""
  folder = str(Path(__file__).resolve().parents[1] / 'experiments')
  if folder not in sys.path:
    sys.path.append(folder)
  return importlib.import_module(name)


def mesh_of(data, model=1):
  """A mesh of the first data * model devices."""
  devices = np.array(jax.devices()[: data * model]).reshape(data, model)
  return Mesh(devices, ('data', 'model'), axis_types=(AxisType.Auto, AxisType.Auto))


def lines(workdir):
  """The lines of metrics.jsonl as dicts."""
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def steps_kept(workdir):
  """The steps that have a checkpoint."""
  return steps_of(workdir / 'checkpoints')
