"""Sums of shards equal those of one process; without a shard they are scaled as described."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from lmn_jax.errors import UserError
from lmn_jax.export import export
from lmn_jax.export.contents import write_tables
from lmn_jax.export.quantize import stored
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.export.runtime.ids import hash_of
from lmn_jax.files import write_json
from lmn_jax.serving.shards import client as clients
from lmn_jax.serving.shards.client import KIND, Shards, packed, unpacked
from lmn_jax.serving.shards.rows import Shard, ShardRows
from lmn_jax.serving.shards.server import make_shard_app
from lmn_jax.training import setup as setups
from tests.fake_service import settings, wait_for
from tests.runs import mesh_of, tiny_config, untrained

V, D, T, K = 23, 5, 4, 6


def make_folder(folder, precision='float32', seed=0, pooled='memory'):
  """Writes the table and the manifest of an export, and returns the float32 rows."""
  rows = np.random.default_rng(seed).normal(size=(V, D)).astype(np.float32)
  table = stored(rows, precision)
  folder.mkdir()
  files = write_tables(folder / 'tables', {'memory': table})['memory']
  mean = rows.mean(axis=0).tolist()
  write_json(
    folder / 'manifest.json',
    dict(
      format=1, model='lmn', pooled=pooled, fingerprint=f'{hash_of(table["rows"].tobytes()):x}',
      tables={'memory': dict(rows=V, width=D, precision=precision, files=files)}, mean=mean,
    ),
  )  # fmt: skip
  write_json(folder / 'seal.json', {})
  return rows


def slots(seed=1):
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, V, (T, K)).astype(np.int32)
  ids[0] = rng.choice(V, K, replace=False)
  weights = rng.random((T, K)).astype(np.float32)
  return ids, weights


@pytest.mark.parametrize(
  ('precision', 'tolerance'), [('float32', 1e-6), ('bfloat16', 0.01), ('int8', 0.02)]
)
@pytest.mark.parametrize('count', [1, 3])
def test_partial_sums_add_up(tmp_path, precision, tolerance, count):
  rows = make_folder(tmp_path / 'export', precision)
  ids, weights = slots()
  ids[1, 2] = V  # padding belongs to no shard
  parts = [ShardRows(tmp_path / 'export', k, count) for k in range(count)]
  assert [x.first for x in parts[1:]] == [x.last for x in parts[:-1]]
  assert parts[0].first == 0 and parts[-1].last == V
  partial = [rows_of_shard.partial(ids, weights) for rows_of_shard in parts]
  inside = ids < V
  expected = np.einsum('tk,tkd->td', np.where(inside, weights, 0), rows[np.where(inside, ids, 0)])
  np.testing.assert_allclose(sum(sums for sums, _ in partial), expected, atol=10 * tolerance)
  np.testing.assert_allclose(
    sum(weight for _, weight in partial), np.where(inside, weights, 0).sum(axis=1), rtol=1e-5
  )


def test_a_request_is_packed_and_unpacked():
  ids, weights = slots()
  back = unpacked(packed(ids, weights))
  np.testing.assert_array_equal(back[0], ids)
  np.testing.assert_array_equal(back[1], weights)
  short = packed(ids, weights)[:-1]
  for body in (b'', b'1234567', short, b'\xff' * 8, b'\x01\0\0\0\xff\xff\xff\xff'):
    with pytest.raises(ValueError, match='a body of|the body has'):
      unpacked(body)


class Network:
  """Shards a, b, c of an export, which may be down; `requests` are the shards that got one."""

  def __init__(self, folder):
    self.shards = {name: Shard(folder, k, 3) for k, name in enumerate('abc')}
    self.down, self.requests = set(), []

  def __call__(self, request):
    name = request.url.host
    self.requests.append(name)
    if name in self.down:
      raise httpx.ConnectTimeout('gone')
    rows = self.shards[name].rows_of(request.headers['x-export'])
    if rows is None:
      return httpx.Response(409, text='another export')
    sums, weights = rows.partial(*unpacked(request.content))
    return httpx.Response(200, content=sums.tobytes() + weights.tobytes())


@pytest.fixture
def network(tmp_path, monkeypatch):
  """Returns (rows, network, values)."""
  monkeypatch.setattr(clients, 'PROBE_S', 0.02)
  rows = make_folder(tmp_path / 'export')
  manifest = json.loads((tmp_path / 'export/manifest.json').read_text())
  network = Network(tmp_path / 'export')
  values = Shards(['a', 'b', 'c'], manifest, 1.0, transport=httpx.MockTransport(network))
  return rows, network, values


def test_sums_of_all_shards_equal_those_of_one_process(network):
  rows, _, values = network
  ids, weights = slots()
  sums, degraded = values(ids, weights)
  np.testing.assert_allclose(sums, np.einsum('tk,tkd->td', weights, rows[ids]), rtol=1e-5)
  assert not degraded and values.lost() == []


def test_slots_of_a_lost_shard_count_as_not_selected(network):
  rows, network, values = network
  ids, weights = slots()
  network.down = {'b'}
  ids[2] = np.arange(8, 14)  # all on shard b
  sums, degraded = values(ids, weights)
  assert degraded and values.lost() == ['b']
  available = (ids < V // 3) | (ids >= 2 * V // 3)
  remaining = np.where(available, weights, 0)
  total = weights.sum(axis=1, keepdims=True)
  share = np.where(available.any(axis=1, keepdims=True), remaining.sum(axis=1, keepdims=True), 1)
  expected = np.einsum('tk,tkd->td', remaining * total / share, rows[ids])
  expected[2] = total[2] * rows.mean(axis=0)
  assert not available[2].any() and available[[0, 1, 3]].any(axis=1).all()
  np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-5)


def test_a_lost_shard_is_probed_in_the_background_until_it_answers(network, monkeypatch):
  _, network, values = network
  monkeypatch.setattr(clients, 'PROBE_S', 1000)
  network.down = {'c'}
  values(*slots())
  network.requests.clear()
  assert values(*slots())[1] and set(network.requests) == {'a', 'b'}
  monkeypatch.setattr(clients, 'PROBE_S', 0.01)
  values._lost['c'] = 0.0  # the probe is due
  network.down = set()
  deadline = time.monotonic() + 5
  while values.lost() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert values.lost() == [] and not values(*slots())[1]


def test_a_shard_of_another_export_is_left_out(network, tmp_path):
  _, network, values = network
  make_folder(tmp_path / 'other', seed=7)
  network.shards['a'] = Shard(tmp_path / 'other', 0, 3)
  assert values(*slots())[1] and values.lost() == ['a']


def test_a_shard_holds_the_new_export_and_the_previous_export(tmp_path):
  make_folder(tmp_path / 'first')
  make_folder(tmp_path / 'second', seed=2)
  make_folder(tmp_path / 'third', seed=3)
  names = [ShardRows(tmp_path / name, 0, 1).export for name in ('first', 'second', 'third')]
  link = tmp_path / 'export'
  link.symlink_to('first')
  shard = Shard(link, 0, 1)
  assert shard.rows_of(names[0]).export == names[0] and shard.rows_of(names[1]) is None
  link.unlink()
  link.symlink_to('second')
  assert shard.rows_of(names[1]).export == names[1] and shard.rows_of(names[0]).export == names[0]
  link.unlink()
  link.symlink_to('third')
  assert shard.rows_of(names[2]) and shard.rows_of(names[1]) and shard.rows_of(names[0]) is None


def test_a_model_without_a_memory_has_no_shards(tmp_path):
  make_folder(tmp_path / 'export', pooled='')
  with pytest.raises(UserError, match='has no memory, so it needs no shards'):
    ShardRows(tmp_path / 'export', 0, 2)


def test_a_shard_over_http(tmp_path):
  """Shard 1 of 2, in this process; errors are one line."""
  rows, (ids, weights) = make_folder(tmp_path / 'export'), slots()
  shard = Shard(tmp_path / 'export', 1, 2)
  app = make_shard_app(settings(shard_max_body=1000), shard, [b'secret'])
  export = shard.newest().export
  headers = {'authorization': 'Bearer secret', 'content-type': KIND, 'x-export': export}

  def ask(method, path, body=b'', **changed):
    async def send():
      transport = httpx.ASGITransport(app)
      async with httpx.AsyncClient(transport=transport, base_url='http://shard') as client:
        changed_headers = headers | {name.replace('_', '-'): x for name, x in changed.items()}
        return await client.request(method, path, content=body, headers=changed_headers)

    return asyncio.run(send())

  answer = ask('POST', '/v1/partial', packed(ids, weights))
  assert answer.status_code == 200
  shard_weights = np.where(ids < V // 2, 0, weights)
  sums = np.einsum('tk,tkd->td', shard_weights, rows[ids])
  expected = np.concatenate([sums.ravel(), shard_weights.sum(axis=1)])
  np.testing.assert_allclose(np.frombuffer(answer.content, '<f4'), expected, rtol=1e-5, atol=1e-6)
  ready = {'status': 'ready', 'export': export, 'first': V // 2, 'last': V}
  assert ask('GET', '/readyz').json() == ready
  text = ask('GET', '/metrics').text
  assert 'lmn_jax_requests_total{path="/v1/partial",status="200"} 1.0' in text
  for changed, body, status in (
    ({'x_export': 'other'}, packed(ids, weights), 409),
    ({}, packed(ids, weights)[:-1], 422),
    ({}, bytes(1001), 413),
    ({'content_type': 'application/json'}, b'{}', 415),
    ({'authorization': 'Bearer wrong'}, b'', 401),
  ):
    refused = ask('POST', '/v1/partial', body, **changed)
    assert refused.status_code == status and list(refused.json()) == ['error'], changed
  assert ask('GET', '/v1/partial').status_code == 405


def free_port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


@pytest.mark.slow
def test_processes_of_shards_and_a_ranker(tmp_path, monkeypatch):
  """Scores equal those of one process; answers are degraded while a shard is down."""
  with monkeypatch.context() as patch:
    patch.setattr(setups.meshes, 'make_mesh', lambda *_: mesh_of(1))
    config, workdir, store = untrained(tiny_config('lmn', scale=1.0), tmp_path)
    export.export(config, workdir, store, tmp_path / 'export', 'float32')
  bundle = Bundle(tmp_path / 'export', (1,), (16,))
  items = [bundle.ids('item').raw(row) for row in range(1, 9)]
  (expected,) = bundle.score([bundle.ask('no one', items)])

  def start(port, *flags):
    command = [sys.executable, '-m', 'lmn_jax', '--mode=serve', f'--serve.port={port}']
    return subprocess.Popen([*command, f'--export={tmp_path / "export"}', *flags])

  def ready(port):
    with contextlib.suppress(httpx.HTTPError):
      answer = httpx.get(f'http://127.0.0.1:{port}/readyz')
      return answer.status_code == 200 and answer.json()['status']

  ports = [free_port() for _ in range(3)]
  part = ['--serve.role=shard', '--serve.shard=1/2']
  shards = [start(ports[0], '--serve.role=shard', '--serve.shard=0/2'), start(ports[1], *part)]
  addresses = tuple(f'127.0.0.1:{port}' for port in ports[:2])
  sizes = ['--serve.batch_sizes=(1,)', '--serve.candidate_sizes=(16,)', '--serve.max_batch=1']
  ranker = start(ports[2], f'--serve.shards={addresses}', *sizes)

  def ask():
    body = {'user': 'no one', 'candidates': items}
    return httpx.post(f'http://127.0.0.1:{ports[2]}/v1/score', json=body).json()

  try:
    wait_for(lambda: ready(ports[2]) == 'ready' and ready(ports[1]), 120)
    answer = ask()
    np.testing.assert_allclose(answer['scores'], expected.values, rtol=1e-5, atol=1e-6)
    assert not answer['degraded']
    shards[1].kill()
    shards[1].wait()
    answer = ask()
    assert answer['degraded'] and not np.allclose(answer['scores'], expected.values, rtol=1e-3)
    assert ready(ports[2]) == 'degraded'
    shards[1] = start(ports[1], *part)
    wait_for(lambda: ready(ports[2]) == 'ready', 60)
    answer = ask()
    np.testing.assert_allclose(answer['scores'], expected.values, rtol=1e-5, atol=1e-6)
  finally:
    for process in (*shards, ranker):
      process.terminate()
    assert [process.wait(60) for process in (*shards, ranker)] == [0, 0, 0]
