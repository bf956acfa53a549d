"""Requests that the OpenAPI document allows are answered as it describes; others are refused."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

from lmn_jax.serving import api
from lmn_jax.serving.service import Service
from lmn_jax.serving.users.store import open_store
from tests import fake_service
from tests.runs import load_experiment

whole = load_experiment('fuzz').whole

# The document does not describe that all events or none have times, nor the names of features.
CONFIG = {
  'checks': {
    'positive_data_acceptance': {'expected-statuses': ['200', '422']},
    'negative_data_rejection': {'expected-statuses': ['400', '413', '415', '422']},
    'not_a_server_error': {'expected-statuses': ['2xx', '4xx']},
  }
}


class AnyFeature(fake_service.FakeBundle):
  """A bundle that accepts features of any name."""

  def ask(self, user, candidates, history=(), context=None, profile=None, state=None, time=None):
    items = [x['item'] if isinstance(x, dict) else x for x in history]
    return super().ask(user, candidates, items, None, None, state)

  def check_event(self, features, time):
    """Accepts them."""


@pytest.fixture(scope='module', params=['click', 'next_item'])
def document(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('fuzz')
  export = fake_service.write_export(folder / 'export', request.param)
  store = open_store(str(folder / 'users.sqlite'), 20)
  limits = fake_service.settings(max_candidates=9, max_history=9, max_events=5, max_k=9)
  service = Service(limits, export, AnyFeature, store)
  with fake_service.listening(api.make_app(service)) as url:
    fake_service.wait_for(lambda: service.live.ready)
    schema = schemathesis.openapi.from_url(
      f'{url}/openapi.json', config=SchemathesisConfig.from_dict(CONFIG)
    )

    @schema.hook
    def map_body(context, body):
      return whole(body)

    yield schema


@pytest.mark.parametrize('mode', list(GenerationMode))
@pytest.mark.parametrize('path', ['/v1/score', '/v1/recommend', '/v1/update'])
def test_requests_from_the_document(document, path, mode):
  statuses = set()

  @settings(max_examples=8, suppress_health_check=list(HealthCheck))
  @given(case=document[path]['post'].as_strategy(generation_mode=mode))
  def ask(case):
    statuses.add(case.call_and_validate().status_code)

  ask()
  assert (200 in statuses) == mode.is_positive


@pytest.mark.parametrize('path', ['/healthz', '/readyz', '/metrics'])
def test_requests_without_a_body_are_answered(document, path):
  assert document[path]['get'].Case().call_and_validate().status_code == 200
