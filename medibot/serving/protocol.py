"""Read and write OpenAI's chat-completions format.

What this server cannot do is refused by name and never ignored: nobody takes an answer for what it is not.
"""

import json
import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from medibot.serving.assistant import MODELS, Decoding, Message
from medibot.serving.emergencies import CRISIS, EMERGENCY

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
# Labels for a server's log; there is no log here, and no answer depends on them
LABELS = ("user", "safety_identifier", "metadata")


class ApiError(Exception):
    """A request that is not answered, in OpenAI's error format."""

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
        """Return the response's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def join_parts(content: Any) -> Any:
    """Return a message's content as text; a list of text parts is joined by line ends."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise ValueError("a part that is not text, and the model reads only text")
        if not isinstance(part["text"], str):
            raise ValueError("a part whose text is not a string")
    return "\n".join(part["text"] for part in content)


class Strict(BaseModel):
    """Refuse unknown names and convert nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ChatMessage(Strict):
    """One message of a request."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(join_parts)]

    def as_message(self) -> Message:
        """Return the message for the model, without the notice that an assistant's was sent with."""
        text = self.content
        if self.role == "assistant":
            text = text.removeprefix(f"{EMERGENCY}\n\n").removeprefix(f"{CRISIS}\n\n")
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    """What a stream ends with."""

    include_usage: bool = False


StopText = Annotated[str, Field(min_length=1, max_length=200)]


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
        list[StopText], BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop), Field(max_length=4)
    ] = []
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None

    def conversation(self) -> list[Message]:
        """Return the messages as the model is to see them."""
        return [message.as_message() for message in self.messages]

    def decoding(self) -> Decoding:
        """Return how the answer is chosen."""
        longest = self.max_tokens or self.max_completion_tokens or Decoding.max_new_tokens
        # As OpenAI's: top_p by itself samples at temperature 1
        temperature = 1.0 if self.temperature is None and self.top_p < 1 else self.temperature
        # Without a seed of its own, an answer would go on with the random numbers of the one before
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return Decoding(longest, temperature, self.top_p, tuple(self.stop), seed)


def read_request(body: bytes) -> ChatRequest:
    """Read a request; raise ApiError (400, or 404 for an unknown model) that names the parameter."""
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body is not a JSON object")
    found = {name: value for name, value in without_nulls(found).items() if name not in LABELS}
    for name, value in NEUTRAL.items():
        if found.pop(name, value) != value:
            message = f"{name} is not supported here, other than {json.dumps(value)}"
            raise ApiError(400, message, name, "unsupported_parameter")
    if isinstance(found.get("messages"), list):
        found["messages"] = [without_nulls(message) for message in found["messages"]]
    try:
        request = ChatRequest.model_validate(found)
    except ValidationError as error:
        raise first_complaint(error) from error
    both = (request.max_tokens, request.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise ApiError(400, "max_tokens and max_completion_tokens differ", "max_completion_tokens")
    require_model(request.model)
    return request


def without_nulls(value: Any) -> Any:
    """Return an object without its nulls, which OpenAI's format takes for absent."""
    return {name: inner for name, inner in value.items() if inner is not None} if isinstance(value, dict) else value


def require_model(name: str) -> None:
    """Raise ApiError for a model other than base and tuned."""
    if name not in MODELS:
        raise ApiError(404, f"no such model; there are: {', '.join(MODELS)}", "model", "model_not_found")


def first_complaint(error: ValidationError) -> ApiError:
    """Return the first of pydantic's complaints, with the parameter's place."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:100]}" for step in first["loc"])[1:]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{place} is not supported here", place, "unsupported_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{place} is missing", place)
    return ApiError(400, f"{place}: {first['msg'].removeprefix('Value error, ')}", place)


def model_cards(base: str, tuned: str, created: int) -> list[dict[str, Any]]:
    """Return the entries of GET /v1/models; `root` says what each is."""
    shared = {"object": "model", "created": created, "owned_by": "medibot"}
    return [{"id": "base", "root": base} | shared, {"id": "tuned", "root": tuned, "parent": "base"} | shared]


class ResponseWriter:
    """The response to one request: whole, or event by event.

    `notes` is what comes beside the answer ("notice", "emergency", "evidence"), an extension under the key "medibot".
    The emergency notice also begins the content, for clients that know no extension.
    """

    def __init__(self, request: ChatRequest, fingerprint: str, notes: dict[str, Any]) -> None:
        self.request, self.notes = request, notes
        self.shared = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": fingerprint,
        }
        self.before = f"{notes['emergency']}\n\n" if notes["emergency"] else ""

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """Return the response as one object."""
        message = {"role": "assistant", "content": self.before + text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        found = self.shared | {"object": "chat.completion", "choices": [choice]}
        return found | {"usage": usage, "medibot": self.notes}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> str:
        """Return one event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self.shared, "object": "chat.completion.chunk", "choices": [choice], **more})

    def first(self) -> str:
        """Return role, notice and notes, which are sent before the model begins."""
        return self.chunk({"role": "assistant", "content": self.before}, medibot=self.notes)

    def last(self, finish_reason: str, usage: dict[str, int]) -> str:
        """Return how the answer ended, the usage if that was asked for, and the end of the stream."""
        events = self.chunk({}, finish_reason)
        if self.request.stream_options.include_usage:
            events += event({**self.shared, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        return events + "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
