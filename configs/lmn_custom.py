"""LMN on your own log: copy this file and edit the fields from top to bottom.

  ./launch.sh --config=configs/my_log.py --mode=prepare     # builds the store, prints counts
  ./launch.sh --config=configs/my_log.py

It reads `data/log.csv`, `data/users.csv` and `data/items.csv` such as

  log.csv     user,item,time,label,query        users.csv   user,age,city
              u1,i7,1700000000,1,red shoes                  u1,31,Paris
              u1,i9,1700000042,0,red shoes      items.csv   item,category,tags
                                                            i7,shoes,red|summer

One row is one impression: `user` was shown `item` at `time` and clicked it (1) or not (0). Rows may
be in any order. An invalid column, row or value is an error of one line, and nothing is written. A
history store is built once for each data section and contents of the files, and is reused; a
changed field or file builds another store beside it. All fields are in lmn_jax/config.py.

Cost: reading takes about a minute for 10 million rows; memory stays within `memory_limit`.
Result: if the model does not beat `item_user_mean` in the printed table, the log has no signal that
LMN can use.
"""

from lmn_jax.config import base, data


def get_config():
  config = base('lmn')

  config.data = data(
    # The name of the store. Use one name for each data set; experiments on it share the store.
    name='my_log',
    # A file, or a glob such as 'data/log-*.parquet'. The ending gives the format: .csv, .tsv,
    # .jsonl and .parquet (also .csv.gz, .bz2, .zst); `format` names it for other endings. Files of
    # a glob are read in natural order, day_2 before day_10.
    source='data/log.csv',
    format='',
    # For text files: delimiter=';', encoding='latin-1'; quote='"' if a file of tabs has quotes (a
    # CSV has them, quote='' switches them off); and if the first line does not name the columns,
    # header=False, fields=('user', 'item', 'time', 'label', 'query'). bad_lines='skip' skips lines
    # and values that cannot be read, counts them and names the first.
    #
    # -- columns ------------------------------------------------------------------------------
    # Ids may be any text or number: ' 8', '8' and '8.0' are the same id, also in features.
    # None, null, NaN, NA, \N and the like are missing values: rows without user or item are dropped
    # and counted. Set missing=('', 'null') if NA is an id.
    user='user',
    item='item',
    # Numbers (of any unit) or text such as 2024-05-31 23:59:01; time_format='%d.%m.%Y' for other
    # text; time='' if the rows are in order of time. The first log sets the unit and the form: rows
    # and new events in another unit are refused.
    time='time',
    # A second column that orders rows of the same user and time; '' takes the order of the rows.
    order='',
    # 0 or 1. For ratings, label_threshold=4.0 makes 4 and more a click. A log of clicks alone has
    # label='' and negatives=4: four items are drawn for each click, of those that the user had met
    # if they had met the clicked one before, else of those that they had not.
    label='label',
    # Several kinds of events in one log, such as view | cart | buy:
    #   behaviour='type', label='', positive_behaviours=('buy',), history_behaviours=('view', 'buy')
    #
    # One row per user: if the item column holds lists, those of JSON lines and Parquet or, with
    # format='sequences', texts with items_separator=',' and literals such as [11, 12], each event
    # becomes a row. Times and labels may be lists of the same length.
    #   format='sequences', item='items', time='times', label=''
    # One row per impression with its candidates and the history before it, as in MIND:
    #   candidates='impressions', row_history='history', time_format='%m/%d/%Y %I:%M:%S %p'
    #
    # -- histories ------------------------------------------------------------------------------
    # Events of a history: 'positive', the rows with label 1, or 'all' rows. The history of an
    # example has only events strictly before its time.
    history='positive',
    # Rows that are equal in every column are counted; 'drop' keeps one of each.
    duplicates='keep',
    # Ids that are rarer than this in training share the row of the unknown id, as do new ids.
    min_count=1,
    #
    # -- features -------------------------------------------------------------------------------
    # Further columns, as tokens: of the user, of the item (also in the history), and of the
    # impression. () for none.
    user_features=('age', 'city'),
    item_features=('category', 'tags'),
    context_features=('query',),
    # Files with the columns of users and items; '' if they are columns of the log.
    users_source='data/users.csv',
    items_source='data/items.csv',
    # Columns of the log that each event of a history has, such as its dwell time; () for none.
    event_features=(),
    # Columns with several tokens in a cell, and their separator.
    multi={'tags': '|'},
    # Columns of numbers, and how each enters: 'standard', 'log', 'bins:8' or 'autodis:16'.
    numeric={'age': 'bins:8'},
    #
    # -- split ----------------------------------------------------------------------------------
    # 'global_time': the newest tenth of all examples is the test, the tenth before it validates, as
    # for a model in production. 'user_ratio': the same for each user. 'leave_one_out': the last
    # click of each user. 'column': split_column='split' has train | valid | test, or each split has
    # a file: `source` for training, valid_source='data/valid.csv' and test_source.
    # At given times: split=dict(valid_from='2024-05-24', test_from='2024-05-31').
    # For a model to be served, valid=0.0 and test=0.0 train on everything, and the last checkpoint
    # is the best. Choose the settings on a run that holds out both.
    split=dict(protocol='global_time', valid=0.1, test=0.1),
    # Raise both for logs of hundreds of millions of rows.
    rows_per_part=2**24,
    memory_limit='2GB',
  )

  # -- model: the memory has slots_per_axis squared slots ----------------------------------------
  config.history_length = 50  # newest events that the model reads
  config.model.slots_per_axis = 256
  config.model.query_context = True  # the query column is part of the memory query; False without

  # -- training: about 5 passes over the log, or until validation stops improving ----------------
  config.batch_size = 512
  config.steps = 20_000
  config.eval_every = config.save_every = 1000
  config.patience = 3
  config.optimizer.embedding.rate = 0.05
  config.model.dropout = 0.1
  return config
