"""Equal programs share their compiled functions."""

from tests.examples import make_batch, make_config, make_trainer
from tests.runs import mesh_of


def test_equal_programs_are_compiled_once():
  """A constant rate does not depend on config.steps; any other field gives another program."""

  def trainer(model='lmn', **fields):
    config = make_config(model)
    config.update_from_flattened_dict(fields)
    return make_trainer(config, mesh_of(1, 1))[1]

  assert trainer() is trainer() is trainer(steps=99, eval_every=7)
  cosine = {'optimizer.schedule': 'cosine'}
  assert trainer(**cosine) is trainer(**cosine)
  others = [
    trainer('din'), trainer(**cosine), trainer(**cosine, steps=99), trainer(skip_not_finite=1),
    trainer(**{'model.top_k': 2}), trainer(**{'loss.memory_weight': 0.5}),
    trainer(**{'optimizer.warmup_steps': 3}), make_trainer(make_config('lmn'), mesh_of(2, 1))[1],
    make_trainer(make_config('lmn'), mesh_of(1, 1), make_batch(B=8))[1],
  ]  # fmt: skip
  assert len({id(x) for x in [trainer(), *others]}) == 1 + len(others)
