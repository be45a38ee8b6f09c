"""The line before the model: who is answered now, who waits, and how text goes from the model's threads to asyncio."""

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

# Answers made at once, and requests that may stand in line behind them
RUNNING, WAITING = 8, 16


log = logging.getLogger(__name__)


class Queue:
    """First come, first served: RUNNING answers at once, at most WAITING requests behind them."""

    def __init__(self) -> None:
        self.running = 0
        self.waiting: deque[asyncio.Future[None]] = deque()
        # What the last answer took, in seconds
        self.took = 1.0

    def join(self) -> asyncio.Future[None]:
        """A place, done when its turn comes; Refusal where the line is full."""
        place = asyncio.get_running_loop().create_future()
        if self.running < RUNNING:
            self.running += 1
            place.set_result(None)
        elif len(self.waiting) < WAITING:
            self.waiting.append(place)
        else:
            soon = min(60, math.ceil(self.took / RUNNING))
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


class Desk:
    """A speaker, the line before it, and the threads that work for it."""

    def __init__(self, speaker: Assistant) -> None:
        self.speaker = speaker
        self.evidence = Evidence.of(speaker.run)
        self.line = Queue()
        self.answers: set[Answer] = set()
        self.stopping = False
        self.readers = ThreadPoolExecutor(RUNNING)
        # One alone: upstream's tokenizer changes its own state while it reads control tokens as text
        self.prompts = ThreadPoolExecutor(1)
        record = speaker.run.record()
        self.fingerprint: str = record["fingerprint"]
        self.created = int(speaker.run.weights.stat().st_mtime)

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

    def prepare(self, asked: ChatRequest) -> tuple[list[int], dict[str, Any]]:
        """(prompt ids, notes beside the answer); Refusal where the messages cannot be answered."""
        messages = asked.conversation()
        try:
            require_conversation(messages)
            ids = self.speaker.prompt_ids(messages)
        except RecipeError as error:
            raise ApiError(400, str(error), "messages") from error
        except (jinja2.TemplateError, ValueError) as error:
            raise ApiError(400, f"the model's chat template refuses these messages: {error}", "messages") from error
        longest = asked.decoding().max_new_tokens
        if len(ids) + longest > self.speaker.window:
            what = (
                f"{len(ids):,} tokens of messages and {longest:,} of answer exceed the model's {self.speaker.window:,}"
            )
            raise ApiError(400, what, "messages", "context_length_exceeded")
        emergency = self.speaker.notice(messages[-1]["content"])
        return ids, {"notice": self.speaker.about, "emergency": emergency, "evidence": self.evidence_for(messages)}

    def evidence_for(self, messages: list[Message]) -> dict[str, Any] | None:
        """What the training data has that is close, or that nothing is; None for a run that kept no evidence."""
        if self.evidence is None:
            return None
        found = self.evidence.nearest(self.evidence.about([m["content"] for m in messages if m["role"] == "user"]))
        close = [source for source in found if source.similarity >= self.evidence.threshold]
        said = CLOSE if close else NO_MATCH
        return {"close": bool(close), "said": said, "sources": [asdict(source) for source in close or found[:1]]}


class Answer:
    """One request's way from the line to its last piece of text. Its place is free once the model is done with it,
    however slowly the client reads."""

    def __init__(self, desk: Desk, asked: ChatRequest) -> None:
        self.desk, self.asked = desk, asked
        self.place = desk.line.join()
        self.pieces: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self.reply: Reply | None = None
        self.left = False
        desk.answers.add(self)

    def leave(self) -> None:
        """The client is gone, or has everything."""
        if self.left:
            return
        self.left = True
        self.desk.answers.discard(self)
        if self.reply is None:
            self.desk.line.leave(self.place)
        else:
            self.reply.cancel()

    async def prepare(self) -> ResponseWriter:
        loop = asyncio.get_running_loop()
        self.ids, notes = await loop.run_in_executor(self.desk.prompts, self.desk.prepare, self.asked)
        return ResponseWriter(self.asked, self.desk.fingerprint, notes)

    async def text(self) -> AsyncGenerator[str]:
        """The pieces, as soon as they are made; Refusal (500, 503) where the model fails or the server stops."""
        await asyncio.wait({self.place})
        if not self.left:
            self.reply = Reply(self.desk.speaker, self.ids, 0, self.asked.model, self.asked.decoding())
            self.desk.readers.submit(self.read, self.reply, asyncio.get_running_loop())
        while (piece := await self.pieces.get()) is not None:
            if isinstance(piece, Exception):
                log.error("an answer failed", exc_info=piece)
                raise ApiError(500, str(piece), None, "model_failed")
            yield piece
        if self.desk.stopping:
            raise ApiError(503, "the server is stopping", None, "stopping")

    def read(self, reply: Reply, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: pass the pieces on, then free the place."""
        began = time.monotonic()
        last: Exception | None = None
        try:
            for piece in reply:
                loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError as error:
            last = error
        loop.call_soon_threadsafe(self.done, last, time.monotonic() - began)

    def done(self, last: Exception | None, took: float) -> None:
        self.desk.line.took = took
        self.desk.line.leave(self.place)
        if last is not None:
            self.pieces.put_nowait(last)
        self.pieces.put_nowait(None)

    def ending(self) -> tuple[str, dict[str, int]]:
        """(finish reason, usage), once the text is complete."""
        assert self.reply is not None
        prompt, completion = self.reply.prompt_tokens, self.reply.completion_tokens
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return self.reply.finish_reason, usage

    async def events(self, writer: ResponseWriter) -> AsyncGenerator[str]:
        """The response as server-sent events."""
        yield writer.first()
        try:
            async for piece in self.text():
                yield writer.chunk({"content": piece})
            yield writer.last(*self.ending())
        except ApiError as refusal:
            yield event(refusal.body())

    async def whole(self, writer: ResponseWriter) -> dict[str, Any]:
        """The response as one object."""
        text = "".join([piece async for piece in self.text()])
        return writer.whole(text, *self.ending())
