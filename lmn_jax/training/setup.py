"""Builds what a config and a store define: mesh, model, batches and compiled functions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from lmn_jax import config as configs
from lmn_jax.data import labels, vectors
from lmn_jax.data.numeric import numeric_of
from lmn_jax.data.resident import Resident
from lmn_jax.data.store import Store
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import UserError
from lmn_jax.evaluation.criterion import criterion_of
from lmn_jax.layers.basic import Label, Number, Schema
from lmn_jax.models import registry
from lmn_jax.models.base import Model
from lmn_jax.tables import optimizers
from lmn_jax.training import program as programs
from lmn_jax.training import residence
from lmn_jax.training.program import Program
from lmn_jax.training.tasks import TASKS, Task
from lmn_jax.training.trainer import Trainer, compile_program


class Setup(NamedTuple):
  """What a config and a store define.

  sources: batches by split; those of training have no end. residents: the store on the devices by
  split; {} if it is on the host. program, trainer: of the model, and its compiled functions.
  """

  task: Task
  mesh: Mesh
  model: Model
  sources: dict[str, Any]
  residents: dict[str, Resident]
  program: Program
  trainer: Trainer


def check(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
  """Checks all of a config that does not depend on the data, before they are prepared.

  Args:
    config: the whole experiment. devices: of the mesh; by default those JAX runs on.

  Raises:
    UserError: a field is wrong; it names the field, its value and the bound.
  """
  configs.check(config)
  TASKS[config.task].check(config)
  registry.build(config.model.to_dict(), _schema_before_data(config.data), config.task)
  for group in ('dense', 'embedding', 'memory'):
    optimizers.make(config.optimizer, group, config.steps)
    if group != 'dense':
      optimizers.row_type(config.optimizer, group)
  criterion_of(config, TASKS[config.task].columns(config))
  data = meshes.make_mesh(config.mesh.model, devices).shape['data']
  for name in ('batch_size', 'eval_batch_size'):
    if config[name] % data:
      below = config[name] // data * data
      near = [str(size) for size in (below, below + data) if size]
      raise UserError(
        f'config.{name}={config[name]} is not divisible by the {data} devices of the data axis; '
        f'use {" or ".join(near)}'
      )


def set_up(
  config: ml_collections.ConfigDict, store: Store, devices: Sequence[jax.Device] | None = None
) -> Setup:
  """Builds the mesh, model, batches and functions of an experiment, without training.

  Args:
    config: the whole experiment. store: its data.
    devices: of the mesh; by default those JAX runs on.

  Raises:
    UserError: a value is out of its bounds, or patience needs a validation split.
  """
  check(config, devices)
  task, mesh = TASKS[config.task], meshes.make_mesh(config.mesh.model, devices)
  model = registry.build(config.model.to_dict(), schema_of(store), config.task)
  sources = task.sources(config, store, mesh)
  shapes = {
    name: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype)
    for name, x in sources['train'][0].items()
  }
  if config.patience and 'valid' not in sources:
    raise UserError(
      f'config.patience={config.patience} needs a validation split, and there is none; set it to '
      '0, or hold out config.data.split.valid'
    )
  # A plan for devices that are not here leaves the store on the host.
  residents = {} if devices is not None else residence.candidates(config, sources, mesh)
  cut = residents['train'].cut if residents else None
  program = programs.make(config, model, shapes, mesh, cut)
  trainer = compile_program(program)
  if residents and not residence.fits(config, residents, trainer.abstract, mesh):
    residents, program = {}, programs.make(config, model, shapes, mesh)
    trainer = compile_program(program)
  return Setup(task, mesh, model, sources, residents, program, trainer)


def _schema_before_data(data: ml_collections.ConfigDict) -> Schema:
  """Returns the fields of items, and the labels; other sizes and scales depend on the data."""
  codes, numbers = [], []
  for name in data.item_features:
    numeric = numeric_of(name, data.numeric[name]) if name in data.numeric else None
    if numeric is None or numeric.kind == 'bins':
      codes.append(f'item.{name}')
    else:
      numbers.append(Number(f'item.{name}', numeric.kind, 0.0, 1.0, numeric.count))
  of_labels = tuple(Label(name, data.label_kind) for name in labels.names(data))
  of_items = tuple((x.key, 0) for x in vectors.sources_of(data) if x.kind == 'item')
  return Schema((), item=tuple(codes), numbers=tuple(numbers), vectors=of_items, labels=of_labels)


def schema_of(store: Store) -> Schema:
  """Returns the fields of a store's batches."""
  numbers = store.manifest.get('numeric', {})
  return Schema(
    tuple(store.vocabulary.items()),
    **store.features,
    numbers=tuple(Number(key, **fitted) for key, fitted in numbers.items()),
    vectors=tuple((key, rows.shape[1]) for key, rows in store.vectors.items()),
    labels=_labels_of(store),
    cold_items=store.cold_items,
    widths=tuple((key, M) for key, M in store.widths.items() if M),
  )


def _labels_of(store: Store) -> tuple[Label, ...]:
  """The labels of a store, numbers with their mean and deviation over training."""
  if store.label_kind == 'click':
    return tuple(map(Label, store.labels))
  moments = [store.manifest['counts']['labels'][name] for name in store.labels]
  # Equal labels have the deviation 0; config_warnings.py warns of them.
  return tuple(
    Label(name, 'number', x['mean'], x['deviation'] or 1.0)
    for name, x in zip(store.labels, moments, strict=True)
  )


def identity_of(config: ml_collections.ConfigDict, store: Store) -> dict[str, Any]:
  """Returns what a checkpoint is saved with: the config, and the data's fingerprint as `store`."""
  return config.to_dict() | {'store': store.fingerprint}
