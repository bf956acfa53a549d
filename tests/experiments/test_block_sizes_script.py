"""The script that compares the sizes of blocks prints a line for each layer and size."""

import json

from lmn_jax.distributed import block_sizes
from tests.runs import load_experiment

script = load_experiment('block_sizes')


def test_a_line_for_each_layer_and_size(capsys):
  before = block_sizes.SIZES['cpu']
  script.main(['--small', '--only=loss,bag'])
  head, *lines = map(json.loads, capsys.readouterr().out.splitlines())
  assert head['device'] == 'cpu' and block_sizes.SIZES['cpu'] == before
  assert [line['layer'] for line in lines] == 4 * ['loss'] + 3 * ['bag']
  assert all(line['ms'] > 0 and line['compile_s'] > 0 for line in lines)
