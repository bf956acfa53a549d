"""Ratings of two users, in two splits, with text, number, nested and list features."""

import numpy as np
import tensorflow_datasets as tfds

RATINGS = {
  'train': [('u0', 10, 5.0, 100), ('u1', 10, 2.0, 101), ('u0', 11, 4.0, 102), ('u1', 12, 4.5, 103)],
  'test': [('u0', 12, 1.0, 104), ('u1', 11, 5.0, 105)],
}


class TinyLog(tfds.core.GeneratorBasedBuilder):
  """The builder; registered under `tiny_log` when this file is imported."""

  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='ratings')]

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {
          'user_id': tfds.features.Text(),
          'movie': {'id': np.int64, 'genres': tfds.features.Sequence(np.int32)},
          'user_rating': np.float32,
          'timestamp': np.int64,
        }
      )
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in RATINGS}

  def _generate_examples(self, split):
    for key, (user, movie, rating, time) in enumerate(RATINGS[split]):
      yield (
        key,
        {
          'user_id': user,
          'movie': {'id': movie, 'genres': list(range(movie - 9))},
          'user_rating': rating,
          'timestamp': time,
        },
      )
