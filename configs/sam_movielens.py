"""SAM, or any other model, on MovieLens-1M: did the user rate this film next, or another one?

  ./launch.sh --config=configs/sam_movielens.py            # downloads it through TFDS; [tfds] extra
  ./launch.sh --config=configs/sam_movielens.py:din        # or any other model
  ./launch.sh --config=configs/sam_movielens.py --config.data.source=FOLDER/ratings.dat
                                                           # from ml-1m.zip of GroupLens
  ./launch.sh --config=configs/sam_movielens.py --config.data.source=FOLDER/sequences.tsv
                                                           # one line per user, films in time order

Every rating is a click, whatever its stars. Its negative is one film that the user had not rated by
then, drawn uniformly from the films of training, with the history of the click. A film with many
ratings is therefore more often the click, and the AUC of popularity is well above .5: compare a
model with it, the report prints both. Columns follow the source. Only ids are read, because a line
of films has nothing else; one line per user has no times, the order of the films is the time.

Protocol: the last 10 % of the ratings of each user are the test, the 10 % before them validate. The
history of an example is the ratings of the user strictly before it.

Cost: a minute or two on one CPU core for most models, about ten for MIMN. Result (test AUC, 3
seeds): popularity .782; DIEN .881 +- .002, MIMN .880 +- .003, SAM .880 +- .007, SASRec .863 +-
.014, the others below .835 (docs/explanation/results.md). The rates of the tables were chosen on
validation, see below.
"""

from lmn_jax.config import base, movielens_data

# Rate of Adagrad for the tables, also for the memory of LMN: the one with the best validation AUC
# of .05, .2 and .8, and one beyond if the last was best. For the slow DIEN, MIMN, SASRec and BST:
# of .2 and .8, after 700 steps (one seed; experiments/LOG.md).
RATES = dict(
  pooling=0.8, din=0.8, lmn=0.2, sam=0.8, dien=0.2, mimn=0.2, sasrec=0.2, bst=0.8, sim=0.2,
  ubr4ctr=0.05, eta=0.2, sdim=0.05, twin=0.8,
)  # fmt: skip


def get_config(model='sam'):
  config = base(model)
  config.data = movielens_data(
    'movielens_1m', negatives=1, split=dict(protocol='user_ratio', valid=0.1, test=0.1)
  )
  config.optimizer.embedding.rate = config.optimizer.memory.rate = RATES.get(model, 0.2)
  for name in ('embedding', 'memory'):  # the rates were chosen with it
    config.optimizer[name].initial_accumulator = 1e-7
  config.history_length = 100
  config.batch_size = 256
  config.steps = 2000  # a third of the training examples
  config.eval_every = 1000
  return config
