"""The fields of a store's batches, as a model gets them."""

from lmn_jax.data.store import Store
from lmn_jax.layers.basic import Number, Schema
from lmn_jax.training.setup import schema_of

VOCABULARY = {'user': 4, 'item': 9, 'item.category': 3}
FEATURES = {'user': (), 'item': ('item.category',), 'context': ()}


def store_of(vocabulary, features, manifest):
  """A store without files."""
  store = Store.__new__(Store)
  store.vocabulary, store.features, store.manifest = vocabulary, features, manifest
  store.vectors, store.widths, store.cold_items = {}, {'item.category': 0, 'user.tags': 2}, 0
  return store


def test_a_store_of_ids_and_codes_has_no_numbers():
  store = store_of(VOCABULARY, FEATURES, {})
  codes = Schema(tuple(VOCABULARY.items()), item=('item.category',), widths=(('user.tags', 2),))
  assert schema_of(store) == codes


def test_numbers_have_the_statistics_of_the_manifest():
  numeric = {
    'event.dwell': {'kind': 'autodis', 'shift': 1.5, 'scale': 2.0, 'count': 8},
    'item.price': {'kind': 'log', 'shift': 0.5, 'scale': 4.0},
  }
  vocabulary, features = VOCABULARY | {'event.action': 5}, FEATURES | {'event': ('event.action',)}
  store = store_of(vocabulary, features, {'numeric': numeric})
  schema = schema_of(store)
  assert schema.numbers == (
    Number('event.dwell', 'autodis', 1.5, 2.0, 8),
    Number('item.price', 'log', 0.5, 4.0),
  )
  assert schema.fields('item') == ('item.category', 'item.price')
  assert schema.fields('event') == ('event.action', 'event.dwell')
  assert schema.fields('user') == ()
  assert hash(schema) == hash(schema_of(store))  # a Program has it
