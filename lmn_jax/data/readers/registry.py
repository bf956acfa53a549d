"""All formats of logs, by name."""

from lmn_jax import plugins
from lmn_jax.data.readers import paths
from lmn_jax.data.readers.generated import Synthetic
from lmn_jax.data.readers.jsonl import JsonLines
from lmn_jax.data.readers.longctr import LongCtr
from lmn_jax.data.readers.parquet import Parquet
from lmn_jax.data.readers.reader import Reader
from lmn_jax.data.readers.sequences import Sequences
from lmn_jax.data.readers.table import SETTINGS, Settings, Table
from lmn_jax.data.readers.text import Csv, MovieLens, RecBole, Tsv
from lmn_jax.data.readers.tfds import Tfds
from lmn_jax.errors import UserError, one_of

READERS: dict[str, Reader] = {
  reader.name: reader
  for reader in (
    Csv(), Tsv(), JsonLines(), Parquet(), RecBole(), MovieLens(), Sequences(), LongCtr(), Tfds(),
    Synthetic(),
  )
}  # fmt: skip


def matching(source: str) -> Reader | None:
  """Returns the built-in reader of a source, or None; names take precedence over endings."""
  return next((reader for reader in reversed(READERS.values()) if reader.matches(source)), None)


def _guarded(setting, kind):
  """Returns a reader of the user's class, whose methods raise UserErrors."""
  with plugins.explained(setting):
    reader = kind()

  def table(*arguments):
    found = plugins.guarded(f'{setting}: table()', kind.table)(reader, *arguments)
    if not isinstance(found, Table):
      raise UserError(
        f'{setting}: table() returned {found!r:.80}; it must return a Table, see '
        'lmn_jax.data.readers.table.typed'
      )
    return found

  reader.table = table
  for method in ('open', 'check', 'signature'):
    if getattr(kind, method) is not getattr(Reader, method):
      call = plugins.guarded(f'{setting}: {method}()', getattr(reader, method))
      setattr(reader, method, call)
  return reader


def reader_of(source: str, name: str, field: str, settings: Settings = SETTINGS) -> Reader:
  """Returns the reader of a source.

  Args:
    source: the source in the config.
    name: of the format, or MODULE:CLASS outside of lmn_jax; '' infers the format from the source.
    field: the config field that sets the source, for messages.
    settings: names of config fields, for messages.

  Raises:
    UserError: if the format is unknown or cannot be inferred.
  """
  if not source:
    raise UserError(f'{field} is empty; name the log: a file, a glob, or a data set')
  if plugins.is_plugin(name):
    reader = plugins.load(settings.format, name)
    if not (isinstance(reader, type) and issubclass(reader, Reader)):
      raise UserError(
        f'{settings.format}={name!r} is {reader!r:.80}, not a reader; make it a subclass of '
        f'{Reader.__module__}.Reader'
      )
    return _guarded(f'{settings.format}={name!r}', reader)
  if name:
    return READERS[one_of(settings.format, name, [*READERS, 'MODULE:CLASS'])]
  reader = matching(source)
  if reader is None:
    raise UserError(
      f'{field}={source!r}: no format has the ending {paths.ending(source)!r}; '
      f'set {settings.format} to one of {", ".join(READERS)}'
    )
  return reader
