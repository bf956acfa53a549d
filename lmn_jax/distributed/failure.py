"""The end of all processes when one of them fails.

A process that fails writes its message to JAX's coordination service. Each process has a thread
that waits for such a message and then ends the process; otherwise it would wait without end for a
collective of a process that is gone.
"""

import json
import multiprocessing
import os
import re
import sys
import threading
import time
from typing import NoReturn

from lmn_jax.distributed import processes
from lmn_jax.distributed.processes import WAIT_MILLISECONDS

KEY = 'lmn_jax/failed'
# Process 0 holds the message, so it ends only after the others have read it, or after this time.
FAREWELL_SECONDS = 5
LOST = re.compile(r'[Gg]loo|NCCL|UNAVAILABLE|[Cc]onnection (closed|reset|refused)|[Hh]eartbeat')

_ending = threading.Lock()  # never released: one thread ends the process


def end(message: str, status: int) -> NoReturn:
  """Ends this process and all others, each with the same line: that of the first that failed.

  Args:
    message: one line. status: the exit status of all.
  """
  _ending.acquire()
  client = processes.client()
  report = first_report = {'host': processes.index(), 'status': status, 'message': message}
  try:
    client.key_value_set(KEY, json.dumps(report))
  except Exception:  # another process was first, or process 0, which holds the message, is gone
    try:
      first_report = json.loads(client.blocking_key_value_get(KEY, 1000)) or report
    except Exception:
      first_report = report
  _exit(first_report)


def explain(error: BaseException) -> str:
  """Returns one line on an error of the program, or of another host."""
  text = f'{type(error).__name__}: {first_line(error)}'
  if LOST.search(text):
    return f'another host does not answer; it was killed or lost its network ({text})'
  return text


def first_line(error: BaseException) -> str:
  """Returns the first line of an error, cut to 300 characters."""
  return (str(error).strip().splitlines() or [''])[0][:300]


def watch() -> None:
  """Waits for the message of a process that fails, and ends this one with it. Runs in a thread."""
  client, report = processes.client(), None
  while report is None:
    try:
      report = json.loads(client.blocking_key_value_get(KEY, WAIT_MILLISECONDS))
      if report is None:
        return  # `end_watch`
    except Exception as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        # Process 0, which holds the messages, has ended without one.
        message = f'host 0 is gone ({first_line(error)})'
        report = {'host': processes.index(), 'status': 1, 'message': message}
  _ending.acquire()
  _exit(report)


def end_watch() -> None:
  """Ends the `watch` of every process; process 0 calls it when all are done."""
  processes.client().key_value_set(KEY, 'null')


def _exit(report: dict) -> NoReturn:
  """Prints the message and ends the process at once; JAX would wait for the others."""
  client, me = processes.client(), processes.index()
  print(f'error: host {report["host"]}: {report["message"]}', file=sys.stderr)
  for worker in multiprocessing.active_children():
    worker.kill()
  sys.stdout.flush()
  sys.stderr.flush()
  try:
    client.key_value_set(f'{KEY}/seen/{me}', '')
    if me == 0:
      # JAX aborts its peers if process 0 exits first.
      deadline = time.monotonic() + FAREWELL_SECONDS
      for process in range(1, processes.count()):
        milliseconds = int(1000 * (deadline - time.monotonic()))
        client.blocking_key_value_get(f'{KEY}/seen/{process}', max(milliseconds, 1))
      time.sleep(1)
  except Exception:
    pass  # a lost process does not confirm; this one ends all the same
  os._exit(report['status'])
