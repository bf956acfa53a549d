"""The parts of the search of a memory: each beside the function of JAX for it, in turns.

    python experiments/search_speed.py [--passes=30]

Prints a line for each: milliseconds of ours and of the other, the median over the passes (lowest).
`top_k` is product_keys.top_k beside lax.top_k for 512 queries on two axes of N keys; `gradients`
are those of product_keys.scores_at beside those of the product of queries and keys, 32 wide;
`owners` is table.owners beside jnp.unique for reads of a table of R rows.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from lmn_jax.layers import product_keys
from lmn_jax.tables import table

TOP_K = ((128, 32), (256, 16), (1024, 32), (2048, 32))  # N, K
OWNERS = ((16_384, 2**20), (81_920, 2**16), (81_920, 2**22))  # reads, R


def gradients(scores, Q: int, N: int, K: int, E: int = 32):
  """Arguments, and a function from them to the gradients of `scores(query, keys, axis, place)`."""
  keys = jax.random.split(jax.random.key(0), 4)
  query_12QE = jax.random.normal(keys[0], (1, 2, Q, E))
  keys_12NE = jax.random.normal(keys[1], (1, 2, N, E))
  place_12QK = jax.random.randint(keys[2], (1, 2, Q, K), 0, N, jnp.int32)
  g_12QK = jax.random.normal(keys[3], (1, 2, Q, K))

  def grad(arguments):
    query, keys, place, g = arguments
    axis = jnp.einsum('haqe,hane->haqn', query, keys)
    _, pull = jax.vjp(lambda query, keys: scores(query, keys, axis, place), query, keys)
    return pull(g)

  return grad, (query_12QE, keys_12NE, place_12QK, g_12QK)


def product_at(query_H2QE, keys_H2NE, axis_H2QN, place_H2QK):
  """product_keys.scores_at with the gradients of the product."""
  axis_H2QN = jnp.einsum('haqe,hane->haqn', query_H2QE, keys_H2NE)
  return jnp.take_along_axis(axis_H2QN, place_H2QK, axis=-1)


def in_turns(ours, other, argument, passes: int) -> str:
  """The times of two functions, called one after the other."""
  times = {ours: [], other: []}
  compiled = {f: jax.jit(f).lower(argument).compile() for f in times}
  for _ in range(passes + 2):
    for f, run in compiled.items():
      began = time.perf_counter()
      jax.block_until_ready(run(argument))
      times[f].append((time.perf_counter() - began) * 1e3)
  shown = [f'{statistics.median(t[2:]):.2f} ({min(t[2:]):.2f})' for t in times.values()]
  return f'ours {shown[0]} ms, other {shown[1]} ms'


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--passes', type=int, default=30)
  passes = parser.parse_args(arguments).passes
  for N, K in TOP_K:
    x_AQN = jax.random.normal(jax.random.key(0), (2, 512, N))

    def other(x, K=K):
      return jax.lax.top_k(x.reshape(-1, x.shape[-1]), K)

    print(
      f'top_k of {N}, K {K}:',
      in_turns(lambda x, K=K: product_keys.top_k(x, K), other, x_AQN, passes),
    )
    ours, case = gradients(product_keys.scores_at, 512, N, K)
    other = gradients(product_at, 512, N, K)[0]
    print(f'gradients of {N}, K {K}:', in_turns(ours, other, case, passes))
  for N, R in OWNERS:
    ids_N = jax.random.randint(jax.random.key(0), (N,), 0, R, jnp.int32)

    def unique(ids, N=N, R=R):
      return jnp.unique(ids, size=N, fill_value=R, return_inverse=True)

    shown = in_turns(lambda ids, R=R: table.owners(ids, R), unique, ids_N, passes)
    print(f'owners of {N:,} reads, {R:,} rows:', shown)


if __name__ == '__main__':
  main()
