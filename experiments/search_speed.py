"""What the search of a memory is made of: each piece beside what JAX has for it, in turns.

    python experiments/search_speed.py [--passes=30]

Prints a line for each: milliseconds of ours and of the other, the median over the passes (lowest).
`top_k` is memory.top_k beside lax.top_k for 512 queries on two axes of N keys, `owners` is
table.owners beside jnp.unique for reads of a table of R rows.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from lmn_jax import memory, table

TOP_K = ((128, 32), (256, 16), (1024, 32), (2048, 32))  # N, K
OWNERS = ((16_384, 2**20), (81_920, 2**16), (81_920, 2**22))  # reads, R


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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--passes', type=int, default=30)
  passes = parser.parse_args().passes
  for N, K in TOP_K:
    x_AQN = jax.random.normal(jax.random.key(0), (2, 512, N))

    def other(x, K=K):
      return jax.lax.top_k(x.reshape(-1, x.shape[-1]), K)

    print(
      f'top_k of {N}, K {K}:', in_turns(lambda x, K=K: memory.top_k(x, K), other, x_AQN, passes)
    )
  for N, R in OWNERS:
    ids_N = jax.random.randint(jax.random.key(0), (N,), 0, R, jnp.int32)

    def unique(ids, N=N, R=R):
      return jnp.unique(ids, size=N, fill_value=R, return_inverse=True)

    shown = in_turns(lambda ids, R=R: table.owners(ids, R), unique, ids_N, passes)
    print(f'owners of {N:,} reads, {R:,} rows:', shown)


if __name__ == '__main__':
  main()
