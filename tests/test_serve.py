"""The server: OpenAI's format by its own client, what it refuses, who waits for whom, and the page in a real browser."""

import http.client
import json
import subprocess
import threading
import time

import openai
import pytest
from test_chat import speaker  # noqa: F401 - the fixture

from medibot import serve
from medibot.chat import MODELS, Decoding
from medibot.desk import Desk

ASK = [{"role": "user", "content": "What is anemia?"}]
EMERGENCY = [{"role": "user", "content": "My dad has crushing chest pain right now and cannot breathe"}]
SAMPLED = {"temperature": 1.0, "seed": 3, "max_tokens": 40}


class Running:
    """A server in a thread of the tests, and its desk to look behind."""

    def __init__(self, speaker):  # noqa: F811
        self.desk = Desk(speaker)
        self.speaker = speaker
        listener = serve.listening(0)
        self.port = listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)
        self.server = serve.Server(self.desk)
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()

    def create(self, which="tuned", messages=ASK, **more):
        return self.client.chat.completions.create(model=which, messages=messages, **({"max_tokens": 12} | more))

    def request(self, method, path, body=None, headers=None):
        """(status, headers, body) of a plain request; a dict is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        if isinstance(body, dict):
            body, headers = json.dumps(body), {"Content-Type": "application/json"} | (headers or {})
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        found = response.status, response.headers, response.read()
        connection.close()
        return found

    def post(self, body, **headers):
        """(status, error) of a request that is to be refused."""
        status, _, found = self.request("POST", "/v1/chat/completions", body, headers)
        return status, json.loads(found)["error"]

    def line(self):
        found = json.loads(self.request("GET", "/health")[2])
        return found["running"], found["waiting"]

    def settle(self, running, waiting):
        """Wait until so many are answered and so many wait."""
        for _ in range(200):
            if self.line() == (running, waiting):
                return
            time.sleep(0.02)
        raise AssertionError(f"{self.line()} instead of {(running, waiting)}")

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)
        self.desk.close()
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def server(speaker):  # noqa: F811
    running = Running(speaker)
    yield running
    running.stop()


def body(**more):
    return {"model": "tuned", "messages": ASK, "max_tokens": 2} | more


# --- OpenAI's format --------------------------------------------------------------------------------------------------


def test_openai_client_gets_the_answers_of_the_speaker(server):
    for which in MODELS:
        reply = server.speaker.reply(ASK, which, Decoding(12))
        expected = "".join(reply)
        whole = server.create(which)
        assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == reply.finish_reason
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
            reply.prompt_tokens,
            reply.completion_tokens,
        )
        assert whole.usage.prompt_tokens == len(server.speaker.prompt_ids(ASK))
        assert whole.model == which and whole.system_fingerprint == server.desk.fingerprint
        *chunks, last = server.create(which, stream=True, stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == reply.finish_reason and last.usage == whole.usage
        assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
        assert all(chunk.usage is None for chunk in server.create(which, stream=True))


def test_models_are_listed_and_found_by_name(server):
    listed = server.client.models.list().data
    assert [model.id for model in listed] == ["base", "tuned"] and listed[1].root == "talker"
    assert server.client.models.retrieve("base").root.endswith("smollm2")
    with pytest.raises(openai.NotFoundError, match="base, tuned"):
        server.client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="base, tuned"):
        server.create("other")


def test_seed_repeats_a_sampled_answer_and_none_does_not(server):
    said = [server.create(**SAMPLED | more).choices[0].message.content for more in ({}, {}, {"seed": 4})]
    assert said[0] == said[1] != said[2]
    unseeded = [server.create(temperature=1.0, max_tokens=40).choices[0].message.content for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    greedy = [server.create(temperature=0, seed=seed).choices[0].message.content for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_stop_texts_end_an_answer_before_them(server):
    whole = server.create(**SAMPLED).choices[0].message.content
    for stop in (whole[20:24], [whole[20:24], "never written"]):
        cut = server.create(**SAMPLED, stop=stop).choices[0]
        assert cut.message.content == whole[: whole.index(whole[20:24])] and cut.finish_reason == "stop"


def test_content_in_parts_and_the_other_names_of_settings(server):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "anemia?"}]
    joined = server.create(messages=[{"role": "user", "content": "What is\nanemia?"}])
    assert server.create(messages=[{"role": "user", "content": parts}]).usage == joined.usage
    developer = [{"role": "developer", "content": "Be brief."}, *ASK]
    system = [{"role": "system", "content": "Be brief."}, *ASK]
    assert server.create(messages=developer).usage == server.create(messages=system).usage
    named = server.client.chat.completions.create(model="base", messages=ASK, max_completion_tokens=3, n=1)
    assert named.usage.completion_tokens == 3 and named.choices[0].finish_reason == "length"


def test_curl_asks_and_streams(server):
    base = ["curl", "-sN", "--max-time", "20", "-H", "Content-Type: application/json"]
    url = f"{server.address}/v1/chat/completions"
    whole = subprocess.run([*base, url, "-d", json.dumps(body())], capture_output=True, text=True, check=True)
    streamed = subprocess.run(
        [*base, url, "-d", json.dumps(body(stream=True))], capture_output=True, text=True, check=True
    )
    *events, end = streamed.stdout.strip().split("\n\n")
    assert end == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == json.loads(whole.stdout)["choices"][0]["message"]["content"]
