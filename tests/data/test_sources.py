"""A log is the same log if the very same files are read, and another one otherwise."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmn_jax import config
from lmn_jax.data import sources
from lmn_jax.errors import UserError

FOLDERS, NAMES = ('dt=1', 'dt=2', 'dt=10', 'b'), ('part-0.csv', 'part-1.csv', 'notes.txt')
PATTERN = '*/part-*.csv'
# Few contents, many of one size.
contents = st.sampled_from(['', 'a,1\n', 'b,1\n', 'a,2\n', 'a,1\nb,1\n'])
trees = st.dictionaries(
  st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)), contents, min_size=1, max_size=6
)


def write(root, tree):
  """Files of (folder, name) -> content below root, all of one time."""
  for (folder, name), content in tree.items():
    path = Path(root, folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    os.utime(path, (1, 1))


def matched(tree):
  return {x: y for x, y in tree.items() if x[1].startswith('part-')}


def signature(root, **fields):
  try:
    return sources.signature(config.data(source=f'{root}/{PATTERN}', **fields))
  except UserError:
    return None


@given(one=trees, two=trees)
def test_two_logs_are_one_if_all_files_that_match_are(one, two):
  with tempfile.TemporaryDirectory() as folder:
    roots = Path(folder, 'here'), Path(folder, 'there')
    for root, tree in zip(roots, (one, two), strict=True):
      write(root, tree)
    found = signature(roots[0]), signature(roots[1])
    assert (found[0] == found[1]) == (matched(one) == matched(two))


@given(tree=trees, data=st.data())
def test_any_change_of_a_file_that_matches_is_seen_and_no_other(tree, data):
  """With the hashes known from before, as a second command has them."""
  with tempfile.TemporaryDirectory() as folder:
    write(folder, tree)
    log, hashes = config.data(source=f'{folder}/{PATTERN}'), sources.Hashes()

    def told():
      try:
        return sources.signature(log, hashes)
      except UserError:
        return None

    before = told()
    where, name = key = data.draw(st.sampled_from(sorted(tree)))
    path = Path(folder, where, name)
    change = data.draw(
      st.sampled_from(['append', 'replace', 'remove', 'rename', 'add', 'touch', 'copy'])
    )
    seen = name.startswith('part-')
    if change == 'append':
      path.write_text(tree[key] + 'c,3\n')
    elif change == 'replace':  # of the same size and time, in place
      path.write_text(tree[key].replace('1', '7'))
      os.utime(path, (1, 1))
      seen = seen and '1' in tree[key]
    elif change == 'remove':
      path.unlink()
    elif change == 'rename':
      path.rename(path.with_name('part-2.csv'))
      seen = True
    elif change == 'add':
      path.with_name('part-3.csv').write_text('a,1\n')
      seen = True
    elif change == 'touch':
      os.utime(path, (2, 2))
      path.chmod(0o600)
      seen = False
    else:  # the same content in another file of the name
      shutil.copy(path, path.with_suffix('.new'))
      path.with_suffix('.new').rename(path)
      seen = False
    assert (told() != before) == seen, change


def test_what_else_a_store_is_made_of(tmp_path):
  write(tmp_path, {('dt=1', 'part-0.csv'): 'a,1\n', ('b', 'users.csv'): 'user,age\na,1\n'})
  side = str(tmp_path / 'b' / 'users.csv')
  first = signature(tmp_path, users_source=side)
  assert json.loads(json.dumps(first)) == first
  assert [file['name'] for file in first['files']] == [
    'users_source/users.csv', 'source/dt=1/part-0.csv',
  ]  # fmt: skip
  assert signature(tmp_path, users_source=side, memory_limit='1GB', name='else') == first
  assert signature(tmp_path, users_source=side, min_count=2) != first
  assert signature(tmp_path, items_source=side) != signature(tmp_path) != first
  assert (
    signature(tmp_path, format='csv') == signature(tmp_path) != signature(tmp_path, format='tsv')
  )
  # What is generated has no files: its name and its arguments say all.
  made = [sources.signature(config.data(source=x)) for x in ('synthetic', 'synthetic:long')]
  assert made[0] != made[1] and not made[0]['files']


def test_a_hash_is_trusted_when_the_file_is_older_than_it(tmp_path, monkeypatch):
  path = tmp_path / 'log.csv'
  path.write_text('one')
  data, hashes = config.data(source=str(path)), sources.Hashes()
  sources.signature(data, hashes)
  assert not hashes.known  # written just now: it might be written to again, unseen
  monkeypatch.setattr(sources, 'SETTLED_NS', -1)
  sources.signature(data, hashes)
  assert list(hashes.known) == [str(path)]
  known = json.loads(json.dumps(hashes.known))
  known[str(path)][1] = 'as it was'
  again = sources.signature(data, sources.Hashes(known))
  assert again['files'][0]['sha256'] == 'as it was'
  path.write_text('two')
  assert sources.signature(data, sources.Hashes(known))['files'][0]['sha256'] != 'as it was'


def test_in_words_how_a_log_changed(tmp_path):
  write(tmp_path, {('dt=1', 'part-0.csv'): 'a,1\n', ('dt=2', 'part-0.csv'): 'a,1\n'})
  data = config.data(source=f'{tmp_path}/{PATTERN}')
  now = sources.signature(data)
  before = {'files': [dict(name='part-0.csv', size=4, mtime_ns=1)] * 2}  # of earlier versions
  assert sources.changed(now, data) == sources.changed(before, data) == ''
  (tmp_path / 'dt=2' / 'part-0.csv').write_text('a,1\nb,2\n')
  for told in (now, before):
    assert sources.changed(told, data) == '2 files of 8 bytes then, 2 files of 12 bytes now'
  assert sources.changed(now, config.data(source=f'{tmp_path}/gone.csv')) == ''
  assert sources.changed({}, config.data(source='synthetic')) == ''


@pytest.mark.parametrize('field', ['users_source', 'times_source', 'source'])
def test_a_file_that_is_missing_is_named(tmp_path, field):
  write(tmp_path, {('b', 'part-0.csv'): ''})
  fields = dict(source=f'{tmp_path}/{PATTERN}') | {field: f'{tmp_path}/gone.csv'}
  with pytest.raises(UserError, match=rf'config.data.{field}=.*gone.csv. does not exist'):
    sources.signature(config.data(**fields))
