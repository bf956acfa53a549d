"""A service for tests: a fake export with known scores, and a client in the same process.

`FakeBundle` has the interface of `lmn_jax.export.runtime.bundle.Bundle`; its folder contains a
manifest.json only.
"""

import asyncio
import contextlib
import json
import threading
import time
from pathlib import Path
from typing import NamedTuple

import anyio.from_thread
import httpx
import numpy as np
import uvicorn

from lmn_jax import main
from lmn_jax.data import times
from lmn_jax.export.runtime.labels import Labels
from lmn_jax.export.runtime.manifest import FolderError
from lmn_jax.export.runtime.raw_values import RequestError
from lmn_jax.export.runtime.requests import Scores
from lmn_jax.serving import api
from lmn_jax.serving import server as serving_server
from lmn_jax.serving import settings as serving_settings
from lmn_jax.serving.service import Service

ITEMS = [f'i{k}' for k in range(1, 9)]


class FakeRequest(NamedTuple):
  rows: list[int]
  events: int
  user_known: bool
  unknown: list[str]
  met: list[str]
  unknown_features: list[str]
  missing: list[str]
  cold: list[str]


def write_export(folder, task='click', fingerprint='one', **more):
  """Writes the folder; an existing manifest is replaced in one step."""
  folder.mkdir(parents=True, exist_ok=True)
  content = dict(format=1, task=task, fingerprint=fingerprint, whole=task == 'next_item')
  content |= dict(time=times.Clock('number', first=0, last=100)._asdict())
  content |= more
  (folder / 'seal.json').write_text('{}')
  (folder / 'new').write_text(json.dumps(content))
  (folder / 'new').rename(folder / 'manifest.json')
  return folder


class FakeBundle:
  """A model in which item ik has the score k - 4, plus a tenth for each event of the user."""

  length = 4
  model = 'fake'
  platform = 'cpu'
  rich = False
  candidate_sizes = (10, 30)

  def __init__(self, folder):
    try:
      self.manifest = json.loads((Path(folder) / 'manifest.json').read_text())
    except (OSError, ValueError) as error:
      raise FolderError(f'{folder} is not an export ({error})') from None
    self.task, self.fingerprint = self.manifest['task'], self.manifest['fingerprint']
    self.whole, self.labels = self.manifest['whole'], Labels(self.manifest)
    self.exclude_seen = self.manifest.get('exclude_seen', True)
    self.degraded = self.manifest.get('degraded', False)
    self.sizes, self.slow, self.began = [], threading.Event(), threading.Event()
    self.slow.set()
    self._compiled = self.steps = 0

  def warm(self, threads, note):
    note(0, 3)
    time.sleep(self.manifest.get('warm_s', 0))
    self._compiled = 3
    note(3, 3)

  def compiled(self):
    return self._compiled

  def lost(self):
    return self.manifest.get('lost', [])

  def known_history(self, user):
    return ['i1', 'i2'] if user == 'old' else []

  def known_times(self, user):
    return [90, 100] if user == 'old' else []

  def check_event(self, features, time):
    for name in features:
      raise RequestError(f'event feature {name!r} is unknown; event features of the model: none')

  def ask(self, user, candidates, history=(), context=None, profile=None, state=None, time=None):
    for name in context or {}:
      if name != 'query':
        raise RequestError(
          f'context feature {name!r} is unknown; context features of the model: query'
        )
    rows = [ITEMS.index(x) + 1 if x in ITEMS else 0 for x in candidates or []]
    unknown = [x for x in candidates or [] if x not in ITEMS]
    events = len(history[-self.length :]) if self.task == 'click' else len(state)
    met = [*history, *self.known_history(user)]
    return FakeRequest(rows, events, user == 'old', unknown, met, list(context or {}), [], [])

  def score(self, asked):
    self.sizes.append(len(asked))
    self.began.set()
    assert self.slow.wait(20)
    time.sleep(self.manifest.get('score_s', 0))
    scores = []
    for request in asked:
      values = np.array(request.rows, np.float32) - 4 + request.events / 10
      if self.task == 'next_item':
        values[np.array(request.rows) == 0] = np.nan
      if 8 in request.rows and 'crash' in self.manifest:
        raise RuntimeError('the model crashed')
      scores.append(Scores(values.astype(np.float32), self.degraded))
    return scores

  def scoring(self, asked):
    for _ in range(0, len(asked[0].rows), self.candidate_sizes[-1]):
      time.sleep(self.manifest.get('block_s', 0))
      self.steps += 1
      yield
    return self.score(asked)

  def recommending(self, asked, k, exclude, exclude_seen, by):
    exclude = [*exclude, *(asked.met if exclude_seen else [])]
    for _ in range(self.manifest.get('blocks', 1)):
      time.sleep(self.manifest.get('block_s', 0))
      self.steps += 1
      yield
    items = [x for x in reversed(ITEMS) if x not in exclude][:k]
    return [(x, ITEMS.index(x) - 3 + asked.events / 10) for x in items], self.degraded

  def state(self, user, history=()):
    return list(history)

  def folded(self, state):
    read = (len(state) - 1) // self.length * self.length if state else 0
    return state[:read], len(state) - read

  def updating(self, state, events):
    yield
    return [*state, *events]

  def pack(self, state):
    return json.dumps(state).encode()

  def unpack(self, packed):
    try:
      return json.loads(packed)
    except ValueError:
      raise RequestError('not a state') from None


def settings(**fields):
  """Returns settings with short waits."""
  result = serving_settings.settings()
  result.update(dict(wait_ms=1.0, watch_s=0.02) | fields)
  serving_settings.check(result)
  return serving_settings.for_platform(result, 'cpu')


class Client:
  """Sends requests, from any thread, to an application that runs in this process."""

  def __init__(self, service, app, portal, http):
    self.service, self.app, self._portal, self._http = service, app, portal, http

  @property
  def bundle(self):
    return self.service.live.answers().bundle

  def request(self, method, path, **more):
    return self._portal.call(lambda: self._http.request(method, path, **more))

  def get(self, path, **more):
    return self.request('GET', path, **more)

  def post(self, path, body=None, **more):
    return self.request('POST', path, **({} if body is None else {'json': body}), **more)

  def posts(self, *requests):
    """Sends requests (path, body) at the same time, and returns their answers."""

    async def together():
      return await asyncio.gather(*(self._http.post(path, json=body) for path, body in requests))

    return self._portal.call(together)

  def begin(self, path, body):
    """Sends a request, and returns a future of the answer."""
    return self._portal.start_task_soon(lambda: self._http.post(path, json=body))

  def ready(self):
    wait_for(lambda: self.get('/readyz').status_code == 200, 60)  # it compiles
    return self


def wait_for(condition, seconds=10):
  """Waits until a condition is true."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, 'the condition did not become true'
    time.sleep(0.005)


@contextlib.contextmanager
def running(export, store=None, tokens=(), open_bundle=FakeBundle, **fields):
  """A context with a Client of a running service."""
  with anyio.from_thread.start_blocking_portal() as portal:
    service = Service(settings(**fields), export, open_bundle, store)
    app = api.make_app(service, tokens)
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    http = httpx.AsyncClient(transport=transport, base_url='http://here', timeout=20)
    with portal.wrap_async_context_manager(app.router.lifespan_context(app)):
      yield Client(service, app, portal, http)


@contextlib.contextmanager
def listening(app):
  """A context with the URL of an application that runs in a thread."""
  config = uvicorn.Config(app, log_config=None, lifespan='on', ws='none')
  server = uvicorn.Server(config)
  with serving_server.bind('127.0.0.1', 0) as listener:
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
      yield f'http://127.0.0.1:{listener.getsockname()[1]}'
    finally:
      server.should_exit = True
      thread.join()


def worker():
  """Returns the application of one of several processes."""
  serving_server.opener = lambda *_: FakeBundle
  return serving_server.worker()


if __name__ == '__main__':
  # The command line of lmn_jax for exports of `write_export`.
  serving_server.opener = lambda *_: FakeBundle
  serving_server.APPLICATION = 'tests.fake_service:worker'
  main.run_main()
