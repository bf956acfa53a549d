"""The time of the request of one user: scores of C candidates after a history of L events.

    python experiments/latency.py [--length=1000] [--candidates=200] [--calls=1000]
    python experiments/latency.py --models=sam,din     # default: all models except BST
    python experiments/latency.py --exports=runs/lmn/export,runs/sam/export [--seconds=60]
    python experiments/latency.py --exports=ONE,OTHER --swap          # replaces the export
    python experiments/latency.py --exports=ONE --beside=2            # beside recommendations

A call is `Trainer.predict`, the compiled function of the evaluation, from a request on the host to
logits [1, C] on the host, on one device. All requests are different and have a full history. The
models are those of configs/lmn_douyin.py and configs/douyin.py with untrained weights, which cost
the same as trained ones. They take turns, in blocks of calls, so that other load of the machine
affects all of them; the first calls of a block do not count. BST computes attention between all
pairs for each candidate, which takes seconds at these sizes: name it in --models to time it. Prints
a JSON line for each model, then all as a table: percentiles of the calls in milliseconds, seconds
until the first answer, which compiles, and the temporaries reported by the compiler.

With --exports it times exports (--mode=export): `score` is Bundle.score of a request in rows, `ask`
the conversion of raw ids to rows, both on --platform (cpu, cuda or tpu; default: the one that JAX
prefers). A line is printed for each program that is compiled, and for each result as soon as it is
known. Then each is served by --mode=serve, and clients in this process,
each with a connection, send one request after the other: a user of the export with a history of at
least `--length` events, or the longest one, and C items. States of next-item models are put into
the store of the service before (one update each). The clients share the cores with the service.
Columns: seconds until it is ready (--serve=--compilation_cache=off compiles all programs, as a
first start does), requests a second, percentiles of the waiting time of a client, answers other
than 200, and the private memory of the service (RssAnon) before and after. --serve=FLAGS, such as
'--serve.workers=2', are flags of the service.

With --swap one service answers from a link that points to the exports in turn, for --seconds each,
with the largest number of --clients: the number of answers from each export, and of other statuses.

With --beside=N a client requests scores alone, and beside N clients that request recommendations
out of the whole catalogue, in turns of --seconds, 2 x ROUNDS of them, so that other load of the
machine affects both. Columns: percentiles of a score alone and beside, the ratio of the p99, and
the statuses of the recommendations.
"""

import argparse
import collections
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from step_cost import SCHEMA, markdown, model_batch

from lmn_jax import config_files
from lmn_jax.distributed import mesh as meshes
from lmn_jax.errors import one_of
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.models import registry
from lmn_jax.training import program
from lmn_jax.training.trainer import compile_program

BLOCKS = 5  # blocks of calls of each model
WARMUP = 10  # first calls of a block, which do not count

PERCENTILES = (50, 95, 99)
BODIES = 400  # different requests that the clients send in turn
EXPORT = re.compile(rb'"export":"(.{12})')
START_S = 300  # seconds until a service must be ready
ROUNDS = 5  # turns of a client alone, and beside others
K = 10  # recommended items

Request = dict[str, np.ndarray]


def requests(L: int, C: int) -> Iterator[Request]:
  """Yields batches of one user with L events and C candidates; the same for every model."""
  rng = np.random.default_rng(0)
  while True:
    # The items of C users are the candidates of one.
    of_one, of_all = model_batch(rng, 1, L), model_batch(rng, C, 1)
    yield of_one | {name: of_all[name][None] for name in ('item', *SCHEMA.item)}


def make_score(name: str, request: Request) -> tuple[Callable[[Request], np.ndarray], dict]:
  """A compiled function from a request to logits [1, C], and its costs.

  Args:
    name: of registry.CLICK. request: an example.
  """
  config = config_files.load('lmn_douyin' if name == 'lmn' else f'douyin:{name}')
  model = registry.build(config.model.to_dict(), SCHEMA)
  one_device = meshes.make_mesh(devices=jax.devices()[:1])
  # A trainer is built for training batches, which have one item for each user.
  trained = request | {name: request[name][:, 0] for name in ('item', *SCHEMA.item)}
  trainer = compile_program(program.make(config, model, trained, one_device))
  state = jax.block_until_ready(trainer.init(0))

  def score(request):
    return np.asarray(trainer.predict(state, request))

  began = time.perf_counter()
  score(request)
  first_s = time.perf_counter() - began
  memory = trainer.predict.lower(state, request).compile().memory_analysis()
  return score, {
    'first_s': round(first_s, 2),
    'temporaries_mib': round(memory.temp_size_in_bytes / 2**20, 2),
  }


def time_calls(score: Callable[[Request], np.ndarray], samples: list[Request]) -> list[float]:
  """Milliseconds of each call after the WARMUP first ones."""
  times = []
  for request in samples:
    began = time.perf_counter()
    score(request)
    times.append((time.perf_counter() - began) * 1e3)
  return times[WARMUP:]


def measure(names: list[str], L: int, C: int, calls: int) -> list[dict]:
  """A row for each model, of at least `calls` calls.

  Args:
    names: of registry.CLICK. L: events of the history. C: candidates.
  """
  each = -(-calls // BLOCKS)
  stream = requests(L, C)
  scores = {name: make_score(name, next(stream)) for name in names}
  times = {name: [] for name in names}
  for _ in range(BLOCKS):
    samples = list(islice(stream, WARMUP + each))
    for name, (score, _) in scores.items():
      times[name] += time_calls(score, samples)
  return [
    {
      'model': name,
      'length': L,
      'candidates': C,
      'calls': len(times[name]),
      **{f'p{q}_ms': round(float(np.percentile(times[name], q)), 3) for q in (50, 99)},
      **taken,
      'device': jax.devices()[0].device_kind,
    }
    for name, (_, taken) in scores.items()
  ]


class Query(NamedTuple):
  """A request in raw ids."""

  user: str
  candidates: list[str]


def queries_of(bundle: Bundle, L: int, C: int) -> list[Query]:
  """Requests of users with at least L events, or with the longest histories.

  Args:
    bundle: the export. L: events. C: candidates.
  """
  rng = random.Random(0)
  users, items = bundle.ids('user'), bundle.ids('item')
  counts = np.diff(bundle.history_offsets())
  most = np.flatnonzero(counts >= min(L, counts.max()))
  return [
    Query(
      users.raw(int(rng.choice(most))),
      [items.raw(rng.randrange(1, len(items))) for _ in range(C)],
    )
    for _ in range(BODIES)
  ]


def show(row: dict[str, Any]) -> None:
  """Prints a row as JSON at once, so that a run that is cut off has told what it knew."""
  print(json.dumps(row), flush=True)


def compile_all(bundle: Bundle) -> dict[str, Any]:
  """Compiles the programs of an export, as a service does before it is ready; prints each."""
  began = time.perf_counter()

  def note(done, count):
    show({'compiled': done, 'of': count, 'seconds': round(time.perf_counter() - began, 1)})

  bundle.warm(1 if bundle.platform == 'cpu' else os.cpu_count() or 1, note)
  return {'compile_s': round(time.perf_counter() - began, 1), 'programs': bundle.compiled()}


def time_export(bundle: Bundle, queries: list[Query], calls: int) -> dict[str, Any]:
  """Milliseconds of `ask` and `score` in this process; all programs are compiled."""
  programs = bundle.compiled()
  states, times = {}, {'ask': [], 'score': []}
  for query in islice(itertools.cycle(queries), WARMUP + calls):
    history = bundle.known_history(query.user)
    if bundle.task == 'next_item' and query.user not in states:
      states[query.user] = bundle.state(query.user, history)
    began = time.perf_counter()
    rows = bundle.ask(query.user, query.candidates, history, state=states.get(query.user))
    between = time.perf_counter()
    bundle.score([rows])
    times['ask'].append((between - began) * 1e3)
    times['score'].append((time.perf_counter() - between) * 1e3)
  assert bundle.compiled() == programs, 'a program was compiled for a request'
  return {
    'calls': calls,
    **{
      f'{name}_p{q}_ms': round(float(np.percentile(ms[WARMUP:], q)), 3)
      for name, ms in times.items()
      for q in (PERCENTILES if name == 'score' else (50,))
    },
  }


@contextlib.contextmanager
def service(export: str, users: str, flags: list[str]) -> Iterator[tuple[int, int]]:
  """Yields (port, process) of a ready service of an export; ends it by SIGTERM."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [
    sys.executable, '-m', 'lmn_jax', '--mode=serve', f'--export={export}',
    f'--serve.port={port}', f'--serve.users={users}', *flags,
  ]  # fmt: skip
  with subprocess.Popen(command) as process:
    try:
      deadline = time.monotonic() + START_S
      while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
          if ask(http.client.HTTPConnection('127.0.0.1', port), 'GET', '/readyz')[0] == 200:
            break
        time.sleep(0.1)
      else:
        raise SystemExit(f'{export}: the service was not ready within {START_S} s')
      yield port, process.pid
    finally:
      process.terminate()
      status = process.wait(60)
  assert status == 0, f'the service ended with {status}'


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: bytes = b''):
  """(status, content) of a request."""
  connection.request(method, path, body, {'content-type': 'application/json'})
  answer = connection.getresponse()
  return answer.status, answer.read()


class Answer(NamedTuple):
  """ms: waiting time of the client. export: of the answer, '' unless the status is 200."""

  path: str
  status: int
  ms: float
  export: str


def answers(port: int, clients: list[tuple[str, list[bytes]]], seconds: float) -> Iterator[Answer]:
  """The answers to clients that send one request after the other, for some seconds.

  clients: for each the path, and the bodies that it sends in turn.
  """
  received, begin = [[] for _ in clients], threading.Barrier(len(clients) + 1)

  def client(number):
    path, bodies = clients[number]
    connection = http.client.HTTPConnection('127.0.0.1', port)
    begin.wait()
    ends = time.perf_counter() + seconds
    for body in islice(itertools.cycle(bodies), number * 7, None):
      began = time.perf_counter()
      if began > ends:
        return
      status, content = ask(connection, 'POST', path, body)
      export = EXPORT.search(content)[1].decode() if status == 200 else ''
      received[number].append(Answer(path, status, (time.perf_counter() - began) * 1e3, export))

  threads = [threading.Thread(target=client, args=(number,)) for number in range(len(clients))]
  for thread in threads:
    thread.start()
  begin.wait()
  for thread in threads:
    thread.join()
  return itertools.chain.from_iterable(received)


def load(
  port: int, bodies: list[bytes], clients: int, seconds: float, counts: collections.Counter
) -> dict[str, Any]:
  """Waiting times of clients that request scores, one request after the other, for some seconds.

  counts: of the answers of each export, which this updates.
  """
  received = list(answers(port, [('/v1/score', bodies)] * clients, seconds))
  counts.update(answer.export or answer.status for answer in received)
  every = np.array([answer.ms for answer in received])
  return {
    'clients': clients,
    'requests': len(every),
    'per_s': round(len(every) / seconds, 1),
    **{f'p{q}_ms': round(float(np.percentile(every, q)), 2) for q in PERCENTILES},
    'failures': sum(answer.status != 200 for answer in received),
  }


def own_mib(process: int) -> float:
  """Private memory of a process and its children, MiB."""
  total, waiting = 0, [process]
  while waiting:
    number = waiting.pop()
    status = Path(f'/proc/{number}/status').read_text()
    total += int(next(x.split()[1] for x in status.splitlines() if x.startswith('RssAnon')))
    for children in Path(f'/proc/{number}/task').glob('*/children'):
      waiting += [int(child) for child in children.read_text().split()]
  return round(total / 1024, 1)


def time_service(export: str, queries: list[Query], args: argparse.Namespace) -> list[dict]:
  """A row for each number of clients."""
  rows, began = [], time.perf_counter()
  bodies = [json.dumps(query._asdict()).encode() for query in queries]
  with tempfile.TemporaryDirectory() as folder:
    users = f'{folder}/users.sqlite'
    flags = [
      f'--serve.candidate_sizes={tuple(args.sizes)}', f'--serve.platform={args.platform}',
      *shlex.split(args.serve),
    ]  # fmt: skip
    with service(export, users, flags) as (port, process):
      ready_s = round(time.perf_counter() - began, 1)
      show({'ready_s': ready_s})
      connection = http.client.HTTPConnection('127.0.0.1', port)
      for query in {query.user: query for query in queries}.values():
        event = {'user': query.user, 'events': [{'item': query.candidates[0]}]}
        status, content = ask(connection, 'POST', '/v1/update', json.dumps(event).encode())
        assert status == 200, content
      load(port, bodies, 1, 2, collections.Counter())
      for clients in args.clients:
        before = own_mib(process)
        row = load(port, bodies, clients, args.seconds, collections.Counter())
        memory = {'mib_before': before, 'mib_after': own_mib(process)}
        rows.append({'ready_s': ready_s} | row | memory)
        show(rows[-1])
  return rows


def swap(args: argparse.Namespace) -> None:
  """Counts the answers of a service whose export is replaced meanwhile; prints them."""
  counts, clients = collections.Counter(), max(args.clients)
  with tempfile.TemporaryDirectory() as folder:
    link = Path(folder) / 'export'

    def lead_to(export):
      new = Path(folder) / 'new'
      new.symlink_to(Path(export).resolve())
      new.replace(link)

    lead_to(args.exports[0])
    queries = queries_of(Bundle(link), args.length, args.candidates)
    bodies = [json.dumps(query._asdict()).encode() for query in queries]
    flags = ['--serve.watch_s=0.5', *shlex.split(args.serve)]
    with service(str(link), f'{folder}/users.sqlite', flags) as (port, _):
      seconds = args.seconds * len(args.exports)
      asking = threading.Thread(target=lambda: print(load(port, bodies, clients, seconds, counts)))
      asking.start()
      for export in args.exports[1:]:
        time.sleep(args.seconds)
        lead_to(export)
      asking.join()
  print(dict(counts))


def beside(args: argparse.Namespace) -> None:
  """Times scores of one client alone, and beside requests for recommendations; prints a table."""
  rows = []
  for export in args.exports:
    bundle = Bundle(export)
    queries = queries_of(bundle, args.length, args.candidates)
    scores = '/v1/score', [json.dumps(query._asdict()).encode() for query in queries]
    bests = '/v1/recommend', [json.dumps({'user': x.user, 'k': K}).encode() for x in queries]
    turns, received = {'alone': [scores], 'beside': [scores] + [bests] * args.beside}, {}
    with tempfile.TemporaryDirectory() as folder:
      flags = shlex.split(args.serve)
      with service(export, f'{folder}/users.sqlite', flags) as (port, _):
        list(answers(port, [scores], 2))
        for name, clients in [*turns.items()] * ROUNDS:
          received.setdefault(name, []).extend(answers(port, clients, args.seconds))
    ms = {
      name: [query.ms for query in some if query.path == scores[0] and query.status == 200]
      for name, some in received.items()
    }
    statuses = collections.Counter(
      f'{x.path} {x.status}' for some in received.values() for x in some
    )
    p99 = {name: np.percentile(some, 99) for name, some in ms.items()}
    row = {'model': bundle.model, 'items': bundle.items, 'beside': args.beside}
    for name, some in ms.items():
      row |= {f'{name}_p{q}_ms': round(float(np.percentile(some, q)), 2) for q in PERCENTILES}
    row |= {'ratio_p99': round(p99['beside'] / p99['alone'], 2), **dict(sorted(statuses.items()))}
    show(row)
    rows.append(row)
  print(markdown(rows))


def measure_exports(args: argparse.Namespace) -> None:
  """Times exports in this process and as services; prints all of it."""
  compiled, served = [], []
  for export in args.exports:
    began = time.perf_counter()
    bundle = Bundle(export, candidate_sizes=args.sizes, platform=args.platform)
    opens_s = round(time.perf_counter() - began, 2)
    queries = queries_of(bundle, args.length, args.candidates)
    what = {
      'model': bundle.model, 'platform': bundle.platform, 'device': bundle.device.device_kind,
      'length': bundle.length, 'candidates': args.candidates, 'opens_s': opens_s,
    }  # fmt: skip
    show(what)
    what |= compile_all(bundle)
    compiled.append(what | time_export(bundle, queries, args.calls))
    show(compiled[-1])
    for row in time_service(export, queries, args) if args.seconds else []:
      served.append({'model': bundle.model, 'platform': bundle.platform} | row)
  for rows in filter(None, (compiled, served)):
    print(markdown(rows))


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--length', type=int, default=1000)
  parser.add_argument('--candidates', type=int, default=200)
  parser.add_argument(
    '--calls', type=int, default=1000, help='of each model, for a p99: 300 or more'
  )
  affordable = [name for name in registry.CLICK if name != 'bst']  # see the docstring of the module
  parser.add_argument('--models', default=','.join(affordable))
  parser.add_argument('--exports', type=lambda text: text.split(','), help='folders, or links')
  parser.add_argument('--platform', default='', help='cpu, cuda or tpu, for --exports')
  parser.add_argument(
    '--seconds', type=float, default=60, help='of each number of clients; 0 serves nothing'
  )
  parser.add_argument(
    '--clients', type=lambda text: [int(x) for x in text.split(',')], default=[1, 8, 32]
  )
  parser.add_argument(
    '--sizes',
    type=lambda text: [int(x) for x in text.split(',')],
    default=[200, 1024],
    help='candidates of the compiled programs',
  )
  parser.add_argument('--swap', action='store_true', help='replace one export by the next')
  parser.add_argument('--beside', type=int, default=0, help='clients of recommendations')
  parser.add_argument('--serve', default='', help='flags for the services')
  args = parser.parse_args(arguments)
  if args.exports:
    # The service needs memory of a GPU beside this process, and each takes most of it by default.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    (swap if args.swap else beside if args.beside else measure_exports)(args)
    return
  names = args.models.split(',')
  for name in names:
    one_of('--models', name, registry.CLICK)
  rows = measure(names, args.length, args.candidates, args.calls)
  for row in rows:
    show(row)
  print(markdown(rows))


if __name__ == '__main__':
  main()
