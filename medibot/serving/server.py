"""Serve a finished run on this machine: a page with base and tuned side by side, and OpenAI's chat completions.

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
from medibot.serving.assistant import MODELS, Assistant
from medibot.serving.protocol import ApiError, ResponseWriter, model_cards, read_request, require_model
from medibot.serving.queue import Answer, Service

MAX_BODY_BYTES, BODY_SECONDS, CONNECTIONS = 262_144, 10, 256
# How long streams have to end when the server stops
SHUTDOWN_SECONDS = 5
# Names under which a browser on this machine knows the server; any other is a page that rebound its own name
OUR_HOST = re.compile(r"(?:127\.0\.0\.1|localhost)(?::\d{1,5})?", re.IGNORECASE)
HEADERS = {
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def serve(name: str, port: int) -> None:
    """Answer on 127.0.0.1:`port` until a signal; return within seconds of it, answers being made included."""
    with open_socket(port) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # Until it serves, Ctrl-C just ends it, without Python's traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print(f"loading {name}", flush=True)
        service = Service(Assistant(name))
        server = Server(service)
        # uvicorn stops at these, then sends itself the signal again for whoever handled it before
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        where = f"{name}: {address} (page), {address}/v1 (OpenAI-style); Ctrl-C stops it"
        print(f"{service.assistant.about}\n{where}", flush=True)
        server.run([listener])
        service.close()
    print("stopped", flush=True)


def open_socket(port: int) -> socket.socket:
    """Return a socket on 127.0.0.1 before minutes of loading, so that a taken port is known at once; 0 is any free one."""
    try:
        return socket.create_server(("127.0.0.1", port), backlog=CONNECTIONS)
    except OSError as error:
        raise RecipeError.of("PORT", f"127.0.0.1:{port}: {error.strerror}", "choose another: PORT=8001") from error


class Server(uvicorn.Server):
    """uvicorn waits for every response to end before it stops; here they end at their next token."""

    def __init__(self, service: Service) -> None:
        self.service = service
        config = uvicorn.Config(
            make_application(service),
            http="h11",
            loop="asyncio",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the answers, then the connections."""
        self.service.stop()
        await super().shutdown(sockets)


def make_application(service: Service) -> ASGIApp:
    """Return the web application: page, health, models, chat completions."""
    assistant = service.assistant
    run, base = assistant.run.name, assistant.recipe.model["pretrained_model_name_or_path"]
    markup, policy = render_page(run, base, assistant.about, assistant.recipe.evaluation.questions)
    cards = model_cards(base, run, service.created)

    async def home(_: Request) -> Response:
        return HTMLResponse(markup, headers={"content-security-policy": policy})

    async def health(_: Request) -> Response:
        queue = {"running": service.queue.running, "waiting": len(service.queue.waiting)}
        return JSONResponse({"status": "ok", "run": run, "notice": assistant.about} | queue)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": cards})

    async def model(request: Request) -> Response:
        require_model(request.path_params["name"])
        return JSONResponse(cards[MODELS.index(request.path_params["name"])])

    async def completions(request: Request) -> Response:
        asked = read_request(await read_body(request))
        answer = Answer(service, asked)
        with ExitStack() as stack:
            stack.callback(answer.leave)
            writer = await answer.prepare()
            if not asked.stream:
                return await unless_disconnected(request, answer.whole(writer))
            stack.pop_all()
            return EventStream(answer, writer)

    routes = [
        Route("/", home),
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name}", model),
        Route("/v1/chat/completions", completions, methods=["POST"]),
    ]
    handlers: Any = {ApiError: refuse, HTTPException: refuse_path, ClientDisconnect: answer_nobody}
    return guard(Starlette(routes=routes, exception_handlers=handlers))


async def refuse(_: Request, error: ApiError) -> Response:
    """Answer a request that is refused."""
    return JSONResponse(error.body(), error.status, error.headers)


async def refuse_path(_: Request, error: HTTPException) -> Response:
    """Answer a path that is not here, or not by this method."""
    return JSONResponse(ApiError(error.status_code, error.detail).body(), error.status_code, error.headers)


async def answer_nobody(*_: Any) -> Response:
    """End a request whose client is gone."""
    return Response(status_code=499)


async def read_body(request: Request) -> bytes:
    """Return a JSON body; raise ApiError where it is something else (415), too large (413) or too slow (408)."""
    # No other site's page can send this type without asking first, and the answer to that is no
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} s") from error
    return bytes(body)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """Return the result of `work` as JSON; cancel it when the client closes the connection first."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    result, gone = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(result.result()) if result.done() else Response(status_code=499)
    finally:
        result.cancel()
        gone.cancel()


class EventStream(StreamingResponse):
    """An answer's stream; a client that closes it gives up the answer."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, writer: ResponseWriter) -> None:
        self.answer = answer
        super().__init__(answer.events(writer))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, then free its place."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.leave()


def guard(application: ASGIApp) -> ASGIApp:
    """Refuse what a page from elsewhere could send through a browser here, and add headers that keep answers in."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await application(scope, receive, send)

        async def send_private(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if OUR_HOST.fullmatch(host) and origin in (None, f"http://{host}"):
            return await application(scope, receive, send_private)
        what = "this server answers to 127.0.0.1 and localhost, and to its own page"
        return await JSONResponse(ApiError(403, what, None, "forbidden").body(), 403)(scope, receive, send_private)

    return guarded


def render_page(run: str, base: str, notice: str, questions: list[str]) -> tuple[str, str]:
    """Return (page, content security policy): the page loads nothing and runs no script but its own."""
    templates = jinja2.Environment(loader=jinja2.PackageLoader("medibot"), autoescape=True)
    page = templates.get_template("chat.html.j2").render(run=run, base=base, notice=notice, questions=questions)
    style, script = (
        base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
        for found in re.findall(r"<(?:style|script)>(.*?)</", page, re.DOTALL)
    )
    allowed = f"style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src 'self'; img-src data:"
    return page, f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
