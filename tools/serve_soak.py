"""Many OpenAI clients talk to a running `jpq-export serve` for a while; exit code 1 when any of them loses anything.

    python tools/serve_soak.py http://127.0.0.1:8000/v1 [--clients 16] [--seconds 120] [--api-key KEY] [--json FILE]

Every client in turn completes, chats, streams, breaks a stream off, and sends nonsense. Before, each prompt is answered
alone; an answer among others must be as long and have the same text, or the difference is told (a batch sums in another
order, so two tokens that are equally likely may change places) and counted as lost when it is another prompt's text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai

TEXTS = (
    "The capital of France is",
    "Water boils when",
    "A robot that sorts apples needs",
    "In winter the days are",
    "To measure the height of a tree,",
    "The oldest bridge of the town",
    "Once upon a time a fox",
    "Bread is made of",
)
KINDS = ("complete", "stream", "chat", "break off", "nonsense")


class Soak:
    """What happened: `counts` by kind, `lost` (what must not happen, a line each), `first_ms` (to a first token)."""

    def __init__(self, client: openai.AsyncOpenAI, model: str) -> None:
        self.counts: Counter[str] = Counter()
        self.lost: list[str] = []
        self.first_ms: list[float] = []
        self.tokens = 0
        self._client, self._model = client, model
        self._alone: dict[str, str] = {}

    async def run(self, clients: int, seconds: float) -> None:
        """Learn the answers, then let all clients talk until the time is up."""
        for number, text in enumerate(TEXTS):
            self._alone[text] = await self.complete(text, number)
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._talk(number, end) for number in range(clients)))

    async def _talk(self, number: int, end: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            kind, turn = rng.choice(KINDS), rng.randrange(len(TEXTS))
            try:
                await self._one(kind, TEXTS[turn], turn)
                self.counts[kind] += 1
            except (openai.OpenAIError, AssertionError) as error:
                self.lost.append(f"{kind}: {type(error).__name__}: {error}")

    async def _one(self, kind: str, text: str, turn: int) -> None:
        if kind == "complete":
            self._compare(text, await self.complete(text, turn))
        elif kind == "stream":
            self._compare(text, await self.stream(text, turn))
        elif kind == "chat":
            await self.chat(text, turn)
        elif kind == "break off":
            await self.stream(text, turn, most=3)
        else:
            await self.nonsense()

    def _compare(self, text: str, got: str) -> None:
        if got == self._alone[text]:
            return
        self.counts["other words than alone"] += 1
        assert got not in self._alone.values(), f"{text!r} got another prompt's answer"

    async def complete(self, text: str, turn: int) -> str:
        """A whole answer; its tokens are counted."""
        answer = await self._client.completions.create(**self._ask(turn), prompt=text)
        self._check(answer.choices[0].finish_reason, answer.usage.completion_tokens if answer.usage else 0, turn)
        return answer.choices[0].text

    async def chat(self, text: str, turn: int) -> None:
        """A streamed chat with its token count."""
        messages: Any = [{"role": "user", "content": text}]
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        reason, usage = None, None
        async for chunk in await self._client.chat.completions.create(**self._ask(turn), messages=messages, **options):
            reason = chunk.choices[0].finish_reason if chunk.choices else reason
            usage = chunk.usage or usage
        self._check(reason, usage.completion_tokens if usage else 0, turn)

    async def stream(self, text: str, turn: int, *, most: int | None = None) -> str:
        """A streamed answer; after `most` events the client is gone."""
        began, got, reason, events = time.monotonic(), "", None, 0
        stream = await self._client.completions.create(**self._ask(turn), prompt=text, stream=True)
        async for chunk in stream:
            if not events:
                self.first_ms.append(1e3 * (time.monotonic() - began))
            events += 1
            got, reason = got + chunk.choices[0].text, chunk.choices[0].finish_reason
            if events == most:
                await stream.close()
                return got
        assert reason in ("stop", "length"), f"the stream ended without a reason after {events} events"
        self.tokens += events
        return got

    async def nonsense(self) -> None:
        """Is refused as such."""
        try:
            await self._client.completions.create(model=self._model, prompt="x", max_tokens=10**9)
        except openai.BadRequestError as error:
            said = str(error)
        else:
            said = "accepted"
        assert "capacity" in said, said

    def _ask(self, turn: int) -> dict[str, Any]:
        return {"model": self._model, "max_tokens": 8 + 4 * turn, "temperature": 0}

    def _check(self, reason: str | None, tokens: int, turn: int) -> None:
        asked = 8 + 4 * turn
        assert (reason == "length" and tokens == asked) or (reason == "stop" and tokens <= asked), (reason, tokens)
        self.tokens += tokens


async def soak(url: str, *, clients: int, seconds: float, api_key: str) -> dict[str, Any]:
    """What happened; "lost" is empty when all is well."""
    async with openai.AsyncOpenAI(base_url=url, api_key=api_key, max_retries=0) as client:
        models = [model.id async for model in client.models.list()]
        run = Soak(client, models[0])
        began = time.monotonic()
        await run.run(clients, seconds)
        took = time.monotonic() - began
        held = await _held(client)
    if held != (0, 0):
        run.lost.append(f"afterwards {held[0]} sequences still run and {held[1]} wait")
    times = sorted(run.first_ms) or [0.0]
    return {
        "clients": clients,
        "seconds": round(took, 1),
        "counts": dict(sorted(run.counts.items())),
        "lost": run.lost,
        "tokens_per_second": round(run.tokens / took, 1),
        "first_token_ms": {f"p{part}": round(times[len(times) * part // 100], 1) for part in (50, 99)},
    }


async def _held(client: openai.AsyncOpenAI) -> tuple[int, int]:
    """Sequences that run and wait, once those whose clients left had a moment to end."""
    end = time.monotonic() + 5
    while True:
        health: Any = await client.get("../health", cast_to=object)
        held = health["running"], health["waiting"]
        if held == (0, 0) or time.monotonic() > end:
            return held
        await asyncio.sleep(0.1)


def main() -> int:
    """Parse the arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result = asyncio.run(soak(given.url, clients=given.clients, seconds=given.seconds, api_key=given.api_key))
    text = json.dumps(result, indent=1)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    return 1 if result["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
