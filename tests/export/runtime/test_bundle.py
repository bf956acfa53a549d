"""The loader opens exports of earlier versions."""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from lmn_jax.export.runtime.bundle import Bundle

# Exports of LMN and DMAN by version 0.1.0 of 2026-11-27, whose loader was one file, with the
# answers of that loader to the requests below (JAX 0.10.2 on CPU).
OLD_EXPORTS = Path(__file__).parent / 'loader_in_one_file.tar.xz'


@pytest.mark.parametrize('name', ['clicks', 'nexts'])
def test_an_export_whose_loader_was_one_file_is_opened(name, tmp_path):
  with tarfile.open(OLD_EXPORTS) as archive:
    archive.extractall(tmp_path, filter='data')
  answers = json.loads((tmp_path / f'{name}.json').read_text())
  assert (tmp_path / name / 'bundle.py').is_file()
  bundle = Bundle(tmp_path / name, (1, 4), (8, 16), check=True)
  assert bundle.fingerprint == answers['fingerprint']
  users = answers['users'][:3]
  histories = [bundle.known_history(user) for user in users]
  assert histories == answers['history'] and all(histories)
  assert [bundle.known_times(user) for user in users] == answers['times']
  asked = [
    bundle.ask(user, answers['items'], bundle.known_history(user)) for user in answers['users']
  ]
  expected = np.array(answers['scores'], np.float32)  # None, of an unknown candidate, is NaN
  scores = np.stack([scores.values for scores in bundle.score(asked)])
  np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
  requests = [
    bundle.ask(user, None, history) for user, history in zip(users, histories, strict=True)
  ]
  recommended = bundle.recommend(requests, [5] * 3, [[]] * 3)
  for (pairs, _), best in zip(recommended, answers['best'], strict=True):
    assert [item for item, _ in pairs] == [item for item, _ in best]
  if name == 'nexts':
    state = bundle.state(users[0], histories[0])
    packed = bytes.fromhex(answers['packed'])
    assert len(bundle.pack(state)) == len(packed)
    events, old_events = (jax.tree.leaves(x)[:4] for x in (state, bundle.unpack(packed)))
    for new, old in zip(events, old_events, strict=True):
      np.testing.assert_array_equal(new, old)
    for new, old in zip(state.carry, bundle.unpack(packed).carry, strict=True):
      np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)
