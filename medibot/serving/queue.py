"""Queue requests and stream their answers to asyncio."""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import jinja2

from medibot.errors import RecipeError
from medibot.serving.assistant import Assistant, Message, Reply, require_conversation
from medibot.serving.evidence import CLOSE, NO_MATCH, Evidence
from medibot.serving.protocol import ApiError, ChatRequest, ResponseWriter, event

# Answers made at once, and requests that may wait behind them
RUNNING, WAITING = 8, 16
log = logging.getLogger(__name__)


class Queue:
    """First come, first served: RUNNING answers at once, at most WAITING requests behind them."""

    def __init__(self) -> None:
        self.running = 0
        self.waiting: deque[asyncio.Future[None]] = deque()
        # Of the last answer
        self.seconds_per_answer = 1.0

    def join(self) -> asyncio.Future[None]:
        """Return a place, done when its turn comes; raise ApiError (429) where the queue is full."""
        place = asyncio.get_running_loop().create_future()
        if self.running < RUNNING:
            self.running += 1
            place.set_result(None)
        elif len(self.waiting) < WAITING:
            self.waiting.append(place)
        else:
            soon = min(60, math.ceil(self.seconds_per_answer / RUNNING))
            raise ApiError(429, f"{RUNNING} answers are being made and {WAITING} wait; try again", None, "busy", soon)
        return place

    def leave(self, place: asyncio.Future[None]) -> None:
        """Give up a place, waiting or running; the next one's turn comes."""
        if place in self.waiting:
            self.waiting.remove(place)
            place.cancel()
        elif self.waiting:
            self.waiting.popleft().set_result(None)
        else:
            self.running -= 1


class Service:
    """An assistant, the queue before it, and the threads that work for it."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self.evidence = Evidence.of(assistant.run)
        self.queue = Queue()
        self.answers: set[Answer] = set()
        self.stopping = False
        self.readers = ThreadPoolExecutor(RUNNING)
        # One thread: upstream's tokenizer changes its own state while it reads control tokens as text
        self.prompts = ThreadPoolExecutor(1)
        self.fingerprint: str = assistant.run.record()["fingerprint"]
        self.created = int(assistant.run.weights.stat().st_mtime)

    def stop(self) -> None:
        """End every answer at its next token."""
        self.stopping = True
        for answer in list(self.answers):
            answer.leave()
            answer.pieces.put_nowait(None)

    def close(self) -> None:
        """Wait until no thread is inside the model: a process that ended before would abort."""
        self.readers.shutdown()
        self.prompts.shutdown()

    def prepare(self, request: ChatRequest) -> tuple[list[int], dict[str, Any]]:
        """Return (prompt ids, notes beside the answer); raise ApiError for messages that cannot be answered."""
        messages = request.conversation()
        try:
            require_conversation(messages)
            ids = self.assistant.prompt_ids(messages)
        except RecipeError as error:
            raise ApiError(400, str(error), "messages") from error
        except (jinja2.TemplateError, ValueError) as error:
            raise ApiError(400, f"the model's chat template refuses these messages: {error}", "messages") from error
        longest, window = request.decoding().max_new_tokens, self.assistant.window
        if len(ids) + longest > window:
            what = f"{len(ids):,} tokens of messages and {longest:,} of answer exceed the model's {window:,}"
            raise ApiError(400, what, "messages", "context_length_exceeded")
        emergency = self.assistant.notice(messages[-1]["content"])
        notes = {"notice": self.assistant.about, "emergency": emergency, "evidence": self.find_evidence(messages)}
        return ids, notes

    def find_evidence(self, messages: list[Message]) -> dict[str, Any] | None:
        """Return what the training data has that is close; None for a run without evidence."""
        if self.evidence is None:
            return None
        asked = self.evidence.about([message["content"] for message in messages if message["role"] == "user"])
        close, shown = self.evidence.find(asked)
        return {"close": close, "said": CLOSE if close else NO_MATCH, "sources": [asdict(source) for source in shown]}


class Answer:
    """One request's way from the queue to its last piece of text.

    Its place is free once the model is done with it, however slowly the client reads.
    """

    def __init__(self, service: Service, request: ChatRequest) -> None:
        self.service, self.request = service, request
        self.place = service.queue.join()
        self.pieces: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self.reply: Reply | None = None
        self.left = False
        service.answers.add(self)

    def leave(self) -> None:
        """Give up the answer: the client is gone, or has everything."""
        if self.left:
            return
        self.left = True
        self.service.answers.discard(self)
        if self.reply is None:
            self.service.queue.leave(self.place)
        else:
            self.reply.cancel()

    async def prepare(self) -> ResponseWriter:
        """Tokenize the messages and look up what comes beside the answer."""
        loop = asyncio.get_running_loop()
        self.ids, notes = await loop.run_in_executor(self.service.prompts, self.service.prepare, self.request)
        return ResponseWriter(self.request, self.service.fingerprint, notes)

    async def text(self) -> AsyncGenerator[str]:
        """Yield pieces as soon as they are made; raise ApiError (500, 503) where the model fails or the server stops."""
        await asyncio.wait({self.place})
        if not self.left:
            self.reply = Reply(self.service.assistant, self.ids, self.request.model, self.request.decoding())
            self.service.readers.submit(self.read, self.reply, asyncio.get_running_loop())
        while (piece := await self.pieces.get()) is not None:
            if isinstance(piece, Exception):
                log.error("an answer failed", exc_info=piece)
                raise ApiError(500, str(piece), None, "model_failed")
            yield piece
        if self.service.stopping:
            raise ApiError(503, "the server is stopping", None, "stopping")

    def read(self, reply: Reply, loop: asyncio.AbstractEventLoop) -> None:
        """Pass the pieces on, in a thread, then free the place."""
        began = time.monotonic()
        failure: Exception | None = None
        try:
            for piece in reply:
                loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError as error:
            failure = error
        loop.call_soon_threadsafe(self.finish, failure, time.monotonic() - began)

    def finish(self, failure: Exception | None, seconds: float) -> None:
        """Free the place, and end the pieces."""
        self.service.queue.seconds_per_answer = seconds
        self.service.queue.leave(self.place)
        if failure is not None:
            self.pieces.put_nowait(failure)
        self.pieces.put_nowait(None)

    def ending(self) -> tuple[str, dict[str, int]]:
        """Return (finish reason, usage), once the text is complete."""
        assert self.reply is not None
        prompt, completion = self.reply.prompt_tokens, self.reply.completion_tokens
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return self.reply.finish_reason, usage

    async def events(self, writer: ResponseWriter) -> AsyncGenerator[str]:
        """Yield the response as server-sent events."""
        yield writer.first()
        try:
            async for piece in self.text():
                yield writer.chunk({"content": piece})
            yield writer.last(*self.ending())
        except ApiError as error:
            yield event(error.body())

    async def whole(self, writer: ResponseWriter) -> dict[str, Any]:
        """Return the response as one object."""
        text = "".join([piece async for piece in self.text()])
        return writer.whole(text, *self.ending())
