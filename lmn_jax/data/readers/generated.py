"""Generated logs, by the name of their generator: 'synthetic', 'synthetic:long', ..."""

import ml_collections

from lmn_jax.data import synthetic
from lmn_jax.data.readers.reader import Opened, Reader
from lmn_jax.data.readers.table import typed
from lmn_jax.errors import one_of


class Synthetic(Reader):
  """A generated log, by the name of its generator."""

  name, rows, splits, by_name = 'synthetic', False, False, True

  def matches(self, source):
    return source.partition(':')[0] == 'synthetic'

  def signature(self, source, field):
    return {}

  def open(self, source, data: ml_collections.ConfigDict, db, scratch):
    generate = synthetic.LOGS[one_of(source.field, source.pattern, synthetic.LOGS)]
    tables = {}
    for name, table in generate(**{'seed': data.seed, **data.synthetic}).items():
      db.register(f'synthetic_{name}', table)
      tables[name] = typed(f'synthetic {name}', f'synthetic_{name}', db, source.multi)
    return Opened(data, [tables['log']], [tables['users']], [tables['items']])
