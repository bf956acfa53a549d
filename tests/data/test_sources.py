"""Two logs have the same signature if and only if the same files are read."""

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
# Few different contents, several of the same size.
contents = st.sampled_from(['', 'a,1\n', 'b,1\n', 'a,2\n', 'a,1\nb,1\n'])
trees = st.dictionaries(
  st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)), contents, min_size=1, max_size=6
)


def write(root, tree):
  """Writes files of (folder, name) -> content below root, all with the same time."""
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


@given(a=trees, b=trees)
def test_signatures_are_equal_if_and_only_if_the_matched_files_are(a, b):
  with tempfile.TemporaryDirectory() as folder:
    root_a, root_b = Path(folder, 'a'), Path(folder, 'b')
    write(root_a, a)
    write(root_b, b)
    assert (signature(root_a) == signature(root_b)) == (matched(a) == matched(b))


@given(tree=trees, data=st.data())
def test_a_signature_changes_if_and_only_if_a_matched_file_does(tree, data):
  """The hashes are kept between the two signatures, as they are between two commands."""
  with tempfile.TemporaryDirectory() as folder:
    write(folder, tree)
    log, hashes = config.data(source=f'{folder}/{PATTERN}'), sources.Hashes()

    def signature_of_log():
      try:
        return sources.signature(log, hashes)
      except UserError:
        return None

    before = signature_of_log()
    parent, name = key = data.draw(st.sampled_from(sorted(tree)))
    path = Path(folder, parent, name)
    change = data.draw(
      st.sampled_from(['append', 'replace', 'remove', 'rename', 'add', 'touch', 'copy'])
    )
    changes = name.startswith('part-')
    if change == 'append':
      path.write_text(tree[key] + 'c,3\n')
    elif change == 'replace':  # in place, with the same size and time
      path.write_text(tree[key].replace('1', '7'))
      os.utime(path, (1, 1))
      changes = changes and '1' in tree[key]
    elif change == 'remove':
      path.unlink()
    elif change == 'rename':
      path.rename(path.with_name('part-2.csv'))
      changes = True
    elif change == 'add':
      path.with_name('part-3.csv').write_text('a,1\n')
      changes = True
    elif change == 'touch':
      os.utime(path, (2, 2))
      path.chmod(0o600)
      changes = False
    else:  # another file with the same name and content
      shutil.copy(path, path.with_suffix('.new'))
      path.with_suffix('.new').rename(path)
      changes = False
    assert (signature_of_log() != before) == changes, change


def test_a_signature_has_all_files_and_the_fields_that_change_the_store(tmp_path):
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
  # A generated log has no files; its name and its arguments define it.
  a, b = (sources.signature(config.data(source=x)) for x in ('synthetic', 'synthetic:long'))
  assert a != b and not a['files']


def test_a_hash_is_reused_if_the_file_is_older_than_the_hash(tmp_path, monkeypatch):
  path = tmp_path / 'log.csv'
  path.write_text('one')
  data, hashes = config.data(source=str(path)), sources.Hashes()
  sources.signature(data, hashes)
  assert not hashes.entries  # the file was written just now, and may change again unnoticed
  monkeypatch.setattr(sources, 'SETTLED_NS', -1)
  sources.signature(data, hashes)
  assert list(hashes.entries) == [str(path)]
  entries = json.loads(json.dumps(hashes.entries))
  entries[str(path)][1] = 'kept'
  again = sources.signature(data, sources.Hashes(entries))
  assert again['files'][0]['sha256'] == 'kept'
  path.write_text('two')
  assert sources.signature(data, sources.Hashes(entries))['files'][0]['sha256'] != 'kept'


def test_the_change_of_a_log_is_described(tmp_path):
  write(tmp_path, {('dt=1', 'part-0.csv'): 'a,1\n', ('dt=2', 'part-0.csv'): 'a,1\n'})
  data = config.data(source=f'{tmp_path}/{PATTERN}')
  new = sources.signature(data)
  old = {'files': [dict(name='part-0.csv', size=4, mtime_ns=1)] * 2}  # of an earlier version
  assert sources.describe_change(new, data) == sources.describe_change(old, data) == ''
  (tmp_path / 'dt=2' / 'part-0.csv').write_text('a,1\nb,2\n')
  change = '2 files of 8 bytes then, 2 files of 12 bytes now'
  assert sources.describe_change(new, data) == sources.describe_change(old, data) == change
  assert sources.describe_change(new, config.data(source=f'{tmp_path}/gone.csv')) == ''
  assert sources.describe_change({}, config.data(source='synthetic')) == ''


@pytest.mark.parametrize('field', ['users_source', 'times_source', 'source'])
def test_a_missing_file_is_named(tmp_path, field):
  write(tmp_path, {('b', 'part-0.csv'): ''})
  fields = dict(source=f'{tmp_path}/{PATTERN}') | {field: f'{tmp_path}/gone.csv'}
  with pytest.raises(UserError, match=rf'config.data.{field}=.*gone.csv. does not exist'):
    sources.signature(config.data(**fields))
