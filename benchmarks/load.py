"""Many clients at once of a run that `make serve` serves: how long each waits for the first text and for all of it.

make serve RUN=quickstart &
.venv/bin/python benchmarks/load.py --clients 20 --tokens 32

Clients ask base and tuned model in turn and stream. One asks alone first; what the crowd costs is beside it. Exits with
1 if any client fails or gets no answer.
"""

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai

QUESTIONS = (
    "What is anemia?",
    "How is gout treated?",
    "What causes asthma?",
    "Who is at risk for high blood pressure?",
)


def ask(client: openai.OpenAI, number: int, tokens: int) -> tuple[float, float] | str:
    """Seconds to the first text and to the end; or what went wrong."""
    began, first = time.monotonic(), None
    question, name = QUESTIONS[number % len(QUESTIONS)], ("base", "tuned")[number % 2]
    messages = [{"role": "user", "content": question}]
    try:
        for chunk in client.chat.completions.create(model=name, messages=messages, max_tokens=tokens, stream=True):
            if first is None and chunk.choices and chunk.choices[0].delta.content:
                first = time.monotonic() - began
    except openai.OpenAIError as error:
        return f"client {number}: {error}"
    return (first, time.monotonic() - began) if first is not None else f"client {number}: no answer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32, help="the longest answer")
    given = parser.parse_args()
    client = openai.OpenAI(base_url=given.url, api_key="none", max_retries=0, timeout=600)
    alone = ask(client, 0, given.tokens)
    with ThreadPoolExecutor(given.clients) as pool:
        began = time.monotonic()
        found = list(pool.map(lambda number: ask(client, number, given.tokens), range(given.clients)))
        took = time.monotonic() - began
    failed = [said for said in [alone, *found] if isinstance(said, str)]
    print(
        "\n".join(failed)
        or f"no failure; alone: first text after {alone[0]:.2f} s, whole answer after {alone[1]:.2f} s"
    )
    for place, name in enumerate(("first text", "whole answer")):
        seconds = sorted(times[place] for times in found if not isinstance(times, str))
        if seconds:
            print(f"{name:12} median {statistics.median(seconds):6.2f} s, last {seconds[-1]:6.2f} s")
    print(f"{given.clients} clients, up to {given.tokens} tokens each: {took:.1f} s in all, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
