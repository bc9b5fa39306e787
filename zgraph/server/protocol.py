"""Requests over HTTP: OpenAI's completions and chat completions, as far as they mean something here.

A field that would have no effect is refused, unless its value asks for none.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from zgraph.errors import UsageError
from zgraph.inference.sampling import Sampling

MAX_STOPS = 4
MAX_PROMPTS = 16
COLDEST = 0.01
"""The lowest temperature above 0: logits divided by less may overflow."""

T = TypeVar("T", bound=BaseModel)
Nothing = Annotated[float, Field(ge=0, le=0)]


class _Asked(BaseModel):
    """Fields that both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[Literal["include_usage"], bool] | None = None
    n: Literal[1] | None = None
    user: str | None = None
    frequency_penalty: Nothing | None = None
    presence_penalty: Nothing | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @field_validator("temperature")
    @classmethod
    def _is_warm(cls, temperature: float | None) -> float | None:
        if temperature is not None and 0 < temperature < COLDEST:
            raise ValueError(f"must be 0, which takes the likeliest token, or at least {COLDEST}")
        return temperature

    @field_validator("stop")
    @classmethod
    def _are_few(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOPS or not all(0 < len(s) <= 256 for s in stops):
            raise ValueError(f"must be at most {MAX_STOPS} strings of 1 to 256 characters")
        return stop

    @property
    def stops(self) -> list[str]:
        """Strings that end the text."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen: at temperature 1, as OpenAI has it, where nothing else is said."""
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature == 0:
            return Sampling()
        return Sampling(True, temperature, self.top_k, self.top_p)


class Completion(_Asked):
    """A body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt, as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        is_tokens = bool(self.prompt) and isinstance(self.prompt[0], int)
        return cast(list[str] | list[list[int]], [self.prompt] if is_tokens else self.prompt)


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None

    @property
    def plain(self) -> dict[str, str]:
        """The message as templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatCompletion(_Asked):
    """A body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None


def parsed(kind: type[T], body: bytes) -> T:
    """A body as a request. Raises UsageError, which says what is wrong where."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        first = max(found, key=lambda e: len(e["loc"]))  # of several forms, the one that fits furthest
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        said = "is not known here; leave it out" if first["type"] == "extra_forbidden" else first["msg"]
        raise UsageError(f"{where}: {said}") from None
