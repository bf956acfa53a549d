"""A pass of SAM over a history: time and memory of the block form and of the plain formula.

    python experiments/sam_scan.py [--batch=128] [--length=1000] [--width=32] [--json=PATH]
    python experiments/sam_scan.py --peers-python=PATH      # one that has torch: torch_sam.py
    python experiments/sam_scan.py --batch=1 --queries=500  # candidates of one user

    x_j = [q - v_j ; q * v_j ; m - v_j ; m * v_j]
    p = sum_j sigmoid(w2 . sigmoid(W1 x_j + b1) + b2) v_j

`block` is target_attention.TargetAttention, the module of the model; `plain` builds [B, L, Q, 4D];
both have the same weights, and their results are compared. `forward` is p, `gradient` that of
sum(p^2) with respect to the weights, q, v and m; float32, all positions real. In every pass all
take turns, each for some calls that are waited for. Reported are the median over the passes of
their median call, the lowest and the highest pass, and the temporaries reported by the compiler
(for PyTorch on a GPU, the additional allocation).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from step_cost import markdown

from lmn_jax.layers.target_attention import TargetAttention


class Arguments(NamedTuple):
  """params: of TargetAttention. q_BQD, m_BQD: queries and memory. v_BLD: the history."""

  params: dict
  q_BQD: jax.Array
  v_BLD: jax.Array
  m_BQD: jax.Array


def block(x: Arguments) -> jax.Array:
  """p [B, Q, D], by the module of the model."""
  mask_BL = jnp.ones(x.v_BLD.shape[:2], bool)
  unit = TargetAttention(x.params['w1'].shape[1], gate='sigmoid')
  return unit.apply({'params': x.params}, x.q_BQD, x.v_BLD, mask_BL, x.m_BQD)[0]


def plain(x: Arguments) -> jax.Array:
  """p [B, Q, D], by the plain formula."""
  v = x.v_BLD[:, :, None]
  q, m = x.q_BQD[:, None], x.m_BQD[:, None]
  x_BLQ4D = jnp.concatenate([q - v, q * v, m - v, m * v], axis=-1)
  hidden_BLQH = jax.nn.sigmoid(x_BLQ4D @ x.params['w1'] + x.params['b1'])
  second = x.params['Dense_0']
  w_BLQ = jax.nn.sigmoid(hidden_BLQH @ second['kernel'] + second['bias'])[..., 0]
  return jnp.einsum('blq,bld->bqd', w_BLQ, x.v_BLD)


FORMS = {'block': block, 'plain': plain}


def make_arguments(B: int, L: int, D: int, Q: int, hidden: int) -> Arguments:
  """Unit-normal queries and histories, weights of the usual scale."""
  rng = np.random.default_rng(0)

  def normal(*shape, scale=1.0):
    return jnp.asarray(scale * rng.standard_normal(shape, np.float32))

  params = {
    'w1': normal(4 * D, hidden, scale=(4 * D) ** -0.5),
    'b1': normal(hidden),
    'Dense_0': {'kernel': normal(hidden, 1, scale=hidden**-0.5), 'bias': normal(1)},
  }
  return Arguments(params, normal(B, Q, D), normal(B, L, D), normal(B, Q, D))


def programs(x: Arguments) -> dict[tuple[str, str], jax.stages.Compiled]:
  """Compiled functions, by (form, 'forward' or 'gradient')."""

  def gradient(form):
    return jax.grad(lambda x: jnp.sum(form(x) ** 2))

  return {
    (name, what): jax.jit(f).lower(x).compile()
    for name, form in FORMS.items()
    for what, f in (('forward', form), ('gradient', gradient(form)))
  }


def difference(x, y) -> float:
  """The largest difference of two trees, relative to the largest element of each leaf."""

  def of_leaf(a, b):
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))

  return max(jax.tree.leaves(jax.tree.map(of_leaf, x, y)))


def median_call(call: Callable, calls: int) -> float:
  """Milliseconds of the median of some calls, after one that is not timed."""
  times = []
  for _ in range(calls + 1):
    began = time.perf_counter()
    jax.block_until_ready(call())
    times.append((time.perf_counter() - began) * 1e3)
  return statistics.median(times[1:])


def peers(args: argparse.Namespace) -> list[dict]:
  """One pass of PyTorch: a line for each form and program.

  Raises:
    RuntimeError: with the last line of its output, if it fails.
  """
  script = Path(__file__).with_name('torch_sam.py')
  sizes = [f'--{name}={getattr(args, name)}' for name in SIZES]
  done = subprocess.run(
    [args.peers_python, '-W', 'ignore', str(script), *sizes], capture_output=True, text=True
  )
  if done.returncode:
    message = (done.stderr.strip().splitlines() or [''])[-1]
    raise RuntimeError(f'{args.peers_python} torch_sam.py: status {done.returncode} {message}')
  return [json.loads(line) for line in done.stdout.splitlines()]


def measure(args: argparse.Namespace) -> tuple[list[dict], dict[str, float]]:
  """(a row for each contestant and program, the difference of the two forms in each program)."""
  x = make_arguments(args.batch, args.length, args.width, args.queries, args.hidden)
  compiled = programs(x)
  differ = {
    what: difference(compiled['block', what](x), compiled['plain', what](x))
    for what in ('forward', 'gradient')
  }
  times, temporaries = {}, {}
  for _ in range(args.passes):
    for (name, what), program in compiled.items():
      key = (f'jax {name}', what)
      ms = median_call(lambda program=program: program(x), args.calls)
      times.setdefault(key, []).append(ms)
      temporaries[key] = program.memory_analysis().temp_size_in_bytes / 2**20
    for line in peers(args) if args.peers_python else []:
      key = (f'torch {line["form"]}', line['what'])
      times.setdefault(key, []).append(line['ms'])
      temporaries[key] = line['temporaries_mib']
  rows = [
    {
      'who': who,
      'what': what,
      'ms': round(statistics.median(ms), 3),
      'ms_low': round(min(ms), 3),
      'ms_high': round(max(ms), 3),
      'temporaries_mib': None if temporaries[who, what] is None
      else round(temporaries[who, what], 1),
    }
    for (who, what), ms in times.items()
  ]  # fmt: skip
  return rows, differ


SIZES = {'batch': 128, 'length': 1000, 'width': 32, 'queries': 1, 'hidden': 8, 'calls': 10}


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  for name, value in SIZES.items():
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--passes', type=int, default=7)
  parser.add_argument('--peers-python', default='', help='a Python that has torch')
  parser.add_argument('--json', default='', help='where to write all of it')
  args = parser.parse_args(argv)
  rows, differ = measure(args)
  print(markdown(rows))
  print(f'largest difference of block and plain: {differ}')
  if args.json:
    report = {
      'arguments': vars(args),
      'rows': rows,
      'difference': differ,
      'device': jax.devices()[0].device_kind,
      'version': f'jax {jax.__version__}',
      'python': sys.version.split()[0],
    }
    Path(args.json).write_text(json.dumps(report, indent=1))


if __name__ == '__main__':
  main()
