"""A pass of SAM in PyTorch, a task of sam_scan.py: a JSON line for each form and program.

`plain` builds [B, L, Q, 4D], `block` splits W1 as layers/target_attention.py does. Eager; on a GPU
if torch has one. Needs only torch. sam_scan.py starts this script.
"""

import argparse
import json
import statistics
import time

import torch


def score(p, hidden):
  return torch.sigmoid(torch.sigmoid(hidden) @ p['w2'] + p['b2'])[..., 0]


def plain(p, q, v, m):
  """p [B, Q, D] of queries [B, Q, D], a history [B, L, D] and memory [B, Q, D]."""
  wide, q, m = v[:, :, None], q[:, None], m[:, None]
  x = torch.cat([q - wide, q * wide, m - wide, m * wide], dim=-1)
  return torch.einsum('blq,bld->bqd', score(p, x @ p['w1'] + p['b1']), v)


def block(p, q, v, m):
  """The same by one [L, D] x [D, Q h] product."""
  wa, wb, wc, wd = p['w1'].chunk(4)
  query_part = q @ wa + m @ wc + p['b1']
  mix = q[..., None] * wb + m[..., None] * wd - wa - wc
  B, Q, D, H = mix.shape
  hidden = torch.bmm(v, mix.permute(0, 2, 1, 3).reshape(B, D, Q * H)).unflatten(-1, (Q, H))
  return torch.einsum('blq,bld->bqd', score(p, query_part[:, None] + hidden), v)


FORMS = {'plain': plain, 'block': block}


def measure(form, gradient: bool, args: argparse.Namespace):
  """(milliseconds of the median call, MiB allocated beyond the arguments or None)."""
  cuda = torch.cuda.is_available()
  torch.manual_seed(0)
  B, L, D, Q, H = args.batch, args.length, args.width, args.queries, args.hidden
  shapes = {'w1': (4 * D, H), 'b1': (H,), 'w2': (H, 1), 'b2': (1,)}
  shapes |= {'q': (B, Q, D), 'v': (B, L, D), 'm': (B, Q, D)}
  leaves = {
    name: torch.randn(shape, device='cuda' if cuda else 'cpu') * (0.1 if name == 'w1' else 1)
    for name, shape in shapes.items()
  }
  for leaf in leaves.values():
    leaf.requires_grad_(gradient)
  q, v, m = (leaves[name] for name in 'qvm')
  held = torch.cuda.memory_allocated() if cuda else 0
  times = []
  for _ in range(args.calls + 1):
    began = time.perf_counter()
    out = form(leaves, q, v, m)
    if gradient:
      torch.autograd.grad((out**2).sum(), list(leaves.values()))
    if cuda:
      torch.cuda.synchronize()
    times.append((time.perf_counter() - began) * 1e3)
  extra = (torch.cuda.max_memory_allocated() - held) / 2**20 if cuda else None
  if cuda:
    torch.cuda.reset_peak_memory_stats()
  return statistics.median(times[1:]), extra


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  for name in ('batch', 'length', 'width', 'queries', 'hidden', 'calls'):
    parser.add_argument(f'--{name}', type=int, required=True)
  args = parser.parse_args()
  for name, form in FORMS.items():
    for what in ('forward', 'gradient'):
      ms, extra = measure(form, what == 'gradient', args)
      print(json.dumps({'form': name, 'what': what, 'ms': ms, 'temporaries_mib': extra}))


if __name__ == '__main__':
  main()
