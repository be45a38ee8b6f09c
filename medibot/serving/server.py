"""Serve a finished run on this machine: a page with base and tuned side by side, and OpenAI's chat completions.

Nothing that is asked or answered is written anywhere.
"""

import asyncio
import logging
import re
import secrets
import signal
import socket
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from medibot.errors import RecipeError, is_out_of_memory
from medibot.serving.assistant import MODELS, Assistant, Reply
from medibot.serving.evidence import Evidence
from medibot.serving.protocol import ApiError, ChatRequest, begin_reply, error_body, event, read_request, require_model

# Answers made at once, and requests that may wait behind them
RUNNING, WAITING = 8, 16
MAX_BODY_BYTES, BODY_SECONDS = 262_144, 10
# Names under which a browser on this machine knows the server; any other is a page that rebound its own name
OUR_HOST = re.compile(r"(?:127\.0\.0\.1|localhost)(?::\d{1,5})?", re.IGNORECASE)
# What keeps answers in
HEADERS = [
    ("x-content-type-options", "nosniff"),
    ("cross-origin-resource-policy", "same-origin"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-store"),
]
POLICY = (
    "default-src 'none'; style-src 'nonce-{0}'; script-src 'nonce-{0}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def serve(name: str, port: int) -> None:
    """Answer on 127.0.0.1:`port` until a signal; return within seconds of it, answers being made included."""
    try:
        # Before minutes of loading, so that a taken port is known at once; 0 is any free one
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise RecipeError.of("PORT", f"127.0.0.1:{port}: {error.strerror}", "choose another: PORT=8001") from error
    with listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # Until it serves, Ctrl-C just ends it, without Python's traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print(f"loading {name}", flush=True)
        server = Server(Assistant(name))
        # uvicorn stops at these, then sends itself the signal again for whoever handled it before
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        where = f"{name}: {address} (page), {address}/v1 (OpenAI-style); Ctrl-C stops it"
        print(f"{server.assistant.about}\n{where}", flush=True)
        server.run([listener])
        # A process that ends while a thread is inside the model would abort
        server.workers.shutdown()
    print("stopped", flush=True)


class Server(uvicorn.Server):
    """An assistant behind HTTP, and the answers that are made or wait: first come, first served."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self.evidence = Evidence.of(assistant.run)
        self.fingerprint: str = assistant.run.record()["fingerprint"]
        self.answers: set[Answer] = set()
        self.workers = ThreadPoolExecutor(RUNNING)
        # Five seconds for the streams to end when the server stops
        config = uvicorn.Config(
            make_application(self),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            headers=HEADERS,
            server_header=False,
            limit_concurrency=256,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the answers at their next token, then the connections; uvicorn alone would wait for whole answers."""
        for answer in list(self.answers):
            answer.leave()
        await super().shutdown(sockets)


class Answer:
    """One answer: a worker makes it when its turn comes, however slowly the client reads."""

    def __init__(self, server: Server, request: ChatRequest, reply: Reply, notes: dict[str, Any]) -> None:
        if server.should_exit:
            raise ApiError(503, "the server is stopping", None, "stopping")
        if len(server.answers) >= RUNNING + WAITING:
            raise ApiError(429, f"{RUNNING} answers are being made and {WAITING} wait; try again", None, "busy")
        self.server, self.request, self.reply, self.notes = server, request, reply, notes
        # The emergency notice also begins the content, for clients that do not know `medibot`
        self.before = f"{notes['emergency']}\n\n" if notes["emergency"] else ""
        # What the whole response, or each event of a stream, begins with
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": server.fingerprint,
        }
        # (trace, answer), each in pieces
        self.pieces: asyncio.Queue[tuple[str, str] | None] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        # Kept here, for asyncio itself holds a task only weakly
        self.watcher: asyncio.Task[None] | None = None
        server.answers.add(self)
        self.work = server.workers.submit(self.make)

    def make(self) -> None:
        """Pass the pieces on, in a worker's thread."""
        try:
            for piece in self.reply.parts():
                self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        finally:
            self.loop.call_soon_threadsafe(self.server.answers.discard, self)
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, None)

    def leave(self) -> None:
        """Give up the answer: a waiting one frees its place at once, a running one when the model is done with it."""
        self.reply.cancel()
        if self.work.cancel():
            self.server.answers.discard(self)
        self.pieces.put_nowait(None)

    async def leave_with_client(self, request: Request) -> None:
        """Give up the answer when the connection is closed; after the whole response that changes nothing."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.leave()

    async def parts(self) -> AsyncGenerator[tuple[str, str]]:
        """Yield (name in a message, text) as soon as it is made; raise ApiError (500, 503) when model or server stop."""
        while (piece := await self.pieces.get()) is not None:
            for name, text in zip(("reasoning_content", "content"), piece, strict=True):
                if text:
                    yield name, text
        if self.server.should_exit:
            raise ApiError(503, "the server is stopping", None, "stopping")
        if self.reply.failure is not None and is_out_of_memory(self.reply.failure):
            raise ApiError(503, "out of memory: write less, or ask for a shorter answer", None, "out_of_memory")
        if self.reply.failure is not None:
            logging.getLogger(__name__).error("an answer failed", exc_info=self.reply.failure)
            raise ApiError(500, "the model failed while it answered", None, "model_failed")

    def part(self, finish_reason: str | None = None, **content: dict[str, str]) -> dict[str, Any]:
        """Return the head with the only choice of a response; `content` is its `message`, or an event's `delta`."""
        return self.head | {"choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}]}

    def usage(self) -> dict[str, Any]:
        """Return the token counts, once the text is complete."""
        asked, said = self.reply.prompt_tokens, self.reply.completion_tokens
        return {"usage": {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}}

    async def events(self) -> AsyncGenerator[str]:
        """Yield the response as server-sent events; role and notices are sent before the model begins."""
        yield event(self.part(delta={"role": "assistant", "content": self.before}) | {"medibot": self.notes})
        try:
            async for name, text in self.parts():
                yield event(self.part(delta={name: text}))
            yield event(self.part(self.reply.finish_reason, delta={}))
            if self.request.stream_options.include_usage:
                yield event(self.head | {"choices": []} | self.usage())
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield event(error_body(error))


def make_application(server: Server) -> ASGIApp:
    """Return the web application: page, health, models, chat completions."""
    assistant = server.assistant
    run, base = assistant.run.name, assistant.recipe.model["pretrained_model_name_or_path"]
    page = jinja2.Environment(loader=jinja2.PackageLoader("medibot"), autoescape=True).get_template("chat.html.j2")
    shown = {"run": run, "base": base, "notice": assistant.about, "questions": assistant.recipe.evaluation.questions}
    shared = {"object": "model", "created": int(assistant.run.weights.stat().st_mtime), "owned_by": "medibot"}
    cards = {name: {"id": name, "root": base if name == "base" else run} | shared for name in MODELS}
    cards["tuned"]["parent"] = "base"

    async def home(_: Request) -> Response:
        # The page loads nothing and runs no script but its own
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(page.render(shown, nonce=nonce), headers={"content-security-policy": POLICY.format(nonce)})

    async def health(_: Request) -> Response:
        begun = min(len(server.answers), RUNNING)
        found = {"status": "ok", "run": run, "notice": assistant.about}
        return JSONResponse(found | {"running": begun, "waiting": len(server.answers) - begun})

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": list(cards.values())})

    async def model(request: Request) -> Response:
        require_model(request.path_params["name"])
        return JSONResponse(cards[request.path_params["name"]])

    async def completions(request: Request) -> Response:
        asked = read_request(await read_body(request))
        answer = Answer(server, asked, *await run_in_threadpool(begin_reply, asked, assistant, server.evidence))
        answer.watcher = asyncio.create_task(answer.leave_with_client(request))
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        message = {"role": "assistant", "content": answer.before}
        async for name, text in answer.parts():
            message[name] = message.get(name, "") + text
        whole = answer.part(answer.reply.finish_reason, message=message)
        return JSONResponse(whole | answer.usage() | {"medibot": answer.notes})

    routes = [
        Route("/", home),
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name}", model),
        Route("/v1/chat/completions", completions, methods=["POST"]),
    ]
    # Within the handlers of Starlette, which write the refusals
    return Starlette(routes=[Mount("/", guard(Router(routes)))], exception_handlers={HTTPException: refuse})


def guard(application: ASGIApp) -> ASGIApp:
    """Refuse, before the application, what a page from elsewhere could send through a browser here."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not OUR_HOST.fullmatch(host) or origin not in (None, f"http://{host}"):
            raise ApiError(
                403, "this server answers to 127.0.0.1 and localhost, and to its own page", None, "forbidden"
            )
        await application(scope, receive, send)

    return guarded


async def refuse(_: Request, error: Any) -> Response:
    """Return an error as OpenAI writes it; called by Starlette."""
    return JSONResponse(error_body(error), error.status_code, error.headers)


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
    except (TimeoutError, ClientDisconnect) as error:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} s") from error
    return bytes(body)
