"""The client of shards: sums of memory values that other machines hold, and the message.

A ranker computes the slots and their weights and sends both to every shard. A shard returns the
weighted sum of its own rows and the sum of their weights, never a row:

    s_i = sum_{j in shard i} w_j value_j,   u_i = sum_{j in shard i} w_j
    M   = sum_i s_i                                           if all shards answer
    M   = (sum_j w_j / sum_i u_i) sum_i s_i                    over those that answer

So without a shard the result is as if its slots had not been selected, with the weights of the
others scaled up; if none of the slots is left, M is the mean of all values. [ours] Both are marked
in the answer as `degraded`. Shard i of N holds rows [i V / N, (i + 1) V / N).

    POST /v1/partial   T, K int32, ids int32 [T, K], weights float32 [T, K], little-endian
                       -> sums float32 [T, D], weights float32 [T]
    X-Export           the fingerprint of the export; a shard without it answers 409
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np

PATH = '/v1/partial'
KIND = 'application/octet-stream'
HEADER = 'x-export'
PROBE_S = 1.0  # between two probes of a shard that did not answer

log = logging.getLogger(__name__)


def packed(ids_TK: np.ndarray, weights_TK: np.ndarray) -> bytes:
  """Returns the body of a request."""
  shape = np.array(ids_TK.shape, '<i4').tobytes()
  return shape + ids_TK.astype('<i4').tobytes() + weights_TK.astype('<f4').tobytes()


def unpacked(body: bytes) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ids and weights of a request.

  Raises:
    ValueError: the body has a wrong size; the message is one line.
  """
  if len(body) < 8:
    raise ValueError(f'a body of {len(body)} bytes has no shape; it must begin with T and K')
  T, K = (int(x) for x in np.frombuffer(body, '<i4', 2))
  if T < 0 or K < 0 or len(body) != 8 + 8 * T * K:
    raise ValueError(f'the body has {len(body)} bytes; for T={T}, K={K} it must have 8 + 8 T K')
  ids_TK = np.frombuffer(body, '<i4', T * K, 8).reshape(T, K)
  return ids_TK, np.frombuffer(body, '<f4', T * K, 8 + 4 * T * K).reshape(T, K)


class Shards:
  """The `values` of a Bundle: sends each request to all shards at once. Threads may share it.

  A shard that does not answer in time is left out from then on, so that only one request waits for
  it. Later requests, and calls of `lost`, start a probe in the background, at most one a second,
  until the shard answers again.
  """

  def __init__(
    self,
    addresses: Sequence[str],
    manifest: dict,
    timeout_s: float,
    token: str = '',
    transport: httpx.BaseTransport | None = None,
  ):
    """Prepares the client; nothing is sent yet.

    Args:
      addresses: HOST:PORT of shards 0 to N - 1. manifest: of the export. timeout_s: of an answer.
      token: to send, '' for none. transport: in place of the network (for tests).
    """
    self._width = manifest['tables'][manifest['pooled']]['width']
    self._mean_D = np.array(manifest['mean'], np.float32)
    self._addresses = list(addresses)
    headers = {'content-type': KIND, HEADER: manifest['fingerprint']}
    if token:
      headers['authorization'] = f'Bearer {token}'
    self._http = httpx.Client(headers=headers, timeout=timeout_s, transport=transport)
    self._threads = ThreadPoolExecutor(2 * len(self._addresses), 'shards')
    self._lock = threading.Lock()
    self._lost: dict[str, float] = {}  # address -> monotonic time of its next probe

  def lost(self) -> list[str]:
    """Returns the addresses of the shards that are left out now."""
    with self._lock:
      now = time.monotonic()
      for address, due in self._lost.items():
        if now >= due:
          self._lost[address] = now + PROBE_S
          self._threads.submit(self._probe, address)
      return sorted(self._lost)

  def __call__(self, ids_TK: np.ndarray, weights_TK: np.ndarray) -> tuple[np.ndarray, bool]:
    """Returns M, float32 [T, D], and whether a shard was missing."""
    lost, body = self.lost(), packed(ids_TK, weights_TK)
    addresses = [address for address in self._addresses if address not in lost]
    replies = self._threads.map(lambda address: self._send(address, body), addresses)
    answers = [answer for answer in replies if answer is not None]
    sums_TD = np.zeros((len(ids_TK), self._width), np.float32)
    weight_T = np.zeros(len(ids_TK), np.float32)
    for values in answers:
      sums_TD += values[: sums_TD.size].reshape(sums_TD.shape)
      weight_T += values[sums_TD.size :]
    if len(answers) == len(self._addresses):
      return sums_TD, False
    whole_T = weights_TK.sum(axis=1)
    some_T = weight_T > 1e-6 * whole_T
    scale_T = whole_T / np.where(some_T, weight_T, 1)
    mean_TD = whole_T[:, None] * self._mean_D[None]
    return np.where(some_T[:, None], sums_TD * scale_T[:, None], mean_TD), True

  def _send(self, address, body):
    """Returns the numbers of a shard; if it does not answer, None, and it is left out."""
    T = int(np.frombuffer(body, '<i4', 1)[0])
    try:
      answer = self._http.post(f'http://{address}{PATH}', content=body)
      if answer.status_code == 200 and len(answer.content) == 4 * T * (self._width + 1):
        return np.frombuffer(answer.content, '<f4')
      reason = f'status {answer.status_code}: {answer.text[:200]}'
    except httpx.HTTPError as error:
      reason = f'{type(error).__name__}: {error}'
    with self._lock:
      if address not in self._lost:
        log.warning('shard %s is left out: %s', address, ' '.join(reason.split()))
      self._lost[address] = time.monotonic() + PROBE_S
    return None

  def _probe(self, address):
    """Sends an empty request to a lost shard, which is used again if it answers."""
    empty = packed(np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))
    if self._send(address, empty) is not None:
      with self._lock:
        self._lost.pop(address, None)
      log.info('shard %s answers again', address)
