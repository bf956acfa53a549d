"""Ranking among up to a million items: in blocks, and with a matrix of all scores.

    python experiments/rank_speed.py [--items=3416,100000,1000000]

Ranks the targets of 256 queries, each with 512 excluded items, width 64, among all items: by
`ranking.ranks`, which holds a block of scores, and by the plain form, which holds all of them,
compiled too. The script fails unless both give the same ranks. In every pass both take turns;
reported are medians over the passes, and the memory beside the arguments, as XLA counts it.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from step_cost import mib, show

from lmn_jax.distributed import mesh as meshes
from lmn_jax.evaluation import ranking

QUERIES, SEEN = 256, 512


@functools.partial(jax.jit, static_argnames=('mesh', 'V'))
def plain(rows_VD, query_QD, target_Q, seen_QS, mesh, V):
  """As ranking.ranks, with all scores at once."""
  del mesh
  score_QV = query_QD @ rows_VD.T
  rival_QV = jnp.ones(score_QV.shape, bool).at[:, 0].set(False)
  every_Q = jnp.arange(len(target_Q))
  rival_QV = rival_QV.at[every_Q[:, None], seen_QS].set(False, mode='drop')
  rival_QV = rival_QV.at[every_Q, target_Q].set(False)
  target_score_Q1 = jnp.take_along_axis(score_QV, target_Q[:, None], axis=1)
  return 1 + jnp.sum(rival_QV & ~(score_QV < target_score_Q1), axis=1, dtype=jnp.int32)


def measure(V: int, args: argparse.Namespace) -> list[dict]:
  """A row for each form, at V items."""
  rng, mesh = np.random.default_rng(0), meshes.make_mesh(1, jax.devices()[:1])
  placed = jax.device_put(
    (
      # Whole numbers: sums are exact in any order.
      rng.integers(-9, 10, (V, args.width)).astype(np.float32),
      rng.integers(-9, 10, (QUERIES, args.width)).astype(np.float32),
      rng.integers(1, V, QUERIES).astype(np.int32),
      rng.integers(1, V, (QUERIES, SEEN)).astype(np.int32),
    )
  )
  forms, held, seconds = {'blocks': ranking.ranks, 'matrix': plain}, {}, {}
  ranks_by_form = {}
  for name, form in forms.items():
    compiled = form.lower(*placed, mesh=mesh, V=V).compile()
    held[name] = compiled.memory_analysis().temp_size_in_bytes
    ranks_by_form[name] = np.asarray(form(*placed, mesh=mesh, V=V))
  np.testing.assert_array_equal(ranks_by_form['blocks'], ranks_by_form['matrix'])
  for _ in range(args.passes):
    for name, form in forms.items():
      began = time.perf_counter()
      form(*placed, mesh=mesh, V=V).block_until_ready()
      seconds.setdefault(name, []).append(time.perf_counter() - began)
  return [
    {
      'items': V,
      'form': name,
      'users_per_s': round(QUERIES / statistics.median(seconds[name])),
      'held_mib': round(mib(held[name]), 1),
    }
    for name in forms
  ]


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--items', type=lambda x: [int(n) for n in x.split(',')], default=[3_416, 100_000, 1_000_000]
  )
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--passes', type=int, default=7)
  parser.add_argument('--json', default='', help='where to write all of it')
  args = parser.parse_args(arguments)
  show([row for V in args.items for row in measure(V, args)], args)


if __name__ == '__main__':
  main()
