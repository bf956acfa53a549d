"""The exports of accelerator.py: how soon one answers, and how fast."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from accelerator_rows import Row, config_of
from accelerator_steps import Stores, Timing
from latency import queries_of, time_export

from lmn_jax.export import export
from lmn_jax.export.runtime.bundle import Bundle
from lmn_jax.training import setup as setups
from lmn_jax.training.checkpoint import Checkpoints
from lmn_jax.training.trained_run import CHECKPOINTS

CALLS = 200  # timed requests
CALLS_QUICK = 20


def export_untrained(row: Row, timing: Timing, stores: Stores, folder: Path) -> Path:
  """The path of an export of the initial weights, which cost the same as trained ones."""
  config = config_of(row, timing.small)
  store, workdir = stores.of(config.data), folder / 'run'
  workdir.mkdir()
  setup = setups.set_up(config, store)
  with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
    state = setup.trainer.init(config.seed)
    checkpoints.save(state, {}, setups.identity_of(config, store))
  export.export(config, workdir, store, folder / 'export', 'float32')
  return folder / 'export'


def measure_export(row: Row, timing: Timing, stores: Stores) -> dict[str, Any]:
  """Seconds until an export is open, has answered, and has compiled all; p50 of a request."""
  with tempfile.TemporaryDirectory() as scratch:
    began = time.perf_counter()
    path = export_untrained(row, timing, stores, Path(scratch))
    export_s = time.perf_counter() - began
    began = time.perf_counter()
    bundle = Bundle(path)  # with the sizes of programs that a service has on this platform
    opens_s = time.perf_counter() - began
    queries = queries_of(bundle, row.L, row.batch)
    first = bundle.ask(*queries[0], bundle.known_history(queries[0].user))
    began = time.perf_counter()
    bundle.score([first])
    first_s = time.perf_counter() - began
    began = time.perf_counter()
    bundle.warm(os.cpu_count() or 1)
    warm_s = time.perf_counter() - began
    times = time_export(bundle, queries, CALLS_QUICK if timing.small else CALLS)
  return {
    'export_s': round(export_s, 2),
    'opens_s': round(opens_s, 2),
    'first_s': round(first_s, 2),
    'programs': bundle.compiled(),
    'ready_s': round(opens_s + first_s + warm_s, 2),
    'p50_ms': times['score_p50_ms'],
    'p99_ms': times['score_p99_ms'],
    'per_s': round(1e3 / times['score_p50_ms']),
    'unit': row.unit,
    'prepare_s': stores.prepare_s,
  }
