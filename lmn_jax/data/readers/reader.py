"""A format of logs: which sources are of it, how they are opened, and which files they are."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import duckdb
import ml_collections

from lmn_jax.data.readers import paths
from lmn_jax.data.readers.table import SETTINGS, Settings, Table, nothing

# Bytes of a line: of an event, and of a user's whole history. DuckDB holds buffers of four lines
# for each thread.
LONGEST_LINE, LONGEST_HISTORY = 2**21, 2**24
AUTO = 'auto'  # the quote that goes with the format


class Opened(NamedTuple):
  """A log and its side files, opened but not read."""

  data: ml_collections.ConfigDict  # with the column names of formats that bring their own
  log: Iterable[Table]
  users: list[Table] = []
  items: list[Table] = []
  positions: bool = False  # the times are positions in a sequence


class Reader:
  """A format. A new one defines `table`, or `open` if its source is not files of rows.

  Attributes:
    name: value of config.data.format. endings: of the names of its files.
    rows: whether a row of a file is an interaction, which may hold lists of candidates and
      histories. splits: whether config.data.valid_source and test_source may be other sources of
      it. tells_split: whether it says itself which split a row is of. by_name: whether the source
      is a name and no file.
    delimiter: between the columns of text; '' for a format that is not text. encoded: whether
      config.data.encoding is read. headless: whether text has no line of names. plain_quotes:
      whether quotes are plain characters. longest_line: of text, in bytes.
    fields: fields of config.data that no other format reads.
  """

  name: str = ''
  endings: tuple[str, ...] = ()
  rows: bool = True
  splits: bool = True
  tells_split: bool = False
  by_name: bool = False
  delimiter: str = ''
  encoded: bool = False
  headless: bool = False
  plain_quotes: bool = False
  longest_line: int = LONGEST_LINE
  fields: tuple[str, ...] = ()

  def matches(self, source: str) -> bool:
    """Whether a source is of this format, where config.data.format does not say."""
    return not Path(source).is_dir() and paths.ending(source) in self.endings

  def is_text(self, source: str) -> bool:
    """Whether delimiter, quote, header and names of columns are read for these files."""
    del source
    return bool(self.delimiter)

  def check(self, data: ml_collections.ConfigDict) -> None:
    """Refuses fields of config.data that this format does not read.

    Raises:
      UserError: naming the field.
    """

  def signature(self, source: str, field: str) -> dict[str, Path]:
    """The files of a source, by the names that a store knows them by; none where `by_name`.

    Args:
      source: of the config. field: that names it, for messages.

    Raises:
      UserError: a file is missing.
    """
    return paths.named(source, field)

  def open(
    self, source: 'Source', data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection,
    scratch: Path,
  ) -> Opened:  # fmt: skip
    """Opens a log, and reads no more than headers.

    Args:
      source: what to read. data: config.data. db: may hold what is read. scratch: folder for
        copies.

    Raises:
      UserError: a file that is missing or cannot be read.
    """
    return Opened(data, self.tables(source, db, scratch))

  def tables(
    self, source: 'Source', db: duckdb.DuckDBPyConnection, scratch: Path
  ) -> Iterator[Table]:
    """Yields a Table for each file, in the order of their names.

    Raises:
      UserError: if there is no file, or one has no readable header.
    """
    for path in paths.files(source.pattern, source.field):
      yield self.table(source, path, db, scratch) if path.stat().st_size else nothing(path)

  def table(
    self, source: 'Source', path: Path, db: duckdb.DuckDBPyConnection, scratch: Path
  ) -> Table:
    """The Table of a file that is not empty."""
    raise TypeError(f'{type(self).__name__} has no table(); a reader of files must define one')

  def column_name(self, name: str) -> str:
    """The name of a column, as the first line of a text has it -> as the config names it."""
    return name


class Source(NamedTuple):
  """What to read, and how; the fields mean what they mean in `config.data`."""

  pattern: str  # a file or a glob
  field: str  # the field of the configuration that names it, for messages
  reader: Reader
  delimiter: str = ''
  quote: str = AUTO
  header: bool = True
  fields: tuple[str, ...] = ()
  encoding: str = 'utf-8'
  multi: dict[str, str] = {}  # separators of the columns that hold lists
  settings: Settings = SETTINGS
  skip: bool = False  # lines that cannot be read are left out
