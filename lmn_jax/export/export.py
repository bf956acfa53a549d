"""`--mode=export`: one folder that scores without the model's code (layout: runtime/bundle.py).

The functions are those of the model, `model.apply` over another `read`: rows are taken out of the
tables as they are stored and made float32 where they are read. A model whose reads with weights
(LMN's memory) may be answered elsewhere is exported twice: as one function, and cut in two where
the sums come in.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow as pa
from flax import traverse_util
from jaxtyping import Array

from lmn_jax import files
from lmn_jax.data import texts, times, vocabulary
from lmn_jax.data.store import Store
from lmn_jax.errors import UserError, one_of
from lmn_jax.evaluation.report import origin
from lmn_jax.export.runtime import bundle
from lmn_jax.files import write_json
from lmn_jax.inference import segment_states
from lmn_jax.inference.state_table import fingerprint
from lmn_jax.models.base import Model
from lmn_jax.models.next_item.base import NextItemModel
from lmn_jax.tables import embedding_bag
from lmn_jax.tables.spec import TableSpec
from lmn_jax.training import experiment
from lmn_jax.training.program import State

PRECISIONS = ('float32', 'bfloat16', 'int8')
PLATFORMS = ('cpu', 'cuda', 'tpu')
BLOCK = 2**16  # items that are ranked at a time
ROWS = 2**18  # rows of a table that are rounded at a time
# Files that an export brings along; they import nothing of the package but each other.
COPIED = (bundle, segment_states, texts, times)

Stored = dict[str, Array]  # 'rows' [V, D], and 'scale' [V] where they are int8


def stored(rows_VD: np.ndarray, precision: str) -> dict[str, np.ndarray]:
  """Rows as a bundle holds them.

  Args:
    rows_VD: float32. precision: of PRECISIONS; bfloat16 rounds to nearest even, int8 to the nearest
      of 255 multiples of the row's largest absolute value / 127.
  """
  if precision == 'bfloat16':
    return {'rows': rows_VD.astype(jnp.bfloat16).view(np.uint16)}
  if precision == 'int8':
    scale_V = np.max(np.abs(rows_VD), axis=1) / np.float32(127)
    unit_V1 = np.where(scale_V > 0, scale_V, 1)[:, None]
    return {'rows': np.rint(rows_VD / unit_V1).astype(np.int8), 'scale': scale_V}
  return {'rows': rows_VD}


def restored(table: Stored) -> Array:
  """The float32 rows that stored ones stand for, exactly as they are read."""
  rows_VD = table['rows']
  if rows_VD.dtype == jnp.uint16:
    # The upper half of a float32. XLA on CPU would make float32 of a whole table of bfloat16.
    return jax.lax.bitcast_convert_type(rows_VD.astype(jnp.uint32) << 16, jnp.float32)
  if rows_VD.dtype == jnp.int8:
    return rows_VD.astype(jnp.float32) * table['scale'][..., None]
  return rows_VD


class StoredReader:
  """`read(name, ids[, weights])` over stored tables.

  Attributes:
    asked: (name, ids [T, K], weights [T, K]) of the reads with weights, in the order of the calls.
  """

  def __init__(
    self, tables: dict[str, Stored], specs: dict[str, TableSpec], sums_TD: Array | None = None
  ):
    """sums_TD: what the read with weights of a table that is not among `tables` gives."""
    self.asked: list[tuple[str, Array, Array]] = []
    self._tables, self._specs, self._sums_TD = tables, specs, sums_TD

  def _rows(self, name, ids):
    V = self._specs[name].rows
    at = jnp.where(ids < V, ids, V)
    table = self._tables[name]
    return restored({part: x.at[at].get(mode='fill', fill_value=0) for part, x in table.items()})

  def __call__(self, name: str, ids: Array, weights: Array | None = None) -> Array:
    if weights is None:
      return self._rows(name, ids)
    K, spec = ids.shape[-1], self._specs[name]
    ids_TK, weights_TK = ids.reshape(-1, K), weights.reshape(-1, K)
    self.asked.append((name, ids_TK, weights_TK))
    if name in self._tables:
      sums_TD = embedding_bag.sum_rows(
        lambda ids_T: self._rows(name, ids_T), spec.rows, spec.width, ids_TK, weights_TK
      )
    else:
      sums_TD = self._sums_TD
      if sums_TD is None:  # what comes of it is not looked at
        sums_TD = jnp.zeros((ids_TK.shape[0], spec.width))
    return sums_TD.reshape(*ids.shape[:-1], spec.width)


class Function(NamedTuple):
  """What is to be exported: fn of arguments of these shapes."""

  fn: Callable
  shapes: tuple


class Apply(NamedTuple):
  """A model over stored tables: `(dense, tables, batch, carry, sums_TD) -> (outputs, asked)`."""

  model: Model

  def __call__(self, dense, tables, batch, carry=None, sums_TD=None):
    read = StoredReader(tables, self.model.tables(), sums_TD)
    variables = traverse_util.unflatten_dict(dense, sep='/')
    return self.model.apply(variables, batch, read, {} if carry is None else carry), read.asked


def click_functions(
  model: Model, dense: dict[str, Any], tables: dict[str, Any], batch: dict[str, Any]
) -> tuple[dict[str, Function], str]:
  """The functions of a click model, and the table that it reads with weights, '' for none.

      score(dense, tables, batch) -> logits [b, q]
      ask(dense, tables, batch) -> ids [b q, K], weights [b q, K] into that table
      finish(dense, tables, batch, sums [b q, D]) -> logits [b, q]

  The last two, which do without that table, are there if one is read so.

  Args:
    model: the model. dense, tables: shapes of what is stored. batch: of the training.
  """
  apply, scope = Apply(model), jax.export.SymbolicScope()
  length = batch['history'].shape[1]
  L = f'{bundle.LENGTH_MULTIPLE}*l' if model.any_length else length
  asked = {}
  for name, x in batch.items():
    kind = name.partition('.')[0]
    if kind == 'item':
      asked[name] = symbolic(scope, x, 'b', 'q', *x.shape[1:])
    elif kind == 'history':
      asked[name] = symbolic(scope, x, 'b', L, *x.shape[2:])
    elif kind in ('user', 'context', 'length'):
      asked[name] = symbolic(scope, x, 'b', *x.shape[1:])

  def score(dense, tables, batch):
    return apply(dense, tables, batch)[0].value

  functions = {'score': Function(score, (dense, tables, asked))}
  names = set()
  jax.eval_shape(lambda *x: names.update(one[0] for one in apply(*x)[1]), dense, tables, asked)
  if not names:
    return functions, ''
  (name,) = names
  here = {key: table for key, table in tables.items() if key != name}

  def ask(dense, tables, batch):
    ((_, ids_TK, weights_TK),) = apply(dense, tables, batch)[1]
    return ids_TK, weights_TK

  def finish(dense, tables, batch, sums_TD):
    return apply(dense, tables, batch, sums_TD=sums_TD)[0].value

  sums = symbolic(scope, jnp.zeros(0), 'b*q', model.tables()[name].width)
  functions['ask'] = Function(ask, (dense, here, asked))
  functions['finish'] = Function(finish, (dense, here, asked, sums))
  return functions, name


def next_item_functions(
  model: NextItemModel, T: int, dense: dict[str, Any], tables: dict[str, Any]
) -> dict[str, Function]:
  """The functions of a next-item model.

      fold(dense, tables, batch, carry) -> carry           reads a full segment of each user
      vector(dense, tables, batch, carry) -> [b, D]        after the event `asked`
      rate(tables, vector [b, D], candidates [b, c]) -> scores [b, c]
      block(tables, vector [b, D], first) -> scores [b, S] of the S items from row `first` on

  Args:
    model: the model. T: events of a segment. dense, tables: shapes of what is stored.
  """
  apply, scope = Apply(model), jax.export.SymbolicScope()
  V, D = model.items, model.width
  ids = jnp.zeros(0, jnp.int32)
  segment = {
    'item': symbolic(scope, ids, 'b', T),
    'first': symbolic(scope, jnp.zeros(0, bool), 'b'),
    'user': symbolic(scope, ids, 'b'),
  }
  leaves, tree = jax.tree.flatten(model.carry({'item': jnp.zeros((1, T), jnp.int32)}))
  carried = [symbolic(scope, x, 'b', *x.shape[1:]) for x in leaves]
  vectors = symbolic(scope, jnp.zeros(0), 'b', D)

  def read_segment(dense, tables, batch, carry):
    return apply(dense, tables, batch, jax.tree.unflatten(tree, carry))[0]

  def fold(dense, tables, batch, carry):
    return jax.tree.leaves(read_segment(dense, tables, batch, carry).carry)

  def vector(dense, tables, batch, carry):
    return read_segment(dense, tables, batch, carry).value[:, 0]

  def rate(tables, vector_BD, candidate_BC):
    rows_BCD = StoredReader(tables, model.tables())('item', candidate_BC)
    return jnp.einsum('bd,bcd->bc', vector_BD, rows_BCD)

  def block(tables, vector_BD, first):
    parts = tables['item'].items()
    size = min(BLOCK, V)
    rows_SD = restored({k: jax.lax.dynamic_slice_in_dim(x, first, size) for k, x in parts})
    return vector_BD @ rows_SD.T

  asked = segment | {'asked': symbolic(scope, ids, 'b', 1)}
  candidates = symbolic(scope, ids, 'b', 'c')
  return {
    'fold': Function(fold, (dense, tables, segment, carried)),
    'vector': Function(vector, (dense, tables, asked, carried)),
    'rate': Function(rate, (tables, vectors, candidates)),
    'block': Function(block, (tables, vectors, jax.ShapeDtypeStruct((), jnp.int32))),
  }


def symbolic(scope: jax.export.SymbolicScope, like: Any, *dims: int | str) -> jax.ShapeDtypeStruct:
  """A shape with symbols for what may be any size, and the dtype of `like`."""
  shape = jax.export.symbolic_shape(','.join(map(str, dims)), scope=scope)
  return jax.ShapeDtypeStruct(shape, like.dtype)


def export(
  config: ml_collections.ConfigDict, workdir: Path, store: Store, to: Path, precision: str
) -> dict[str, Any]:
  """Exports the best checkpoint of a run.

  The folder is written beside its place, sealed, and then `to`, a symbolic link, is put on it: who
  reads `to` sees an old export or the new one, whole. Earlier folders stay.

  Args:
    config: of a run that was trained. workdir: of the run. store: its data. to: the link.
    precision: of the tables, see `stored`.

  Returns:
    'folder', 'bytes' by kind of file, 'metrics' by precision, 'opens_s' and 'seconds'.

  Raises:
    UserError: no checkpoint; several hosts; `to` is there and is no link; a run that is in use.
  """
  one_of('--precision', precision, PRECISIONS)
  if jax.process_count() > 1:
    raise UserError(f'--mode=export runs on one host, and these are {jax.process_count()}')
  if to.exists() and not to.is_symlink():
    raise UserError(f'--export={to} is there and is no link to an export; choose another name')
  experiment.check_trained(workdir)
  began = time.monotonic()
  with experiment.only_command(workdir):
    exp, best = experiment.best_of(config, workdir, store)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{to.name}-', dir=to.parent) as scratch:
      made = Path(scratch) / 'export'
      metrics = _write(made, config, store, exp, best, precision)
      folder = to.parent / f'{to.name}-{_name_of(made, precision)}'
      if folder.exists():  # of the same weights and functions
        shutil.rmtree(folder)
      made.rename(folder)
      link = Path(scratch) / 'link'
      link.symlink_to(folder.name)
      os.replace(link, to)
  opening = time.monotonic()
  bundle.Bundle(folder)
  now = time.monotonic()
  sizes = _sizes(folder)
  return dict(
    path=str(to), folder=folder.name, bytes=sizes, metrics=metrics, opens_s=now - opening,
    seconds=now - began,
  )  # fmt: skip


def _name_of(folder, precision):
  manifest = json.loads((folder / 'manifest.json').read_text())
  return f'{precision}-{manifest["fingerprint"][:12]}'


def _sizes(folder):
  """Bytes of the files by the folder they lie in."""
  found: dict[str, int] = {}
  for path in folder.rglob('*'):
    if path.is_file():
      kind = path.relative_to(folder).parts[0]
      found[kind] = found.get(kind, 0) + path.stat().st_size
  return found


def _write(folder, config, store, exp, best, precision):
  """Writes the whole folder; returns what the weights are worth at each precision."""
  folder.mkdir()
  state, specs = best.state, exp.model.tables()
  tables = {
    name: stored_table(np.asarray(jax.device_get(state.tables[name].rows_RD)), spec, precision)
    for name, spec in specs.items()
  }
  kept = {'params': jax.device_get(state.params), **jax.device_get(state.stats)}
  dense = traverse_util.flatten_dict(kept, sep='/')
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (dense, tables))
  T, whole, carry, pooled_table = config.history_length, False, [], ''
  if not exp.task.states:
    functions, pooled_table = click_functions(exp.model, *shapes, exp.sources['train'][0])
  else:
    functions = next_item_functions(exp.model, T, *shapes)
    whole = exp.model.whole and not config.latest
    one = exp.model.carry({'item': np.zeros((1, T), np.int32)})
    carry = [[list(x.shape[1:]), str(x.dtype)] for x in jax.tree.leaves(one)]
  mean = []  # of the rows, for shards that are out of reach
  if pooled_table:
    rows_VD = np.asarray(jax.jit(restored)(tables[pooled_table]))
    mean = rows_VD.mean(axis=0, dtype=np.float64).tolist()
  (folder / 'functions').mkdir()
  found = hashlib.sha256(fingerprint(state).encode() + store.fingerprint.encode())
  described = {}
  for name, (fn, of) in functions.items():
    exported = jax.export.export(jax.jit(fn), platforms=PLATFORMS)(*of)
    written = bytes(exported.serialize())
    found.update(written)
    (folder / f'functions/{name}.jax').write_bytes(written)
    described[name] = [_described(x) for x in of]
  np.savez(folder / 'dense.npz', allow_pickle=False, **dense)
  table_files = write_tables(folder / 'tables', tables)
  write_ids(folder / 'vocabulary/item', [store.raw_ids('item')])
  features = write_features(folder, config.data, store)
  write_users(folder, store, keep=0 if whole else T)
  metrics = measure(config, store, exp, state, tables, precision)
  write_json(
    folder / 'manifest.json',
    dict(
      format=bundle.FORMAT,
      task=config.task,
      model=config.model.name,
      fingerprint=found.hexdigest(),
      length=T,
      any_length=exp.model.any_length,
      whole=whole,
      carry=carry,
      block=min(BLOCK, store.vocabulary['item']),
      pooled=pooled_table,
      mean=mean,
      functions=described,
      tables={
        name: {
          'rows': spec.rows,
          'width': spec.width,
          'precision': precision,
          'files': table_files[name],
        }
        for name, spec in specs.items()
      },
      vocabulary={name: V for name, V in store.vocabulary.items() if name != 'user'},
      users=store.manifest['counts']['users'],
      timed=store.clock.timed,
      time=store.clock._asdict(),
      missing=list(config.data.missing),
      features=features,
      metrics=metrics,
      step=best.step,
      origin=origin(config, store),
      config=config.to_dict(),
      jax=jax.__version__,
    ),
  )
  for module in COPIED:
    assert module.__file__
    shutil.copy(module.__file__, folder)
  files.seal(folder)
  return metrics


def _described(argument):
  """Shapes of an argument of a function, as text."""
  return jax.tree.map(lambda x: f'{x.dtype}[{",".join(map(str, x.shape))}]', argument)


def stored_table(rows_RD: np.ndarray, spec: TableSpec, precision: str) -> dict[str, np.ndarray]:
  """A table as a bundle holds it: `stored` of its V rows, without what pads them in memory."""
  rows_VD = rows_RD[: spec.rows].astype(np.float32)
  pieces = [stored(rows_VD[k : k + ROWS], precision) for k in range(0, spec.rows, ROWS)]
  return {part: np.concatenate([piece[part] for piece in pieces]) for part in pieces[0]}


def write_tables(
  folder: Path, tables: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, str]]:
  """Writes stored tables; returns the file of each part."""
  folder.mkdir()
  files: dict[str, dict[str, str]] = {}
  for name, table in tables.items():
    files[name] = {}
    for part, x in table.items():
      file = f'{name}.npy' if part == 'rows' else f'{name}.{part}.npy'
      np.save(folder / file, x, allow_pickle=False)
      files[name][part] = f'tables/{file}'
  return files


def write_ids(folder: Path, columns: Iterable[pa.ChunkedArray | pa.Array]) -> None:
  """Writes raw ids as `bundle.Ids` reads them; null, the unknown, is an empty text.

  Those of older stores may be spelt in other ways than texts.py has them; here they are not.

  Args:
    folder: to make. columns: the ids by row, piece by piece.
  """
  folder.mkdir(parents=True)
  sizes, hashes = [0], []
  with (folder / 'text.bin').open('wb') as file:
    for column in columns:
      for raw in column.to_pylist():
        text = texts.value(raw, frozenset()).encode('utf-8')
        file.write(text)
        sizes.append(len(text))
        hashes.append(bundle.hash_of(text))
  hash_V = np.array(hashes, np.uint64)
  order_V = np.argsort(hash_V, kind='stable').astype(np.int32)
  np.save(folder / 'offsets.npy', np.cumsum(np.array(sizes, np.int64)))
  np.save(folder / 'hashes.npy', hash_V[order_V])
  np.save(folder / 'order.npy', order_V)


def write_features(
  folder: Path, data: ml_collections.ConfigDict, store: Store
) -> dict[str, dict[str, Any]]:
  """Writes the features' vocabularies and the items' codes; returns what the manifest says."""
  found = {}
  for feature in vocabulary.features_of(data):
    key = feature.key
    write_ids(folder / 'vocabulary' / key, [store.raw_ids(key)])
    found[key] = dict(
      kind=feature.kind,
      name=feature.name,
      separator=feature.separator,
      width=store.widths[key],
      edges=store.manifest['bins'].get(key),
    )
  (folder / 'items').mkdir()
  for key, codes in store.items.items():
    np.save(folder / f'items/{key}.npy', codes)
  return found


def write_users(folder: Path, store: Store, keep: int) -> None:
  """Writes all users of the log.

  Of each the newest `keep` events are written, 0 keeps all, and the items of those before, each
  once, so that what the user has met is known.
  """
  write_ids(folder / 'vocabulary/user', [store.user_ids(k) for k in range(len(store.parts))])
  columns: dict[str, list[np.ndarray]] = {}
  for part in store.parts:
    offset, count = part.users['offset'], part.users['count']
    size = np.minimum(count, keep) if keep else count
    newest = _spans(offset + count - size, size)
    met, met_count = _different(part.history['item'], offset, count - size)
    found = dict(
      row=part.users['row'], history=part.history['item'][newest],
      event_time=part.history['time'][newest], count=size, met=met, met_count=met_count,
      **{key: part.users[key] for key in store.features['user']},
    )  # fmt: skip
    for name, column in found.items():
      columns.setdefault(name, []).append(column)
  whole = {name: np.concatenate(pieces) for name, pieces in columns.items()}
  for count, offset in (('count', 'offset'), ('met_count', 'met_offset')):
    whole[offset] = np.concatenate([[0], np.cumsum(whole.pop(count))])
  (folder / 'users').mkdir()
  for name, x in whole.items():
    np.save(folder / f'users/{name}.npy', x)


def _spans(first, size):
  """Indices of spans, one after the other."""
  return np.repeat(first - (np.cumsum(size) - size), size) + np.arange(size.sum())


def _different(item, first, size):
  """The different items but the unknown of each user's span, and how many these are."""
  user = np.repeat(np.arange(len(size), dtype=np.int64), size)
  rows = item[_spans(first, size)].astype(np.int64)
  found = np.unique((user << 32 | rows)[rows > 0])
  return (found & 0xFFFFFFFF).astype(np.int32), np.bincount(found >> 32, minlength=len(size))


def measure(
  config: ml_collections.ConfigDict,
  store: Store,
  exp: experiment.Experiment,
  state: State,
  tables: dict[str, dict[str, np.ndarray]],
  precision: str,
) -> dict[str, dict[str, dict[str, float]]]:
  """The metrics of what is held out with float32 rows, and with those that are stored."""

  def of(state):
    return {
      split: {
        name: found[name]
        for found in [experiment.evaluate_split(config, store, exp, state, split)['overall']]
        for name in exp.task.columns(config)
      }
      for split in exp.sources
      if split != 'train'
    }

  found = {'float32': of(state)}
  if precision != 'float32':
    rounded = dict(state.tables)
    for name, table in tables.items():
      rows_RD = rounded[name].rows_RD
      rows_VD = np.asarray(jax.jit(restored)(table))
      filled = np.pad(rows_VD, ((0, rows_RD.shape[0] - len(rows_VD)), (0, 0)))
      placed = jax.device_put(filled.astype(rows_RD.dtype), rows_RD.sharding)
      rounded[name] = rounded[name]._replace(rows_RD=placed)
    found[precision] = of(state._replace(tables=rounded))
  return found


def lines_of(found: dict[str, Any]) -> str:
  """What `export` did, a line each for sizes, metrics and time."""
  sizes = ', '.join(f'{kind} {size / 2**20:,.1f}' for kind, size in sorted(found['bytes'].items()))
  total = sum(found['bytes'].values()) / 2**20
  base = found['metrics']['float32']
  worth = [] if base else ['nothing is held out to measure on']
  for precision, splits in found['metrics'].items():
    for split, values in splits.items():
      criterion = next(iter(values))
      value, change = values[criterion], values[criterion] - base[split][criterion]
      worth.append(f'{precision}: {split} {criterion} {value:.5f} ({change:+.5f})')
  return (
    f'{found["path"]} -> {found["folder"]}: {total:,.1f} MiB ({sizes})\n'
    f'{"; ".join(worth)}\n'
    f'opens in {found["opens_s"]:.2f} s; exported in {found["seconds"]:.1f} s'
  )
