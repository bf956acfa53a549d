"""The next product in the Amazon Beauty reviews of 2014: short histories, many items.

  ./launch.sh --config=configs/next_beauty.py --config.data.source=FOLDER/Beauty_item_org_rank.txt
  ./launch.sh --config=configs/next_beauty.py:dman --config.data.source=...    # or any other model

The source is the set in which every user and product has at least five reviews. It has one line per
user, with the user and then the products in the order of time, separated by spaces; 22,363 users,
12,101 products and 198,502 reviews. Protocol: the last product of each user is the test, the one
before it validates, all products are ranked except those that the user has met. If the file is not
in the order of time, a second one, aligned with it, has the times:
--config.data.times_source=FOLDER/Beauty_time_org_rank.txt

A model took one CPU core 13 to 22 minutes, beside other work. Test, 2 seeds, HR@10 and NDCG@10:
SASRec .082, .046, DMAN .073, .040; Markov .054, .032 (experiments/LOG.md, 2026-11-26; SASRec then
applied dropout twice to its rows, and was not trained again). The rate was chosen on validation,
for SASRec.
"""

from lmn_jax.config import data, next_item

LONG = ('sasrec', 'hstu', 'caser', 'gru4rec')  # the others read segments of 20 events


def get_config(model='sasrec'):
  log = data(
    name='beauty_next',
    format='sequences',
    header=False,
    items_separator=' ',
    label='',
    split=dict(protocol='leave_one_out'),
  )
  config = next_item(model, log)
  config.history_length = 50 if model in LONG else 20
  config.batch_size = 32 if model in LONG else 128
  config.model.dropout = 0.5
  config.steps = 2000
  config.eval_every = 250
  return config
