"""The JSON of requests and answers: how it is checked and described in the OpenAPI document."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import ml_collections
from pydantic import (
  BaseModel,
  BeforeValidator,
  ConfigDict,
  Field,
  WithJsonSchema,
  WrapValidator,
  model_validator,
)

from lmn_jax.data import texts

LONGEST_ID = 512
LONGEST_VALUE = 4096
LONGEST_TIME = 64
MOST_FEATURES = 256
# Bounds of numbers. The document has bounds as floats; these are exact.
LEAST, BELOW = -(2**63), 2**64
NO_NUL = r'^[^\u0000]*$'


def text_of(value: Any) -> str:
  """Returns a raw value as text; in JSON it is a string, a number, true or false.

  Raises:
    ValueError: another type, or a text that some stores or clients cannot hold.
  """
  if not isinstance(value, str | int | float):
    raise ValueError('must be a string or a number')
  if not isinstance(value, str) and not LEAST <= value < BELOW:  # also refuses NaN
    raise ValueError('must be a number of 64 bits, or a string')
  text = texts.text_of(value)
  if not text.isascii():
    try:
      text.encode('utf-8')
    except UnicodeEncodeError:
      raise ValueError('must be valid Unicode, without lone surrogates') from None
  if '\0' in text:
    raise ValueError('must not contain a NUL character')
  if len(text) > LONGEST_VALUE:
    raise ValueError(f'must have at most {LONGEST_VALUE} characters')
  return text


def id_of(value: Any) -> str:
  """Returns a raw id in the form of the log (texts.py): ' 8', 8 and 8.0 are '8'.

  Raises:
    ValueError: as `text_of`, or an id that is empty or too long.
  """
  is_id = isinstance(value, str | int) and not isinstance(value, bool)
  if not is_id and not (isinstance(value, float) and value.is_integer()):
    raise ValueError('must be a string or an integer')
  text = texts.value(text_of(value), frozenset())
  if not 1 <= len(text) <= LONGEST_ID:
    raise ValueError(f'must have 1 to {LONGEST_ID} characters; it has {len(text)}')
  return text


def time_of(value: Any) -> int | float | str:
  """Returns a time, whose form the export checks.

  Raises:
    ValueError: another type, or a text that is too long.
  """
  if isinstance(value, bool) or not isinstance(value, int | float | str):
    raise ValueError('must be a number or a string')
  if isinstance(value, str) and len(value) > LONGEST_TIME:
    raise ValueError(f'must have at most {LONGEST_TIME} characters')
  return value


def by_of(value: Any) -> str | dict[str, Any]:
  """Returns the name of a label, or weights by name; which labels there are the export knows.

  Raises:
    ValueError: another type.
  """
  weights = value.values() if isinstance(value, dict) else ()
  numbers = [isinstance(x, int | float) and not isinstance(x, bool) for x in weights]
  if not isinstance(value, str) and not (numbers and all(numbers)):
    raise ValueError('must be the name of a label, or an object with numbers, weights of labels')
  return value


def _text_or(number, least, most):
  text = {'type': 'string', 'minLength': least, 'maxLength': most, 'pattern': NO_NUL}
  return [text, {'type': number, 'minimum': LEAST, 'exclusiveMaximum': BELOW}]


ID = {'anyOf': _text_or('integer', 1, LONGEST_ID)}
VALUE = {'anyOf': [*_text_or('number', 0, LONGEST_VALUE), {'type': 'boolean'}]}
Id = Annotated[str, BeforeValidator(id_of), WithJsonSchema(ID)]
Value = Annotated[str, BeforeValidator(text_of), WithJsonSchema(VALUE)]
# The export knows the features; `Bundle.ask` refuses unknown ones.
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]
Features = Annotated[dict[Name, Value], Field(max_length=MOST_FEATURES)]
WEIGHTS = {'type': 'object', 'additionalProperties': {'type': 'number'}, 'minProperties': 1}
By = Annotated[
  Any, BeforeValidator(by_of), WithJsonSchema({'anyOf': [{'type': 'string'}, WEIGHTS]})
]
# The export knows the form of times; the document describes it once an export is open.
Time = Annotated[
  int | float | Annotated[str, Field(max_length=LONGEST_TIME)], BeforeValidator(time_of)
]


class Strict(BaseModel):
  """A model without unknown fields and without conversion of types."""

  model_config = ConfigDict(extra='forbid', strict=True)


TIME = 'as in the log'


class HistoryEvent(Strict):
  """An event of a history, with its event features under the names of the log."""

  model_config = ConfigDict(extra='allow', strict=True)
  __pydantic_extra__: dict[str, Value] = Field(init=False)

  item: Id
  time: Time | None = Field(None, description=TIME)

  @model_validator(mode='after')
  def _few_features(self):
    if len(self.features()) > MOST_FEATURES:
      raise ValueError(f'has {len(self.features())} features; at most {MOST_FEATURES} are taken')
    return self

  def features(self) -> dict[str, str]:
    """Returns the event features by name."""
    return self.__pydantic_extra__

  def given(self) -> dict[str, Any]:
    """Returns the event as `Bundle.ask` takes it."""
    return {'item': self.item, 'time': self.time} | self.features()


class Event(HistoryEvent):
  """A new event: a click, a purchase, or whatever the log records."""

  id: Id | None = Field(
    None, description="of the event; a repeat if one of the user's newest events has this id"
  )


class _IdOr:
  """Describes an id, or an object, in the OpenAPI document."""

  def __get_pydantic_json_schema__(self, schema, handler):
    return {'anyOf': [*ID['anyOf'], handler(schema)]}


def _id_or_event(value: Any, handler: Callable[[Any], Any]) -> Any:
  """Returns the event of an object, and the id of any other value."""
  return handler(value) if isinstance(value, dict) else id_of(value)


IdOrEvent = Annotated[HistoryEvent, WrapValidator(_id_or_event), _IdOr()]


class Requests(NamedTuple):
  """Models of the requests, with the limits of the settings."""

  score: type[BaseModel]
  recommend: type[BaseModel]
  update: type[BaseModel]


def requests(settings: ml_collections.ConfigDict) -> Requests:
  """Builds the models. settings: see serving/settings.py."""

  def ids(least, most, kind=Id):
    return Annotated[list[kind], Field(min_length=least, max_length=most)]

  History = ids(0, settings.max_history, IdOrEvent)

  class ModelRequest(Strict):
    user: Id
    history: History | None = Field(
      None, description='newest event last; default: the events known of the user'
    )
    time: Time | None = Field(
      None,
      description=f'of the request, {TIME}; default: the newest known time, of the events in '
      '`history` if they have one; only models that read times use it',
    )
    context: Features = {}
    profile: Features = Field({}, description="default: the user's profile in the export")

  class ScoreRequest(ModelRequest):
    candidates: ids(1, settings.max_candidates)

  class RecommendRequest(ModelRequest):
    k: Annotated[int, Field(ge=1, le=settings.max_k)]
    exclude: ids(0, settings.max_history) = []
    exclude_seen: bool | None = Field(
      None,
      description='whether to leave out items that the user has met: in the log, in stored events '
      "or in `history`; default: config.exclude_seen of the model's run",
    )
    by: By | None = Field(
      None,
      description='of a model with several labels: the name of the label whose score orders the '
      'items, or weights of labels, {"click": 1, "order": 5}, for the weighted sum of their '
      'probabilities (of numbers: predictions); default: the main label',
    )

  class UpdateRequest(Strict):
    user: Id
    events: Annotated[list[Event], Field(min_length=1, max_length=settings.max_events)] = Field(
      description='either all with times, in any order, or all without, newest last'
    )

  return Requests(ScoreRequest, RecommendRequest, UpdateRequest)


class Answer(BaseModel):
  """Fields of every answer."""

  user_known: bool = Field(description='whether the user is in the export or the store of users')
  model: str
  export: str = Field(description='fingerprint of the weights and the vocabulary')


class ModelAnswer(Answer):
  """Fields of every answer of the model."""

  events: int = Field(description='number of events of the history that the model has read')
  unknown_features: list[str] = Field(
    description='features of the request with a value that training did not see; those of events '
    'with their key, such as event.kind'
  )
  missing: list[str] | None = Field(
    None,
    description='keys of fields without a value, such as event.price or time, which count as '
    'unknown; left out if there are none',
  )
  degraded: bool = Field(description='whether shards of a large table were missing')


class LabelScores(BaseModel):
  """Scores of a label in the order of the candidates."""

  scores: list[float | None] = Field(
    description='log-odds of a click, the predicted number, or of next-item models a product; null '
    'for an item that the model cannot score'
  )
  probabilities: list[float | None] | None = Field(
    None, description='of a click; left out if the scores are not log-odds'
  )


class ScoreAnswer(ModelAnswer, LabelScores):
  """Scores in the order of the candidates; higher is likelier, or of numbers larger."""

  labels: dict[str, LabelScores] | None = Field(
    None,
    description='of each label by its name, if the model has several; the scores beside it are '
    'those of the main label',
  )
  unknown_candidates: list[str] = Field(
    description='candidates that training did not see, without those in cold_candidates'
  )
  cold_candidates: list[str] | None = Field(
    None,
    description='candidates that training did not see, scored by their features and vectors; left '
    'out if there are none',
  )


class Item(BaseModel):
  """An item and its score: of the main label, or what `by` of the request orders by."""

  item: str
  score: float | None


class RecommendAnswer(ModelAnswer):
  """The best items, best first; fewer than k if there are fewer candidates."""

  items: list[Item]


class UpdateAnswer(Answer):
  """What was done with new events."""

  events_taken: int = Field(description='events stored')
  events_repeated: int = Field(
    description='events skipped, since a stored event has the same id or, for events without an '
    'id, the same item and time'
  )
  events_late: int = Field(
    description='stored events that the model reads after newer ones, which it had read before'
  )
  time_form: str = Field(
    description='form of the times of the log: number, text, format (config.data.time_format), '
    'either (number or text) or position (the log has no times)'
  )
  time_unit: str = Field(description="unit of times that are numbers; '' if it is not known")


class Health(BaseModel):
  """The process is running."""

  status: str


class Readiness(Health):
  """The export in use. status: ready, or degraded while shards of a large table are lost."""

  model: str
  export: str
  lost: list[str]


class Problem(BaseModel):
  """An error, in one line."""

  error: str
