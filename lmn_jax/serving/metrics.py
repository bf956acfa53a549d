"""Metrics of the service, for Prometheus.

Several processes count into files of one folder (PROMETHEUS_MULTIPROC_DIR, which must be set before
this module is imported), and each can report the sums of all.
"""

import os
import re
from pathlib import Path

from prometheus_client import (
  CollectorRegistry,
  Counter,
  Gauge,
  Histogram,
  generate_latest,
  multiprocess,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

FOLDER = 'PROMETHEUS_MULTIPROC_DIR'
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
  """The metrics of a process."""

  def __init__(self):
    self._registry = CollectorRegistry()
    options = dict(namespace='lmn_jax', registry=self._registry)
    self.requests = Counter('requests', 'Requests answered.', ['path', 'status'], **options)
    self.seconds = Histogram(
      'request_seconds', 'Seconds to an answer.', ['path'], buckets=SECONDS, **options
    )
    self.batches = Histogram('batch_size', 'Requests computed together.', buckets=SIZES, **options)
    self.store_errors = Counter('store_errors', 'Failures of the store of users.', **options)
    self.degraded = Counter('degraded_answers', 'Answers without some lost shards.', **options)
    self.swaps = Counter('export_swaps', 'Exports opened or refused.', ['result'], **options)
    # Of several processes, the gauges are of those that are running.
    self.queue = Gauge('queue_length', 'Requests waiting.', multiprocess_mode='livesum', **options)
    self.compiled = Gauge(
      'compiled_programs', 'Programs compiled by a process.', multiprocess_mode='livemax', **options
    )
    self.export = Gauge(
      'export', 'Processes that use an export.', ['model', 'export'],
      multiprocess_mode='livesum', **options,
    )  # fmt: skip

  def text(self) -> bytes:
    """Returns the metrics of all processes in the format of Prometheus."""
    folder = os.environ.get(FOLDER)
    if not folder:
      return generate_latest(self._registry)
    for path in Path(folder).glob('gauge_live*.db'):
      process = int(re.search(r'_(\d+)\.db$', path.name)[1])
      if not _is_running(process):
        multiprocess.mark_process_dead(process, folder)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, folder)
    return generate_latest(registry)


def _is_running(process):
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  return True
