"""SAM on MovieLens-100K: will this user give this film 4 stars or more?

  ./launch.sh --config=configs/sam_movielens.py            # downloads it through TFDS; [tfds] extra

The experiment of lmn_movielens.py, with its data, protocol and rates; only the model differs.

Cost and result: not measured yet; nothing was chosen on validation.
"""

import runpy
from pathlib import Path


def get_config():
  beside = Path(__file__).with_name('lmn_movielens.py')
  return runpy.run_path(str(beside))['get_config']('sam')
