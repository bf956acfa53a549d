"""A reader of Feather files with one event in each row."""

import pyarrow.feather

from lmn_jax.data.readers.reader import Reader
from lmn_jax.data.readers.table import typed


class Feather(Reader):
  name = 'feather'
  endings = ('.feather',)

  def table(self, source, path, db, scratch):
    name = f'feather_{path.stem}'
    db.register(name, pyarrow.feather.read_table(path))
    return typed(str(path), f'"{name}"', db, source.multi, source.settings)
