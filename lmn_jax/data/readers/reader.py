"""A format of logs: which sources it reads, and how it opens their files."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import duckdb
import ml_collections

from lmn_jax.data.readers import paths
from lmn_jax.data.readers.table import SETTINGS, Settings, Table, empty_table

# The maximum bytes of a line: one event, or the whole history of a user. Each thread of DuckDB
# allocates buffers of four lines.
LONGEST_LINE, LONGEST_HISTORY = 2**21, 2**24
AUTO = 'auto'  # the default quote of the format


class Opened(NamedTuple):
  """A log and its side files, opened but not read."""

  data: ml_collections.ConfigDict  # config.data, with the column names that the format fixes
  log: Iterable[Table]
  users: list[Table] = []
  items: list[Table] = []
  positions: bool = False  # whether the times are positions in a sequence


class Reader:
  """A format. A new one defines `table`, or `open` if its source is not files of rows.

  Attributes:
    name: the value of config.data.format.
    endings: the endings of its files' names.
    rows: whether a row of a file is an interaction, which may have lists of candidates and
      histories.
    splits: whether config.data.valid_source and test_source can be of this format.
    defines_split: whether the format itself assigns each row to a split.
    by_name: whether the source is a name and not a path.
    delimiter: between the columns of text; '' for a format that is not text.
    encoded: whether config.data.encoding is read.
    headless: whether text never has a header.
    plain_quotes: whether quotes are plain characters.
    longest_line: the maximum bytes of a line of text.
    fields: the fields of config.data that only this format reads.
  """

  name: str = ''
  endings: tuple[str, ...] = ()
  rows: bool = True
  splits: bool = True
  defines_split: bool = False
  by_name: bool = False
  delimiter: str = ''
  encoded: bool = False
  headless: bool = False
  plain_quotes: bool = False
  longest_line: int = LONGEST_LINE
  fields: tuple[str, ...] = ()

  def matches(self, source: str) -> bool:
    """Whether this format reads the source if config.data.format is not set."""
    return not Path(source).is_dir() and paths.ending(source) in self.endings

  def is_text(self, source: str) -> bool:
    """Whether delimiter, quote, header and column names of the config apply to these files."""
    del source
    return bool(self.delimiter)

  def layout(self, data: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns config.data with the names of the columns and files that the format itself fixes."""
    return data

  def check(self, data: ml_collections.ConfigDict) -> None:
    """Refuses fields of config.data that this format does not read.

    Raises:
      UserError: naming the field.
    """

  def signature(self, source: str, field: str) -> dict[str, Path]:
    """Returns the files of a source, keyed by the names in a store's signature.

    Args:
      source: the source in the config. field: the field that sets it, for messages.

    Raises:
      UserError: if a file is missing.
    """
    return paths.files_by_name(source, field)

  def open(
    self, source: 'Source', data: ml_collections.ConfigDict, db: duckdb.DuckDBPyConnection,
    scratch: Path,
  ) -> Opened:  # fmt: skip
    """Opens a log without reading more than headers.

    Args:
      source: what to read. data: config.data. db: opens the files. scratch: folder for copies.

    Raises:
      UserError: if a file is missing or cannot be read.
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
      yield self.table(source, path, db, scratch) if path.stat().st_size else empty_table(path)

  def table(
    self, source: 'Source', path: Path, db: duckdb.DuckDBPyConnection, scratch: Path
  ) -> Table:
    """Returns the Table of a file that is not empty."""
    raise TypeError(f'{type(self).__name__} has no table(); a reader of files must define it')

  def column_name(self, name: str) -> str:
    """Returns the name of a column for the config, from its name in the header."""
    return name


class Source(NamedTuple):
  """What to read and how; fields have the same meaning as in `config.data`."""

  pattern: str  # a file or a glob
  field: str  # the config field that sets it, for messages
  reader: Reader
  delimiter: str = ''
  quote: str = AUTO
  header: bool = True
  fields: tuple[str, ...] = ()
  encoding: str = 'utf-8'
  multi: dict[str, str] = {}  # separators of the columns that hold lists
  settings: Settings = SETTINGS
  skip: bool = False  # skip and count unreadable lines
