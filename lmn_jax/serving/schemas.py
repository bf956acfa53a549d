"""The JSON of requests and answers: what is taken, and what the OpenAPI document says of it."""

from typing import Annotated, Any, NamedTuple

import ml_collections
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from lmn_jax.data import texts

LONGEST_ID = 512
LONGEST_VALUE = 4096
MOST_FEATURES = 256
# Of a number, as logs have them. The document has bounds as floats: these are exact.
LEAST, BELOW = -(2**63), 2**64
NO_NUL = r'^[^\u0000]*$'


def text_of(value: Any) -> str:
  """A raw value as text: JSON gives it as a text, a number, true or false.

  Raises:
    ValueError: something else, or a text that cannot be stored and sent everywhere.
  """
  if not isinstance(value, str | int | float):
    raise ValueError('must be a text or a number')
  if not isinstance(value, str) and not LEAST <= value < BELOW:  # NaN is not
    raise ValueError('must be a number of 64 bits, or a text')
  text = texts.text_of(value)
  if not text.isascii():
    try:
      text.encode('utf-8')
    except UnicodeEncodeError:
      raise ValueError('must be valid Unicode, without lone surrogates') from None
  if '\0' in text:
    raise ValueError('must not have a NUL character')
  if len(text) > LONGEST_VALUE:
    raise ValueError(f'must have at most {LONGEST_VALUE} characters')
  return text


def id_of(value: Any) -> str:
  """A raw id as the log has it (texts.py): ' 8', 8 and 8.0 are '8'.

  Raises:
    ValueError: besides those of `text_of`, an empty or too long one.
  """
  whole = isinstance(value, str | int) and not isinstance(value, bool)
  if not whole and not (isinstance(value, float) and value.is_integer()):
    raise ValueError('must be a text or a whole number')
  text = texts.value(text_of(value), frozenset())
  if not 1 <= len(text) <= LONGEST_ID:
    raise ValueError(f'must have 1 to {LONGEST_ID} characters, and has {len(text)}')
  return text


def _text_or(number, least, most):
  text = {'type': 'string', 'minLength': least, 'maxLength': most, 'pattern': NO_NUL}
  return [text, {'type': number, 'minimum': LEAST, 'exclusiveMaximum': BELOW}]


ID = {'anyOf': _text_or('integer', 1, LONGEST_ID)}
VALUE = {'anyOf': [*_text_or('number', 0, LONGEST_VALUE), {'type': 'boolean'}]}
Id = Annotated[str, BeforeValidator(id_of), WithJsonSchema(ID)]
Value = Annotated[str, BeforeValidator(text_of), WithJsonSchema(VALUE)]
# Which features there are the export says; an unknown one is refused when it is asked.
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]
Features = Annotated[dict[Name, Value], Field(max_length=MOST_FEATURES)]
# Whether it is one of the log's says the export, and so in the document, once it is open.
Time = int | float | Annotated[str, Field(max_length=64)]


class Strict(BaseModel):
  """No field that is not known, no type that is not meant."""

  model_config = ConfigDict(extra='forbid', strict=True)


class Event(Strict):
  """A click, purchase or whatever the histories of the log are made of."""

  item: Id
  time: Time | None = Field(None, description='as in the log')
  id: Id | None = Field(
    None, description="of the event; one of an event that the user's newest have is a repeat"
  )


class Requests(NamedTuple):
  """Models of what is asked, with the limits of the settings."""

  score: type[BaseModel]
  recommend: type[BaseModel]
  update: type[BaseModel]


def requests(settings: ml_collections.ConfigDict) -> Requests:
  """Builds them. settings: see serving/settings.py."""

  def ids(least, most):
    return Annotated[list[Id], Field(min_length=least, max_length=most)]

  History = ids(0, settings.max_history)

  class Asked(Strict):
    user: Id
    history: History | None = Field(None, description='newest last; left out: what is known')
    context: Features = {}
    profile: Features = Field({}, description='left out: what the export knows of the user')

  class ScoreRequest(Asked):
    candidates: ids(1, settings.max_candidates)

  class RecommendRequest(Asked):
    k: Annotated[int, Field(ge=1, le=settings.max_k)]
    exclude: History = []
    exclude_seen: bool | None = Field(
      None,
      description='whether what the user has met is left out: items of the log, of events taken in '
      "and of the history given; left out: as the model's config says",
    )

  class UpdateRequest(Strict):
    user: Id
    events: Annotated[list[Event], Field(min_length=1, max_length=settings.max_events)] = Field(
      description='all with times, in any order, or none, newest last'
    )

  return Requests(ScoreRequest, RecommendRequest, UpdateRequest)


class Answer(BaseModel):
  """What every answer says of itself."""

  user_known: bool = Field(description='whether the export or the store of users has the user')
  model: str
  export: str = Field(description='fingerprint of the weights and the vocabulary')


class ModelAnswer(Answer):
  """What an answer of the model says besides."""

  events: int = Field(description='how many of the history the model knows')
  unknown_features: list[str] = Field(description='given with a value that training did not see')
  degraded: bool = Field(description='whether a part of a large table was out of reach')


class ScoreAnswer(ModelAnswer):
  """Scores in the order of the candidates; higher is likelier."""

  scores: list[float | None] = Field(description='null: the model has no score of an unknown item')
  probabilities: list[float | None] | None = Field(None, description='of a click')
  unknown_candidates: list[str] = Field(description='which training did not see')


class Item(BaseModel):
  """An item and its score."""

  item: str
  score: float | None


class RecommendAnswer(ModelAnswer):
  """The best items, best first; fewer than k where there are fewer."""

  items: list[Item]


class UpdateAnswer(Answer):
  """What became of new events."""

  events_taken: int
  events_repeated: int = Field(
    description='which were held: of the same id or, without an id, of the same item and time'
  )
  events_late: int = Field(
    description='of those taken: how many the model reads after newer events, read before'
  )
  time_form: str = Field(
    description='of the times of the log: number, text, format (config.data.time_format), either '
    '(number or text) or position (the log has none)'
  )
  time_unit: str = Field(description="of times that are numbers; '' where the log does not tell")


class Health(BaseModel):
  """The process lives."""

  status: str


class Readiness(Health):
  """What it answers from. status: ready, or degraded while shards of a large table are lost."""

  model: str
  export: str
  lost: list[str]


class Problem(BaseModel):
  """A refusal, in a line."""

  error: str
