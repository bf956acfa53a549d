"""SAM, or any other model, on the long histories of LongCTR: KuaiVideo, MicroVideo, EB-NeRD.

  ./launch.sh --config=configs/sam_longctr.py --config.data.source=FOLDER/KuaiVideo_x2
  ./launch.sh --config=configs/sam_longctr.py:din --config.data.source=FOLDER/MicroVideo1.7M_x2
  ./launch.sh --config=configs/sam_longctr.py:sam+image --config.data.source=FOLDER/KuaiVideo_x2
  ./launch.sh --config=configs/sam_longctr.py --config.data.source=FOLDER/Ebnerd_small_x1 \\
      --config.history_length=200

The sets are published on Hugging Face by reczoo. A folder holds train.parquet, valid.parquet,
test.parquet, user_info.parquet and item_info.parquet (lmn_jax/data/readers/longctr.py); the store
has the name of the folder. The split is that of the set. This config reads ids alone, which all
three sets have in the same columns; a name in `user_features`, `item_features` or
`context_features` is a column of user_info, item_info or the impressions, such as

  --config.data.item_features="('cate_id',)"

and an error for an unknown name lists the columns. A column of lists of tokens needs its separator
in `multi` as well, in a copy of this file.

`+image` after the model reads the 64 numbers of each item's cover, too, which LongCTR's tables have
and EB-NeRD does not: the column `image_emb_dim64` of item_info.parquet.

Cost and result: not measured; no setting was chosen on validation.
"""

from pathlib import Path

from lmn_jax.config import base, data, derived
from lmn_jax.errors import one_of

IMAGES = {'image': 'image_emb_dim64'}  # name -> column of item_info.parquet


def get_config(model='sam'):
  model, plus, vectors = model.partition('+')
  if plus:
    one_of('--config=sam_longctr:MODEL+VECTORS', vectors, IMAGES)
  config = base(model)
  config.data = data(source='data/KuaiVideo_x2', format='longctr', split=dict(protocol='column'))
  config.data.item_vectors = {vectors: IMAGES[vectors]} if vectors else {}
  config.data.name = derived(config.data, 'source', lambda source: Path(source).name, str)
  config.history_length = 1000
  config.buckets = (50, 200, 500, 1000)
  return config
