"""Layers with their gradients by the sizes of their blocks: what chose lmn_jax's block_sizes.py.

    python experiments/block_sizes.py [--topology=v5e:1x1] [--small] [--only=loss,attention]

Prints a JSON line for each layer and size. On the devices of this process: milliseconds, the median
of six calls of ten, and seconds of compilation. With --topology, compiled for that TPU and not run:
MiB of temporaries in its memory, and XLA's counts of operations and bytes, which count the body of
a loop once. `cudnn` is attention by jax.nn.dot_product_attention in bfloat16, on GPU only, beside
ours; packed sequences are a mask [B, 1, T, T].
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmn_jax.distributed import block_sizes
from lmn_jax.distributed import mesh as meshes
from lmn_jax.layers import losses, self_attention, target_attention
from lmn_jax.layers.target_attention import Queries, Unit
from lmn_jax.planning import slices
from lmn_jax.tables import embedding_bag


class Case(NamedTuple):
  """A function of arrays, their shapes, and the sizes to compare.

  integers: the bound of the integers of the arguments that are integers, by place.
  """

  fn: Callable
  shapes: tuple
  sizes: list[dict[str, int]]
  integers: dict[int, int] = {}
  dtype: str = 'float32'


def gradient(fn: Callable, count: int) -> Callable:
  """Returns the value and gradients of `sum cos(fn(...))` for the first `count` arguments."""

  def loss(*arguments):
    return jnp.sum(jnp.cos(fn(*arguments).astype(jnp.float32)))

  return jax.value_and_grad(loss, tuple(range(count)))


def unit(v_BLD, q_BQD, *unit):
  scores_BLQ, v_BLD = target_attention.unit_scores(
    v_BLD, Queries(q_BQD, None), Unit(*unit), 'sigmoid'
  )
  return target_attention.weighted_sum(scores_BLQ, v_BLD)


def loss(v_BTD, rows_VD, target_BT):
  return losses.softmax_loss(v_BTD, target_BT, jnp.ones(target_BT.shape), rows_VD, v_BTD.dtype)


def attention(q_BTHE, k_BTHE, v_BTHE, begin_BT):
  return self_attention.causal_attention(q_BTHE, k_BTHE, v_BTHE, 0 * begin_BT)


def cudnn(q_BTHE, k_BTHE, v_BTHE, begin_BT):
  T = q_BTHE.shape[1]
  seen_BTT = self_attention.causal_mask(jnp.arange(T)[None], 0 * begin_BT, T)
  return jax.nn.dot_product_attention(
    q_BTHE, k_BTHE, v_BTHE, mask=seen_BTT[:, None], implementation='cudnn'
  )


def bag(weights_TK, ids_TK, rows_RD):
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  return embedding_bag.read(mesh, rows_RD.shape[0], rows_RD, ids_TK, weights_TK)


def cases(small: bool) -> Iterator[tuple[str, Case]]:
  """The layers at the sizes of SAM over long histories, SASRec and LMN; small for a test."""
  B, L, T, V, R = (8, 64, 16, 99, 256) if small else (2048, 1000, 200, 3417, 2**16)
  D, H, E, lanes = 32, 16, 32, B // 8
  history = ((B, L, D), (B, 1, D), (4 * D, H), (H,), (H, 1), (1,))
  sizes = [
    dict(unit_floats=2**floats, unit_pairs=2**pairs)
    for floats, pairs in ((19, 11), (22, 20), (24, 20), (26, 20))
  ]
  yield 'unit', Case(gradient(unit, 6), history, sizes)
  sizes = [dict(loss_scores=2**k, loss_positions=2**20) for k in (20, 24, 26, 28)]
  rows = ((lanes, T, 2 * D), (V, 2 * D), (lanes, T))
  yield 'loss', Case(gradient(loss, 2), rows, sizes, {2: V})
  yield 'loss bf16', Case(gradient(loss, 2), rows, sizes, {2: V}, 'bfloat16')
  sizes = [
    dict(attention_whole=2**whole, attention_block=2**block, causal_pieces=pieces)
    for whole, block, pieces in ((22, 19, 4), (22, 19, 1), (27, 27, 4), (27, 27, 1))
  ]
  heads = ((lanes, T, 2, E),) * 3 + ((lanes, T),)
  yield 'attention', Case(gradient(attention, 3), heads, sizes, {3: T})
  yield 'attention bf16', Case(gradient(attention, 3), heads, sizes, {3: T}, 'bfloat16')
  if jax.default_backend() == 'gpu':
    yield 'cudnn', Case(gradient(cudnn, 3), heads, [{}], {3: T}, 'bfloat16')
  reads = ((2 * B, 32), (2 * B, 32), (R, 2 * D))
  yield 'bag', Case(gradient(bag, 1), reads, [dict(bag_rows=k) for k in (8, 16, 32)], {1: R})


def arguments_of(case: Case) -> list[jax.Array]:
  """Random arguments of a case."""
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(rng.integers(0, case.integers[k], shape), jnp.int32)
    if k in case.integers
    else jnp.asarray(rng.normal(size=shape), case.dtype)
    for k, shape in enumerate(case.shapes)
  ]


def measured(fn: Callable, case: Case, calls: int) -> dict:
  """Times a function on this process's device."""
  arguments, began = arguments_of(case), time.perf_counter()
  compiled = jax.jit(fn).lower(*arguments).compile()
  seconds, times = time.perf_counter() - began, []
  for _ in range(6):
    began = time.perf_counter()
    for _ in range(calls):
      result = compiled(*arguments)
    jax.block_until_ready(result)
    times.append((time.perf_counter() - began) / calls * 1e3)
  return dict(ms=round(sorted(times)[len(times) // 2], 3), compile_s=round(seconds, 1))


def planned(fn: Callable, case: Case, mesh) -> dict:
  """Compiles a function for the device of a mesh."""
  sharding = jax.sharding.NamedSharding(mesh, meshes.REPLICATED)
  shapes = [
    jax.ShapeDtypeStruct(shape, 'int32' if k in case.integers else case.dtype, sharding=sharding)
    for k, shape in enumerate(case.shapes)
  ]
  began = time.perf_counter()
  compiled = jax.jit(fn).trace(*shapes).lower(lowering_platforms=('tpu',)).compile()
  memory, counts = compiled.memory_analysis(), compiled.cost_analysis()
  return dict(
    temporaries_mib=round(memory.temp_size_in_bytes / 2**20),
    gflop=round(counts.get('flops', 0) / 1e9, 2),
    gb=round(counts.get('bytes accessed', 0) / 1e9, 2),
    compile_s=round(time.perf_counter() - began, 1),
  )


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--topology', default='')
  parser.add_argument('--small', action='store_true')
  parser.add_argument('--only', default='', help='layers, separated by commas')
  args = parser.parse_args(argv)
  devices = slices.slice_of(args.topology) if args.topology else jax.devices()
  mesh = meshes.make_mesh(devices=devices[:1])
  with meshes.use_mesh(mesh):
    platform = meshes.platform()
  default = block_sizes.SIZES[platform]
  print(json.dumps(dict(device=devices[0].device_kind, jax=jax.__version__)), flush=True)
  for name, case in cases(args.small):
    for sizes in case.sizes if not args.only or name in args.only.split(',') else ():
      block_sizes.SIZES[platform] = default._replace(**sizes)

      def fn(*arguments, case=case):
        with meshes.use_mesh(mesh):
          return case.fn(*arguments)

      result = planned(fn, case, mesh) if args.topology else measured(fn, case, 10)
      print(json.dumps(dict(layer=name, **sizes, **result)), flush=True)
  block_sizes.SIZES[platform] = default


if __name__ == '__main__':
  main()
