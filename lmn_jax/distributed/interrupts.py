"""Ctrl-C and SIGTERM end a command with one line and an exit status, whatever it does.

During training preemption.py handles SIGTERM. Elsewhere both signals raise an exception in the main
thread, so that files and locks are released. DuckDB may continue a query for minutes and lose the
exception; so connections registered with `stops` are interrupted. DuckDB then raises its own error
(`RuntimeError: Query interrupted`), so the signal is recorded: see `received`. A second signal ends
the process at once.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import weakref
from typing import Any, NoReturn

_received: list[int] = []
_connections: weakref.WeakSet[Any] = weakref.WeakSet()


class Terminated(BaseException):
  """SIGTERM came. Not an Exception: a handler of any Exception does not catch it."""


def listen() -> None:
  """Makes SIGINT raise KeyboardInterrupt and SIGTERM raise Terminated, in the main thread.

  SIGINT stays ignored in a process that ignores it, as shells start those in the background.
  """
  _received.clear()
  signal.signal(signal.SIGTERM, _hear)
  if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, _hear)


def stops(connection: Any) -> Any:
  """Registers a DuckDB connection whose query a signal interrupts, and returns it."""
  _connections.add(connection)
  return connection


def received() -> int | None:
  """Returns the signal that came since `listen`; None if none did."""
  return _received[0] if _received else None


def _hear(number, _):
  if _received:
    exit_now(f'error: ended by a second {signal.Signals(number).name}', 128 + number)
  _received.append(number)
  for connection in list(_connections):
    with contextlib.suppress(Exception):  # it is closed
      connection.interrupt()
  raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def exit_now(line: str | None, status: int) -> NoReturn:
  """Prints a line and ends the process without Python's finalization.

  Threads of libraries (readers of batches, XLA) still run when a command is interrupted. Python's
  finalization removes the interpreter under them, which can cause a segmentation fault.

  Args:
    line: for standard error, or None. status: of the process.
  """
  if line is not None:
    print(line, file=sys.stderr)
  for process in multiprocessing.active_children():  # as Python's finalization does
    process.terminate()
  for stream in (sys.stdout, sys.stderr):
    stream.flush()
  os._exit(status)
