"""Files of a small log, its store in the layout of earlier versions, and a run of it."""

import json
import os
from pathlib import Path

from lmn_jax import config
from lmn_jax.training.checkpoint import PREFIX


def write_log(path: Path, rows: int = 60, first: int = 0) -> Path:
  """Writes a log of `rows` events of a few users, starting at event `first`."""
  lines = [f'u{k % 7},i{k * k % 11},{k},{k % 2}' for k in range(first, first + rows)]
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(['user,item,time,label', *lines]) + '\n')
  return path


def append(path: Path, *lines: str) -> None:
  """Appends lines to a file."""
  with path.open('a') as file:
    file.write(''.join(f'{line}\n' for line in lines))


def data_of(source, name: str = 'log', **fields):
  """Returns the data config of a log."""
  return config.data(name=name, source=str(source), **fields)


def as_before(store, name: str = 'log') -> Path:
  """Converts a store to the layout of earlier versions: the name of its folder has no fingerprint,
  its fingerprint is that of the files, and its signature has base names and times of files."""
  folder = store.path.rename(store.path.with_name(name))
  manifest = json.loads((folder / 'manifest.json').read_text())
  manifest['fingerprint'] = manifest.pop('content')
  files = [Path(x) for x in manifest['notes'].get('files', [])]
  stats = [(x.name, x.stat()) for x in files]
  fields = json.loads(config.data(name=name).to_json_best_effort())
  manifest['signature'] = {
    'files': [{'name': x, 'size': s.st_size, 'mtime_ns': s.st_mtime_ns} for x, s in stats],
    'config.data': fields,
  }
  (folder / 'manifest.json').write_text(json.dumps(manifest, indent=1))
  return folder


def make_run(workdir: Path, experiment, fingerprint: str, step: int = 3) -> Path:
  """Writes a checkpoint with the config and store of a run, without weights."""
  item = workdir / 'checkpoints' / f'{PREFIX}{step}' / 'config'
  item.mkdir(parents=True)
  identity = experiment.to_dict() | {'store': fingerprint}
  (item / 'metadata').write_text(json.dumps(identity))
  return workdir


def folder_bytes(folder: Path) -> dict[str, bytes]:
  """Returns path -> content of every file of a folder."""
  return {
    os.fspath(x.relative_to(folder)): x.read_bytes() for x in folder.rglob('*') if x.is_file()
  }
