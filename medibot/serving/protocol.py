"""Read and write OpenAI's chat-completions format.

What this server cannot do is refused by name and never ignored: nobody takes an answer for what it is not.
"""

import json
import secrets
from typing import Annotated, Any, Literal

import jinja2
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from medibot.errors import RecipeError
from medibot.serving.assistant import MODELS, Assistant, Decoding, Message, Reply, TooLong
from medibot.serving.emergencies import CRISIS, EMERGENCY
from medibot.serving.evidence import Evidence

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


class ApiError(HTTPException):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        self.param, self.code = param, code
        # Only a full queue is worth another try
        super().__init__(status, message, {"Retry-After": "5"} if status == 429 else None)


def error_body(error: HTTPException) -> dict[str, Any]:
    """Return an error as OpenAI writes it; Starlette's own (404, 405) name no parameter."""
    kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(error.status_code)
    param, code = (error.param, error.code) if isinstance(error, ApiError) else (None, None)
    return {"error": {"message": error.detail, "type": kind or "invalid_request_error", "param": param, "code": code}}


def join_parts(content: Any) -> Any:
    """Return a message's content as text; a list of text parts is joined by line ends."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    if content != [{"type": "text", "text": str(text)} for text in texts]:
        raise ValueError("a part that is not text, and the model reads only text")
    return "\n".join(texts)


class Strict(BaseModel):
    """Refuse unknown names and convert nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, value: Any) -> Any:
        """Return an object without its nulls, which OpenAI's format takes for absent."""
        return {name: inner for name, inner in value.items() if inner is not None} if isinstance(value, dict) else value


class ChatMessage(Strict):
    """One message of a request."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(join_parts)]
    # As this server returned it: taken back, and left out of what the model reads
    reasoning_content: str = ""

    @model_validator(mode="after")
    def refuse_thinking_of_others(self) -> "ChatMessage":
        """Return a message; refuse thinking where it would be ignored."""
        if self.reasoning_content and self.role != "assistant":
            raise ValueError("only an assistant's message has reasoning_content")
        return self


class StreamOptions(Strict):
    """What a stream ends with."""

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
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
        Field(max_length=4),
    ] = []
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None


def read_request(body: bytes) -> ChatRequest:
    """Read a request; raise ApiError (400, or 404 for an unknown model) that names the parameter."""
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body is not a JSON object")
    neutral = NEUTRAL | {name: found.get(name) for name in LABELS}
    found = {name: value for name, value in found.items() if name not in neutral or value != neutral[name]}
    try:
        request = ChatRequest.model_validate(found)
    except ValidationError as error:
        # The first of pydantic's complaints, with the parameter's place
        first = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:100]}" for step in first["loc"])[1:]
        if first["type"] == "extra_forbidden":
            other = f", other than {json.dumps(NEUTRAL[place])}" if place in NEUTRAL else ""
            raise ApiError(400, f"{place} is not supported here{other}", place, "unsupported_parameter") from error
        raise ApiError(400, f"{place}: {first['msg'].removeprefix('Value error, ')}", place) from error
    if len({request.max_tokens, request.max_completion_tokens, None}) > 2:
        raise ApiError(400, "max_tokens and max_completion_tokens differ", "max_completion_tokens")
    require_model(request.model)
    return request


def require_model(name: str) -> None:
    """Raise ApiError for a model other than base and tuned."""
    if name not in MODELS:
        raise ApiError(404, f"no such model; there are: {', '.join(MODELS)}", "model", "model_not_found")


def begin_reply(request: ChatRequest, assistant: Assistant, evidence: Evidence | None) -> tuple[Reply, dict[str, Any]]:
    """Return (reply, notes beside it); raise ApiError for messages that cannot be answered."""
    messages: list[Message] = []
    for message in request.messages:
        text = message.content
        if message.role == "assistant":
            # The model does not see the notice that its answer was sent with
            text = text.removeprefix(f"{EMERGENCY}\n\n").removeprefix(f"{CRISIS}\n\n")
        messages.append({"role": "system" if message.role == "developer" else message.role, "content": text})
    longest = request.max_tokens or request.max_completion_tokens or Decoding.max_new_tokens
    # As OpenAI's: top_p by itself samples at temperature 1
    temperature = 1.0 if request.temperature is None and request.top_p < 1 else request.temperature
    # Without a seed of its own, an answer would go on with the random numbers of the one before
    seed = secrets.randbits(62) if request.seed is None else request.seed
    decoding = Decoding(longest, temperature, request.top_p, tuple(request.stop), seed)
    try:
        reply = assistant.reply(messages, request.model, decoding, whole=True)
    except RecipeError as error:
        code = "context_length_exceeded" if isinstance(error, TooLong) else None
        raise ApiError(400, str(error), "messages", code) from error
    except (jinja2.TemplateError, ValueError) as error:
        raise ApiError(400, f"the model's chat template refuses these messages: {error}", "messages") from error
    asked = [message["content"] for message in messages if message["role"] == "user"]
    emergency, found = assistant.notice(asked[-1]), evidence and evidence.find(asked)
    return reply, {"notice": assistant.about, "emergency": emergency, "evidence": found}


def event(content: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
