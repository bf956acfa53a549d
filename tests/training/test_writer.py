"""Metrics files: a resumed run writes the same lines as an uninterrupted one."""

import json
import os
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmn_jax import files
from lmn_jax.errors import UserError
from lmn_jax.training import writer
from tests.runs import load_experiment

kill_test = load_experiment('kill_test')


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_lines_are_written_at_once(tmp_path):
  with writer.Writer(tmp_path) as out:
    out.write(1, {'loss': np.float32(0.5), 'health': {'dead': jnp.int32(3)}, 'auc': None})
    assert lines(tmp_path) == [
      {'step': 1, 'group': 'train', 'loss': 0.5, 'health': {'dead': 3}, 'auc': None}
    ]
    out.write(1, {'auc': 0.7}, group='valid')
    with pytest.raises(ValueError, match='train step 1 after step 1'):
      out.write(1, {'loss': 0.4})
  out.close()


def test_events_hold_the_scalars(tmp_path):
  with writer.Writer(tmp_path) as out:
    out.write(7, {'loss': 0.5, 'health': {'dead': 3}, 'auc': None})
  shown = kill_test.scalars_of(tmp_path)
  assert shown == {'train/loss': [(7, 0.5)], 'train/health/dead': [(7, 3.0)]}


def run(workdir, steps, resume_step=None, scale=1):
  with writer.Writer(workdir, resume_step) as out:
    for step in steps:
      out.write(step, {'loss': scale / step})
      if step % 2 == 0:
        out.write(step, {'auc': 1 - 1 / step}, group='valid')


def test_a_resumed_run_writes_each_step_once(tmp_path):
  """Killed after step 5 with the last checkpoint at step 3, in the middle of a line."""
  run(tmp_path / 'whole', range(1, 9))
  run(tmp_path / 'cut', [1, 2, 3])
  # Events of the checkpoint's step that were not written to disk.
  (events,) = (tmp_path / 'cut' / 'tensorboard').iterdir()
  events.write_bytes(events.read_bytes()[:-20])
  run(tmp_path / 'cut', [4, 5], resume_step=3, scale=7)
  with (tmp_path / 'cut' / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 6, "gro')
  run(tmp_path / 'cut', range(4, 9), resume_step=3)
  assert lines(tmp_path / 'cut') == lines(tmp_path / 'whole')
  # TensorBoard hides events at or after the step at which a session starts.
  starts = [e.step for e in kill_test.events_of(tmp_path / 'cut') if e.HasField('session_log')]
  assert starts == [0, 3, 3]
  shown = kill_test.scalars_of(tmp_path / 'whole')
  assert kill_test.scalars_of(tmp_path / 'cut') == shown
  assert [step for step, _ in shown['train/loss']] == list(range(1, 9))


def test_lines_of_the_resumed_step_are_not_written_again(tmp_path):
  run(tmp_path, range(1, 5))
  before = lines(tmp_path)
  run(tmp_path, [4], resume_step=4)
  assert lines(tmp_path) == before


def test_a_new_run_writes_a_new_file(tmp_path):
  run(tmp_path, range(1, 5))
  run(tmp_path, [1])
  assert [line['step'] for line in lines(tmp_path)] == [1]


def test_a_file_with_other_lines_is_not_changed(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "group": "train"}\nnotes of mine\n')
  with pytest.raises(UserError, match='line 2 is not a metric; move the file away'):
    writer.Writer(tmp_path, resume_step=1)
  assert 'notes of mine' in path.read_text()


def test_only_process_zero_writes(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with writer.Writer(tmp_path / 'run') as out:
    out.write(1, {'loss': 1.0})
    out.print('hello')
    out.flush()
  files.write_json(tmp_path / 'run' / 'report.json', {})
  assert list(tmp_path.iterdir()) == []
  assert capfd.readouterr().err == ''


def test_write_json_writes_all_or_nothing(tmp_path):
  path = tmp_path / 'deep' / 'report.json'
  value = {'auc': np.float64(0.5), 'nan': float('nan'), 'low': jnp.bfloat16(1.5), 'n': (1, None)}
  files.write_json(path, value | {'where': tmp_path, 'v': np.arange(2), 'yes': np.True_})
  got = json.loads(path.read_text())
  assert got == {
    'auc': 0.5,
    'nan': 'nan',
    'low': 1.5,
    'n': [1, None],
    'where': str(tmp_path),
    'v': [0, 1],
    'yes': True,
  }
  with pytest.raises(TypeError, match='has no JSON form'):
    files.write_json(path, {'bad': object()})
  assert json.loads(path.read_text()) == got
  assert [child.name for child in path.parent.iterdir()] == ['report.json']


def test_a_failed_write_keeps_the_old_file_and_no_other(tmp_path, monkeypatch):
  path = tmp_path / 'report.json'
  files.write_json(path, 1)

  def full(*_):
    raise OSError('disk full')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='disk full'):
    files.write_json(path, 2)
  assert json.loads(path.read_text()) == 1
  assert [child.name for child in tmp_path.iterdir()] == ['report.json']


def test_files_have_the_mode_of_the_umask(tmp_path):
  files.write_json(tmp_path / 'report.json', 1)
  (tmp_path / 'plain').touch()
  modes = {stat.S_IMODE(child.stat().st_mode) for child in tmp_path.iterdir()}
  assert len(modes) == 1


def test_progress_line():
  line = writer.progress(
    step=1200, steps=5000, elapsed=60.0, examples_per_second=51234.0, loss=0.43119,
    best=('auc', 0.7312), rss=3 * 2**29, start=200,
  )  # fmt: skip
  assert line == (
    'step 1200/5000 24% · eta 3m48s · 51.2k ex/s · loss 0.4312 · auc 0.7312 · 1.5 GiB'
  )
  assert 'eta' not in writer.progress(3, 9, 0.0, 0.0, 0.7, start=3)


@pytest.mark.parametrize(
  'seconds, text',
  [(0, '0s'), (59.6, '1m00s'), (192, '3m12s'), (18420, '5h07m'), (183600, '2d03h'), (-1, '0s')],
)
def test_duration(seconds, text):
  assert writer.duration(seconds) == text


def test_peak_rss_is_the_peak():
  """A child reports the 200 MiB that it has freed, and not those of its parent."""
  program = (
    'from lmn_jax.training.writer import peak_rss\n'
    'import numpy as np\n'
    'a = peak_rss(); x = np.ones(25 * 2**20); del x\n'
    'print(peak_rss() - a)'
  )
  grown = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert 180 * 2**20 < int(grown.stdout) < 260 * 2**20


def test_a_closed_pipe_is_not_an_error():
  code = (
    'from lmn_jax.training.writer import print_result; '
    "print_result('x\\n' * 10**6); print_result('more')"
  )
  with subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (0, b'')
