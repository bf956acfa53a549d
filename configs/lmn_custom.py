"""LMN on a log of your own: copy this file, go through the fields from top to bottom.

  ./launch.sh --config=configs/my_log.py --mode=prepare     # reads the log, counts, makes the store
  ./launch.sh --config=configs/my_log.py

As it stands it reads `data/log.csv`, `data/users.csv` and `data/items.csv` such as

  log.csv     user,item,time,label,query        users.csv   user,age,city
              u1,i7,1700000000,1,red shoes                  u1,31,Paris
              u1,i9,1700000042,0,red shoes      items.csv   item,category,tags
                                                            i7,shoes,red|summer

One row is one impression: `user` was shown `item` at `time` and clicked it (1) or not (0). Rows may
be in any order. A column, row or value that does not fit is named in one line, and nothing is
written. The work that a change of the data section costs is done once: another store is made when a
field or a file changed, beside the ones that are there, and reused otherwise. Every field is listed
in lmn_jax/config.py.

Cost: reading takes about a minute for 10 million rows; memory stays within `memory_limit`.
Result: beat `item_user_mean` in the printed table, or the log says nothing that LMN could use.
"""

from lmn_jax.config import base, data


def get_config():
  config = base('lmn')

  config.data = data(
    # The store's name. Two data sets need two names; experiments on one share it.
    name='my_log',
    # A file, or a pattern such as 'data/log-*.parquet'; .csv, .tsv, .jsonl and .parquet (also
    # .csv.gz, .bz2, .zst) are known by their ending, anything else by `format`. Files of a
    # pattern are read in natural order, day_2 before day_10.
    source='data/log.csv',
    format='',
    # For text files: delimiter=';', encoding='latin-1'; quote='"' where a file of tabs has quotes
    # (a CSV has them, quote='' switches them off); and where no first line names the columns,
    # header=False, fields=('user', 'item', 'time', 'label', 'query'). bad_lines='skip' leaves out
    # lines and values that cannot be read, counts them and says where the first is.
    #
    # -- columns ------------------------------------------------------------------------------
    # The name of the column that has each role. Ids may be any text or number: ' 8', '8' and '8.0'
    # are one, of values of features too. None, null, NaN, NA, \N and the like are no id: rows
    # without one are dropped and counted; missing=('', 'null') where NA is an id.
    user='user',
    item='item',
    # Numbers (of any unit) or text such as 2024-05-31 23:59:01; time_format='%d.%m.%Y' for other
    # text; time='' if the rows are already in order of time. The unit and the form are those of
    # the first log: new events in another unit, or a row in another, are refused.
    time='time',
    # A second column that orders rows of one user and time; '' takes the order of the rows.
    order='',
    # 0 or 1. Of ratings, label_threshold=4.0 makes 4 and more a click. A log of clicks alone has
    # label='' and negatives=4: four items are drawn for each click, of those that the user had as
    # often as the clicked one: never, or before.
    label='label',
    # Kinds of events in one log, such as view | cart | buy: name the column and what is what.
    #   behaviour='type', label='', positive_behaviours=('buy',), history_behaviours=('view', 'buy')
    #
    # A row a user: where the item's column holds lists, those of JSON lines and Parquet or, with
    # format='sequences', texts parted by items_separator=',' and literals such as [11, 12], an
    # event becomes a row; times and labels may be lists too, as long as that of the items.
    #   format='sequences', item='items', time='times', label=''
    # A row an impression with its candidates and the history up to then, as MIND has them:
    #   candidates='impressions', row_history='history', time_format='%m/%d/%Y %I:%M:%S %p'
    #
    # -- histories ------------------------------------------------------------------------------
    # What a user's history is made of: 'positive', the rows with label 1, or 'all' rows. A label
    # never sees its own row nor any at or after its time.
    history='positive',
    # Rows that are alike in every column are counted; 'drop' keeps one of each.
    duplicates='keep',
    # Ids seen less often in training share one row, "unknown", as do ids that training never saw.
    min_count=1,
    #
    # -- features -------------------------------------------------------------------------------
    # Further columns, as tokens: of the user, of the item (they also describe the history), and of
    # the impression. Leave a tuple empty, `()`, if there are none.
    user_features=('age', 'city'),
    item_features=('category', 'tags'),
    context_features=('query',),
    # Where users' and items' columns lie; '' if they are columns of the log.
    users_source='data/users.csv',
    items_source='data/items.csv',
    # Several tokens in one cell, and what separates them; numbers, and into how many bins.
    multi={'tags': '|'},
    bins={'age': 8},
    #
    # -- split ----------------------------------------------------------------------------------
    # 'global_time': the last tenth of all examples tests, the tenth before validates: what a model
    # in production meets. 'user_ratio': the same within each user. 'leave_one_out': each user's
    # last click. 'column': the log says it, split_column='split' with train | valid | test, or it
    # comes in files: `source` trains, valid_source='data/valid.csv' and test_source do the rest.
    # At given times: split=dict(valid_from='2024-05-24', test_from='2024-05-31').
    # For a model to be served, valid=0.0 and test=0.0 train on everything: the last checkpoint is
    # then the best. Choose the settings on a run that holds out both.
    split=dict(protocol='global_time', valid=0.1, test=0.1),
    # Raise both for logs of hundreds of millions of rows.
    rows_per_part=2**24,
    memory_limit='2GB',
  )

  # -- model: the dial is slots_per_axis, the memory has its square of slots ---------------------
  config.history_length = 50  # newest events that the model is given
  config.model.slots_per_axis = 256
  config.model.query_context = True  # the query column helps to ask the memory; False without one

  # -- training: as many steps as take it about 5 times over the log, or until it stops improving --
  config.batch_size = 512
  config.steps = 20_000
  config.eval_every = config.save_every = 1000
  config.patience = 3
  config.optimizer.embedding.rate = 0.05
  config.model.dropout = 0.1
  return config
