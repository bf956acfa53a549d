"""Ctrl-C and SIGTERM: one line and an exit status, whatever they interrupt.

In training SIGTERM means more, see distributed/preemption.py. Everywhere else both end the command:
an exception unwinds it, so that files and locks are left in order. DuckDB may go on with a query
for minutes and lose the exception, so connections given to `stops` are interrupted; it then raises
one of its own (`RuntimeError: Query interrupted`), so the signal is remembered: `heard` tells
which. A second signal ends the process at once.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import weakref
from typing import Any, NoReturn

_heard: list[int] = []
_connections: weakref.WeakSet[Any] = weakref.WeakSet()


class Terminated(BaseException):
  """SIGTERM came. No Exception: a handler of any exception does not swallow it."""


def listen() -> None:
  """From now on SIGINT raises KeyboardInterrupt and SIGTERM Terminated, in the main thread.

  A process that is started to ignore SIGINT, as a shell starts those in the background, goes on
  ignoring it.
  """
  _heard.clear()
  signal.signal(signal.SIGTERM, _hear)
  if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, _hear)


def stops(connection: Any) -> Any:
  """The connection of DuckDB, whose query a signal will stop."""
  _connections.add(connection)
  return connection


def heard() -> int | None:
  """The signal that has come since `listen`."""
  return _heard[0] if _heard else None


def _hear(number, _):
  if _heard:
    leave(f'error: ended by a second {signal.Signals(number).name}', 128 + number)
  _heard.append(number)
  for connection in list(_connections):
    with contextlib.suppress(Exception):  # it has been closed
      connection.interrupt()
  raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def leave(line: str | None, status: int) -> NoReturn:
  """Prints a line and ends the process without Python's own end.

  Threads of libraries (readers of batches, XLA's) still run when a command is interrupted. Python's
  end takes the interpreter from under them, and the process may end in a segmentation fault.

  Args:
    line: for standard error, if there is one. status: of the process.
  """
  if line is not None:
    print(line, file=sys.stderr)
  for process in multiprocessing.active_children():  # what Python's own end would do
    process.terminate()
  for stream in (sys.stdout, sys.stderr):
    stream.flush()
  os._exit(status)
