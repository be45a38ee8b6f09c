"""OpenAI's chat-completions format: a request read and checked, an answer written.

What this server cannot do is refused by name and never ignored, so that nobody takes an answer for what it is not.
"""

import json
import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from medibot import care
from medibot.serving.assistant import MODELS, Decoding, Message

# Settings that clients write out although they change nothing: accepted with these values, refused with others
NEUTRAL: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "tools": [],
    "response_format": {"type": "text"},
    "store": False,
}


# Labels of a request for its server's records, and this one keeps none: no answer depends on them
LABELS = ("user", "safety_identifier", "metadata")


class ApiError(Exception):
    """A request that is not answered, as OpenAI's error format has it."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def as_text(content: Any) -> Any:
    """A message's content; a list of text parts is joined by line ends."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise ValueError("a part that is not text, and the model reads text alone")
        if not isinstance(part["text"], str):
            raise ValueError("a part whose text is not a string")
    return "\n".join(part["text"] for part in content)


def as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ChatMessage(Strict):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(as_text)]


class StreamOptions(Strict):
    include_usage: bool = False


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions; without a temperature, the run's own decoding, as in its evaluation."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=500)]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]], BeforeValidator(as_list), Field(max_length=4)
    ] = []
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None

    def conversation(self) -> list[Message]:
        """The messages as the model is to see them: without the notices that were put before its answers."""
        roles = {"developer": "system"}
        return [{"role": roles.get(said.role, said.role), "content": own_words(said)} for said in self.messages]

    def decoding(self) -> Decoding:
        longest = self.max_tokens or self.max_completion_tokens or Decoding.max_new_tokens
        # As OpenAI's: top_p alone samples at temperature 1
        temperature = 1.0 if self.temperature is None and self.top_p < 1 else self.temperature
        # Without a seed of its own, an answer would go on with the dice of the one before
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return Decoding(longest, temperature, self.top_p, tuple(self.stop), seed)


def own_words(said: ChatMessage) -> str:
    """The content; an assistant's without the notice that it was sent with."""
    if said.role != "assistant":
        return said.content
    return said.content.removeprefix(f"{care.EMERGENCY}\n\n").removeprefix(f"{care.CRISIS}\n\n")


def read_request(body: bytes) -> ChatRequest:
    """The request, or a Refusal (400, or 404 for a model that is not here) that names the parameter."""
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body is not a JSON object")
    # OpenAI's format: null is the same as nothing
    found = {name: value for name, value in found.items() if value is not None and name not in LABELS}
    for name, value in NEUTRAL.items():
        if found.pop(name, value) != value:
            raise ApiError(
                400, f"{name} is not supported here, other than {json.dumps(value)}", name, "unsupported_parameter"
            )
    if isinstance(found.get("messages"), list):
        found["messages"] = [without_nulls(message) for message in found["messages"]]
    try:
        asked = ChatRequest.model_validate(found)
    except ValidationError as error:
        raise complaint(error) from error
    if None not in (asked.max_tokens, asked.max_completion_tokens) and asked.max_tokens != asked.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ", "max_completion_tokens")
    require_model(asked.model)
    return asked


def without_nulls(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if value is not None}


def require_model(name: str) -> None:
    if name not in MODELS:
        raise ApiError(404, f"no such model; there are: {', '.join(MODELS)}", "model", "model_not_found")


def complaint(error: ValidationError) -> ApiError:
    """The first of pydantic's complaints, with the parameter's place."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:100]}" for step in first["loc"])[1:]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{place} is not supported here", place, "unsupported_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{place} is missing", place)
    return ApiError(400, f"{place}: {first['msg'].removeprefix('Value error, ')}", place)


def model_cards(base: str, tuned: str, created: int) -> list[dict[str, Any]]:
    """The entries of GET /v1/models; `root` says what each is."""
    shared = {"object": "model", "created": created, "owned_by": "medibot"}
    return [{"id": "base", "root": base} | shared, {"id": "tuned", "root": tuned, "parent": "base"} | shared]


class ResponseWriter:
    """The response to one request: whole, or event by event.

    `notes` is what stands beside the answer ("notice", "emergency", "evidence"), an extension under the key "medibot".
    The emergency notice also comes as the beginning of the content, for clients that know no extension.
    """

    def __init__(self, asked: ChatRequest, fingerprint: str, notes: dict[str, Any]) -> None:
        self.asked, self.notes = asked, notes
        self.shared = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": fingerprint,
        }
        self.before = f"{notes['emergency']}\n\n" if notes["emergency"] else ""

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.before + text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {
            **self.shared,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage,
            "medibot": self.notes,
        }

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self.shared, "object": "chat.completion.chunk", "choices": [choice], **more})

    def first(self) -> str:
        """Role, notice and notes: sent before the model has its turn."""
        return self.chunk({"role": "assistant", "content": self.before}, medibot=self.notes)

    def last(self, finish_reason: str, usage: dict[str, int]) -> str:
        """How it ended, the usage if that was asked for, and the end of the stream."""
        events = self.chunk({}, finish_reason)
        if self.asked.stream_options.include_usage:
            events += event({**self.shared, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        return events + "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
