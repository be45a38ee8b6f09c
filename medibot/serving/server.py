"""Serve a finished run on this machine: a page that shows base and tuned side by side, and OpenAI's chat completions.

medibot serve --run quickstart --port 8000

Nothing that is asked or answered is written anywhere.
"""

import asyncio
import base64
import hashlib
import re
import signal
import socket
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medibot.errors import RecipeError
from medibot.run import find_finished_run
from medibot.serving.assistant import MODELS, Assistant
from medibot.serving.protocol import ApiError, ResponseWriter, model_cards, read_request, require_model
from medibot.serving.queue import Answer, Desk

# Bytes of a body, seconds that it may take to arrive, connections at once
LARGEST, PATIENCE, CONNECTIONS = 262_144, 10, 256


# Seconds that streams have to end when the server stops
FAREWELL = 5


# Names under which a browser on this machine knows the server; any other is a page that rebound its own name
OURS = re.compile(r"(?:127\.0\.0\.1|localhost)(?::\d{1,5})?", re.IGNORECASE)


PRIVATE = {
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def serve(name: str, port: int) -> None:
    """Answer on 127.0.0.1:`port` until a signal; returns within seconds of it, answers being made included."""
    this = find_finished_run(name)
    with listening(port) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # Until it serves, Ctrl-C just ends it, without Python's traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print(f"loading {name}", flush=True)
        desk = Desk(Assistant(this))
        server = Server(desk)
        # uvicorn stops at these, then sends itself the signal again for whoever handled it before
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        print(
            f"{desk.speaker.about}\n{name}: {address} (page), {address}/v1 (OpenAI-style); Ctrl-C stops it", flush=True
        )
        server.run([listener])
        desk.close()
    print("stopped", flush=True)


def listening(port: int) -> socket.socket:
    """A socket on 127.0.0.1, so that a taken port is known before minutes of loading; port 0 is any free one."""
    try:
        return socket.create_server(("127.0.0.1", port), backlog=CONNECTIONS)
    except OSError as error:
        raise RecipeError.of("PORT", f"127.0.0.1:{port}: {error.strerror}", "choose another: PORT=8001") from error


class Server(uvicorn.Server):
    """uvicorn, which waits for every response to end before it stops: here they end at their next token."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        config = uvicorn.Config(
            application(desk),
            http="h11",
            loop="asyncio",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=FAREWELL,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.desk.stop()
        await super().shutdown(sockets)


def application(desk: Desk) -> ASGIApp:
    """The web application: page, health, models, chat completions."""
    run, base = desk.speaker.run.name, desk.speaker.recipe.model["pretrained_model_name_or_path"]
    markup, policy = page(run, base, desk.speaker.about, desk.speaker.recipe.evaluation.questions)
    cards = model_cards(base, run, desk.created)

    async def home(_: Request) -> Response:
        return HTMLResponse(markup, headers={"content-security-policy": policy})

    async def health(_: Request) -> Response:
        line = {"running": desk.line.running, "waiting": len(desk.line.waiting)}
        return JSONResponse({"status": "ok", "run": run, "notice": desk.speaker.about} | line)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": cards})

    async def model(request: Request) -> Response:
        require_model(request.path_params["name"])
        return JSONResponse(cards[MODELS.index(request.path_params["name"])])

    async def completions(request: Request) -> Response:
        asked = read_request(await body_of(request))
        answer = Answer(desk, asked)
        with ExitStack() as stack:
            stack.callback(answer.leave)
            writer = await answer.prepare()
            if not asked.stream:
                return await unless_left(request, answer.whole(writer))
            stack.pop_all()
            return Events(answer, writer)

    routes = [
        Route("/", home),
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name}", model),
        Route("/v1/chat/completions", completions, methods=["POST"]),
    ]
    handlers: Any = {ApiError: refused, HTTPException: not_here, ClientDisconnect: nobody_there}
    return guarded(Starlette(routes=routes, exception_handlers=handlers))


async def refused(_: Request, refusal: ApiError) -> Response:
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


async def not_here(_: Request, error: HTTPException) -> Response:
    """No such path, or not by this method."""
    refusal = ApiError(error.status_code, error.detail)
    return JSONResponse(refusal.body(), error.status_code, error.headers)


async def nobody_there(*_: Any) -> Response:
    return Response(status_code=499)


async def body_of(request: Request) -> bytes:
    """A JSON body; Refusal where it is something else (415), too large (413) or too slow (408)."""
    # No other site's page can send this type without asking first, and the answer to that is no
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST:
                    raise ApiError(413, f"the body is larger than {LARGEST:,} bytes")
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {PATIENCE} s") from error
    return bytes(body)


async def unless_left(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """The result of `work` as JSON; `work` is cancelled when the client closes the connection first."""

    async def departure() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    result, gone = asyncio.create_task(work), asyncio.create_task(departure())
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(result.result()) if result.done() else Response(status_code=499)
    finally:
        result.cancel()
        gone.cancel()


class Events(StreamingResponse):
    """An answer's stream; a client that closes it gives up the answer."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, writer: ResponseWriter) -> None:
        self.answer = answer
        super().__init__(answer.events(writer))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.leave()


def guarded(app: ASGIApp) -> ASGIApp:
    """Refuse what a web page from elsewhere could send through a browser on this machine; add headers that keep answers in."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)

        async def send_private(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(PRIVATE)
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if OURS.fullmatch(host) and origin in (None, f"http://{host}"):
            return await app(scope, receive, send_private)
        refusal = ApiError(
            403, "this server answers to 127.0.0.1 and localhost, and to its own page", None, "forbidden"
        )
        return await JSONResponse(refusal.body(), 403)(scope, receive, send_private)

    return guard


def page(run: str, base: str, notice: str, questions: list[str]) -> tuple[str, str]:
    """(markup, content security policy): the page loads nothing and runs no script but its own."""
    template = jinja2.Environment(autoescape=True).from_string(
        Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    )
    markup = template.render(run=run, base=base, notice=notice, questions=questions)
    style, script = (
        base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
        for found in re.findall(r"<(?:style|script)>(.*?)</", markup, re.DOTALL)
    )
    allowed = f"style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src 'self'; img-src data:"
    return markup, f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
