"""KuaiRand-Pure with all its features: two labels, clicks and long views of short videos.

  ./launch.sh --config=configs/kuairand.py --config.data.source=FOLDER/log_standard.csv
  ./launch.sh --config=configs/kuairand.py:sam --config.data.source=...  # or any click model
  ./launch.sh --config=configs/kuairand.py --config.data.source=... --config.data.format=tsv

Users get KuaiRand from its site (Gao et al., CIKM 2022). The history of an impression is the user's
earlier impressions, clicked or not; each event has its time, how long the video played and what the
user did. The play time of a video is known before the next impression, except for videos of one
request, which share their time and so are not in each other's history. Duration is a number of the
video, the hour a feature of the impression.

Cost and result: not measured; no setting was chosen on validation. `experiments/rich_events.py`
compares this config with ids alone.
"""

from lmn_jax.config import base, data


def get_config(model='din'):
  config = base(model)
  config.data = data(
    name='kuairand',
    source='data/kuairand.csv',
    user='user_id',
    item='video_id',
    time='time_ms',
    labels=('is_click', 'long_view'),
    history='all',
    event_features=(
      'play_time_ms', 'long_view', 'is_follow', 'is_comment', 'is_profile_enter', 'is_click',
    ),
    item_features=('duration_ms',),
    context_features=('hourmin',),
    numeric=dict(play_time_ms='log', duration_ms='log'),
    split=dict(protocol='global_time'),
  )  # fmt: skip
  config.model.time = 'buckets'
  config.model.dropout = 0.2
  for group in ('embedding', 'memory'):
    config.optimizer[group].initial_accumulator = 1e-7
  config.history_length = 100
  config.batch_size = 256
  # The log is small: a model is best after one or two epochs.
  config.steps = 800
  config.eval_every = config.log_every = config.save_every = 50
  config.patience = 3
  return config
