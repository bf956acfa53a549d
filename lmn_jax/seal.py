"""The seal of a folder: size and CRC-32 of every file, so that what is spoilt is seen.

CRC-32 sees what disks and copies do, at twice the speed of a cryptographic hash; who would forge a
checkpoint can forge its seal.
"""

import json
import zlib
from pathlib import Path

SEAL = 'seal.json'


def seal(folder: Path, but: tuple[str, ...] = ()) -> None:
  """Writes seal.json, with the size and the CRC-32 of every file of a folder as it is now.

  Args:
    folder: to seal. but: names of files that may change afterwards.
  """
  sealed = {
    str(path.relative_to(folder)): [path.stat().st_size, _crc(path)]
    for path in sorted(folder.rglob('*'))
    if path.is_file() and path.name not in (SEAL, *but)
  }
  (folder / SEAL).write_text(json.dumps(sealed))


def flaw(folder: Path) -> str:
  """In words, how a folder differs from its seal: the first file that does; '' if none does."""
  try:
    sealed = {
      Path(name): (int(size), int(crc))
      for name, (size, crc) in json.loads((folder / SEAL).read_text()).items()
    }
  except FileNotFoundError:
    return f'it has no {SEAL}'
  except (ValueError, TypeError, AttributeError) as error:
    return f'{SEAL} is damaged ({error})'
  for name, (size, crc) in sealed.items():
    path = folder / name
    if not path.is_file():
      return f'{name} is missing'
    if path.stat().st_size != size:
      return f'{name} has {path.stat().st_size} bytes and had {size}'
    if _crc(path) != crc:
      return f'{name} is not what was written (CRC-32)'
  return ''


def _crc(path: Path) -> int:
  found = 0
  with path.open('rb') as file:
    while block := file.read(1 << 20):
      found = zlib.crc32(block, found)
  return found
