"""One training step of a product-key memory in PyTorch, a task of step_cost.py: a JSON line.

    python experiments/torch_pkm.py pkm --slots=1048576

Contestants: `pkm`, PKM of product-key-memory under torch.optim.Adam with their defaults; `bag` and
`rows`, hand-tuned: only pairs of ranks that can be among the best are ranked, and the values have
sparse gradients, of an EmbeddingBag or of gathered rows, under SparseAdam, the rest under fused
Adam. SparseAdam does not change the moments of untouched rows.

Runs on a GPU if torch has one. Needs torch, and product-key-memory for `pkm`.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from torch import nn

WARMUP = 5  # steps that are not timed
RATE = 1e-3


class TunedMemory(nn.Module):
  """A hand-tuned memory in PyTorch: queries [B, D] -> sums of values [B, D].

  Attributes:
    kind: 'bag' sums the rows in an EmbeddingBag; 'rows' gathers them, then multiplies.
  """

  def __init__(self, kind: str, slots: int, K: int, D: int):
    super().__init__()
    self.kind, self.K, self.N = kind, K, math.isqrt(slots)
    E = D // 2
    self.query = nn.Linear(D, D, bias=False)
    self.norm = nn.LayerNorm(E)
    self.keys = nn.Parameter(torch.randn(2, self.N, E) / math.sqrt(E))
    table = nn.EmbeddingBag if kind == 'bag' else nn.Embedding
    self.values = table(
      slots, D, sparse=True, _weight=torch.randn(slots, D).div_(math.sqrt(D)),
      **{'mode': 'sum'} if kind == 'bag' else {},
    )  # fmt: skip
    # At least (p + 1)(r + 1) sums of two sorted lists are at or above the sum of ranks p and r.
    rank = torch.arange(1, K + 1)
    p, r = (rank[:, None] * rank <= K).nonzero(as_tuple=True)
    self.register_buffer('p', p, persistent=False)
    self.register_buffer('r', r, persistent=False)

  def forward(self, x):
    q = self.norm(self.query(x).unflatten(-1, (2, -1)))
    best, place = torch.matmul(q.transpose(0, 1), self.keys.mT).topk(self.K)
    scores, pair = (best[0][:, self.p] + best[1][:, self.r]).topk(self.K)
    slots = self.N * place[0].gather(1, self.p[pair]) + place[1].gather(1, self.r[pair])
    weights = scores.softmax(-1)
    if self.kind == 'bag':
      return self.values(slots, per_sample_weights=weights)
    return torch.matmul(weights[:, None], self.values(slots))[:, 0]


class Package(nn.Module):
  """PKM of product-key-memory for queries [B, D]."""

  def __init__(self, slots: int, K: int, D: int):
    super().__init__()
    from product_key_memory import PKM

    self.memory = PKM(D, heads=1, num_keys=math.isqrt(slots), topk=K, dim_head=D // 2)

  def forward(self, x):
    return self.memory(x[None])[0]


def build(contestant: str, slots: int, K: int, D: int, device: str):
  """(module, optimizers) of a contestant; the slots are a square number."""
  if contestant == 'pkm':
    model = Package(slots, K, D).to(device)
    return model, [torch.optim.Adam(model.parameters(), lr=RATE)]
  model = TunedMemory(contestant, slots, K, D).to(device)
  values = list(model.values.parameters())
  rest = [x for name, x in model.named_parameters() if not name.startswith('values')]
  sparse = torch.optim.SparseAdam(values, lr=RATE)
  return model, [torch.optim.Adam(rest, lr=RATE, fused=True), sparse]


def step(model, optimizers, x, target) -> float:
  """One step on the mean squared difference; returns the loss."""
  loss = nn.functional.mse_loss(model(x), target)
  for optimizer in optimizers:
    optimizer.zero_grad()
  loss.backward()
  for optimizer in optimizers:
    optimizer.step()
  return loss.item()


def peak_mib() -> float | None:
  """The peak of the resident memory of this process in MiB, None off Linux."""
  status = Path('/proc/self/status')
  lines = status.read_text().splitlines() if status.exists() else []
  peaks = [line.split()[1] for line in lines if line.startswith('VmHWM:')]
  return round(int(peaks[0]) / 1024, 1) if peaks else None


def measure(contestant: str, slots: int, B: int, K: int, D: int, steps: int, seconds: float):
  """The keys of a line of step_cost.py."""
  cuda = torch.cuda.is_available()
  device = 'cuda' if cuda else 'cpu'
  pool = torch.randn(2, WARMUP + steps, B, D, device=device)
  start = peak_mib()
  model, optimizers = build(contestant, slots, K, D, device)
  times, loss, clock = [], 0.0, 0.0
  for i in range(WARMUP + steps):
    began = time.perf_counter()
    loss = step(model, optimizers, pool[0, i], pool[1, i])
    ended = time.perf_counter()
    if i >= WARMUP:
      times.append((ended - began) * 1e3)
      clock += ended - began
    if len(times) >= 5 and clock > seconds:
      break
  # Values and two accumulators; only these depend on the number of slots.
  state = 3 * slots * D * 4 / 2**20
  peak_device = round(torch.cuda.max_memory_allocated() / 2**20, 1) if cuda else None
  peak_rss = peak_mib()
  peak = peak_device if cuda else peak_rss
  return {
    'ms': round(statistics.median(times), 2),
    'ms_best': round(min(times), 2),
    'ms_worst': round(max(times), 2),
    'steps': len(times),
    'state_mib': round(state, 1),
    'temporaries_mib': None,
    'start_rss_mib': start,
    'peak_rss_mib': peak_rss,
    'peak_device_mib': peak_device,
    'peak_ratio': round(peak / state, 2) if peak else None,
    'added_ratio': round((peak - (0 if cuda else start)) / state, 2) if peak else None,
    'compile_s': None,
    'gb_per_s': None,
    'loss': round(loss, 4),
    'device': torch.cuda.get_device_name() if cuda else 'cpu',
    'version': f'torch {torch.__version__}',
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('contestant', choices=('pkm', 'bag', 'rows'))
  parser.add_argument('--slots', type=int, required=True, help='a square number')
  parser.add_argument('--batch', type=int, default=512)
  parser.add_argument('--top_k', type=int, default=32)
  parser.add_argument('--width', type=int, default=64, help='of queries and of values')
  parser.add_argument('--steps', type=int, default=60)
  parser.add_argument('--seconds', type=float, default=10.0)
  args = parser.parse_args()
  if math.isqrt(args.slots) ** 2 != args.slots:
    parser.error(f'--slots={args.slots} is not a square number')
  torch.manual_seed(0)
  report = measure(
    args.contestant, args.slots, args.batch, args.top_k, args.width, args.steps, args.seconds
  )
  print(json.dumps(report))


if __name__ == '__main__':
  main()
