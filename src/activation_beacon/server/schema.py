"""Requests as they come in, checked; fields of OpenAI's API that cannot be served are refused by name."""

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from activation_beacon.errors import UnsupportedError
from activation_beacon.server.sampling import Sampling

# What changes nothing here: whose request it is, and how others' servers bill, keep and route it.
IGNORED = frozenset(
    {
        "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options", "stream_options", "max_tool_calls",
    }
)  # fmt: skip
# Values that ask for what is done anyway.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "parallel_tool_calls": (None, False, True),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "background": (None, False),
    "conversation": (None,),
    "prompt": (None,),
    "truncation": (None, "disabled"),
}


LOGPROBS = "message.output_text.logprobs"  # what of an answer may be asked for besides its text


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
RatioField = Annotated[
    int | tuple[int, ...] | Literal["auto"] | None,
    Field(description="Raw tokens per beacon; by default the server's ratio."),
]
ContextId = Annotated[Text | None, Field(description="Id of the context that the request is about.")]


class TextPart(BaseModel):
    """Part of a message."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn. What an answer of this API has beside its text may be sent back, as long as it says nothing."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_is_text(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        role, content = values.get("role"), values.get("content")
        if role in ("tool", "function"):
            raise ValueError(f"messages of the role {role!r} are not supported, since tools are not. Leave them out")
        for name, value in values.items():
            if name not in ("role", "content", "name") and value not in (None, [], {}, ""):
                raise ValueError(f"{name[:100]} is not supported in a message. Leave it out")
        if content is None:
            raise ValueError("content is missing. Send a text")
        kinds = [part.get("type") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        if any(kind != "text" for kind in kinds):
            kind = next(kind for kind in kinds if kind != "text")
            raise ValueError(f"parts of the type {str(kind)[:100]!r} are not supported. Send parts of the type 'text'")
        return values

    @property
    def text(self) -> str:
        """The whole of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def template_role(self) -> str:
        """What chat templates call the role."""
        return "system" if self.role == "developer" else self.role


def _as_message(item: Any) -> Any:
    """An item of the Responses API as a message of the chat API: its parts are called otherwise, and it may have an id."""
    if not isinstance(item, dict):
        return item
    kind = item.get("type") or "message"
    if kind != "message":
        raise ValueError(f"items of the type {str(kind)[:100]!r} are not supported. Send messages")
    content = item.get("content")
    if isinstance(content, list):
        content = [{**part, "type": "text"} if _is_text(part) else part for part in content]
    named = {name: value for name, value in item.items() if name not in ("type", "id", "status", "phase")}
    return {**named, "content": content}


def _as_items(said: Any) -> Any:
    """A text as the one message that it stands for."""
    if not isinstance(said, str | list):
        raise ValueError("send a text, or a list of messages")
    return [{"role": "user", "content": said}] if isinstance(said, str) else said


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("input_text", "output_text")


Item = Annotated[Message, BeforeValidator(_as_message)]


class StreamOptions(BaseModel):
    """What a stream brings besides pieces of text."""

    include_usage: bool = False
    include_obfuscation: bool = False


ANY_OBJECT = {"type": "object"}  # the schema of OpenAI's "json_object"


class Named(BaseModel):
    """What a schema is called. It is always kept to, `strict` or not."""

    model_config = ConfigDict(extra="forbid")

    name: Text | None = None
    description: Text | None = None
    strict: bool | None = None


class JsonSchema(Named):
    """A schema and what it is called."""

    definition: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """What an answer of the chat API is to be."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with the type "json_schema", and only with it')
        return self

    @property
    def definition(self) -> dict[str, Any] | None:
        """The schema of the answer; None for any text."""
        if self.json_schema is not None:
            return self.json_schema.definition
        return ANY_OBJECT if self.type == "json_object" else None


class AnswerRequest(BaseModel):
    """What all requests for answers share."""

    model_config = ConfigDict(extra="allow")

    model: Text
    stream: bool | None = False
    stop: Text | list[Text] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=1)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = None
    context: ContextId = None
    ratio: RatioField = None

    @model_validator(mode="after")
    def _check_stops(self) -> Self:
        if len(self.stops) > 16 or any(not stop or len(stop) > 1000 for stop in self.stops):
            raise ValueError("stop takes up to 16 texts of 1 to 1000 characters")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def num_answers(self) -> int:
        """Answers to each prompt."""
        return 1

    @property
    def limit_name(self) -> str:
        """What `limit` is called in the request."""
        return "max_tokens"

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most, if the request says."""
        raise NotImplementedError

    @property
    def num_likeliest(self) -> int | None:
        """Likeliest tokens to report; None for no probabilities."""
        raise NotImplementedError

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None for any text."""
        return None

    def check_can_be_served(self) -> None:
        """Refuse fields that would change the answer and are not known here.

        Raises:
            UnsupportedError: naming the field.
        """
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or value in HARMLESS.get(name, ()):
                continue
            known = "is not supported" if name in HARMLESS else "is not a field of this request"
            raise UnsupportedError(f"{name[:100]} {known}. Leave it out.")

    def _usual_temperature(self, defaults: Any) -> float:
        """As `generate` does: the likeliest token, unless the model's generation config draws; several answers are to differ."""
        draws = defaults.do_sample or self.num_answers > 1
        return _first(defaults.temperature, 1.0) if draws else 0.0

    def sampling(self, model: Any, max_tokens: int) -> Sampling:
        """How answers are to be written; temperature and top_p as the model's generation config has them unless they are asked for."""
        defaults = model.generation_config
        size = model.get_input_embeddings().weight.shape[0]
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        if any(token >= size for token in bias):
            raise UnsupportedError(f"logit_bias names tokens that the model does not have; it has 0..{size - 1}.")
        return Sampling(
            max_tokens=self.limit or max_tokens,
            temperature=_first(self.temperature, self._usual_temperature(defaults)),
            top_p=_first(self.top_p, defaults.top_p, 1.0),
            top_k=self.top_k,
            seed=self.seed,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=bias,
            stop=self.stops,
            num_likeliest=self.num_likeliest,
        )


class _Request(AnswerRequest):
    """What requests of the older two kinds share."""

    n: int | None = Field(1, ge=1, le=16)
    max_tokens: int | None = Field(None, ge=1)
    stream_options: StreamOptions | None = None

    @property
    def num_answers(self) -> int:
        """As many as asked for."""
        return self.n or 1

    @property
    def limit(self) -> int | None:
        """If the request says."""
        return self.max_tokens


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """As `response_format` has it."""
        return None if self.response_format is None else self.response_format.definition

    @property
    def prompts(self) -> list[list[Message]]:
        """The one conversation."""
        return [self.messages]

    @property
    def limit(self) -> int | None:
        """OpenAI's newer name counts first."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_name(self) -> str:
        """As above."""
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    @property
    def num_likeliest(self) -> int | None:
        """None unless `logprobs` is set."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1)]
    )
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def num_likeliest(self) -> int | None:
        """As many as asked for."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)


class TextFormat(Named):
    """What an answer of the Responses API is to be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    definition: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.definition is not None):
            raise ValueError('schema goes with the type "json_schema", and only with it')
        return self


class TextOptions(BaseModel):
    """How an answer is to be written."""

    model_config = ConfigDict(extra="forbid")

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(BaseModel):
    """How much is to be thought before an answer: nothing is."""

    model_config = ConfigDict(extra="forbid")

    effort: Literal["none"] | None = None
    summary: None = None
    generate_summary: None = None


class ResponseRequest(AnswerRequest):
    """`POST /v1/responses`."""

    input: Annotated[list[Item], BeforeValidator(_as_items), Field(min_length=1)]
    instructions: Text | None = None
    previous_response_id: Text | None = Field(None, description="Of the response that this one goes on from.")
    max_output_tokens: int | None = Field(None, ge=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[Text] | None = None
    store: bool | None = True
    metadata: dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    user: Text | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None

    @property
    def limit(self) -> int | None:
        """If the request says."""
        return self.max_output_tokens

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """As `text.format` has it."""
        wanted = None if self.text is None else self.text.format
        return None if wanted is None else ANY_OBJECT if wanted.type == "json_object" else wanted.definition

    @property
    def limit_name(self) -> str:
        """As OpenAI calls it here."""
        return "max_output_tokens"

    @property
    def num_likeliest(self) -> int | None:
        """None unless `include` names them."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None


class ContextRequest(BaseModel):
    """`POST /v1/contexts`: a text to be compressed."""

    model_config = ConfigDict(extra="forbid")

    text: Text
    name: Text = Field("", max_length=200)
    ratio: RatioField = None
    system: Text | None = Field(None, description="A system message that stands before the text.")
    plain: bool = Field(False, description="Take the text as it is, not as the opening of a user's message.")
    quantize: Literal[8, 4] | None = Field(None, description="Keep the beacons in so many bits.")
    stream: bool = Field(False, description="Answer with server-sent events: progress, then the context.")


class AppendRequest(BaseModel):
    """`POST /v1/contexts/{id}/append`: more text."""

    model_config = ConfigDict(extra="forbid")

    text: Text
    ratio: RatioField = None
    stream: bool = False


class ForkRequest(BaseModel):
    """`POST /v1/contexts/{id}/fork`: a copy that goes on by itself."""

    model_config = ConfigDict(extra="forbid")

    name: Text = Field("", max_length=200)


# Names that an error may be about; what else stands in pydantic's places is the kind of a value that it has tried.
FIELDS = frozenset(
    name
    for model in (
        TextPart,
        Message,
        StreamOptions,
        JsonSchema,
        ResponseFormat,
        ChatRequest,
        CompletionRequest,
        ResponseRequest,
        TextOptions,
        TextFormat,
        ReasoningOptions,
        ContextRequest,
        AppendRequest,
        ForkRequest,
    )
    for name in [field.alias or name for name, field in model.model_fields.items()]
)


def told(errors: Sequence[Any]) -> tuple[str, str | None]:
    """What is wrong with a request, in one line, and the field that it is about.

    Args:
        errors: pydantic's or FastAPI's, the place of each within the body.
    """
    first = errors[0]
    place = first["loc"][1:] if first["loc"][:1] == ("body",) else first["loc"]
    if first["type"] == "json_invalid":
        return f"The body is not JSON: {first.get('ctx', {}).get('error', 'it cannot be parsed')}.", None
    if not place and first["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return "The body must be a JSON object. Send it with Content-Type: application/json.", None
    names = list(itertools.takewhile(lambda part: isinstance(part, int) or part in FIELDS, place))
    param = ".".join(map(str, names)) or (str(place[0])[:100] if place else None)
    message = first["msg"].removeprefix("Value error, ")
    return f"{param or 'body'}: {message}.", param


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
