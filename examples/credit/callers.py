"""The demo's callers: each applicant asks for a loan once, most over Kafka with a reply topic, some over HTTP.

A bounded number of callers ask at a time, each the next request once its last was answered, as services do that wait
for their decision. They begin as TCP does (RFC 5681, slow start): one, and one more for each answer, so that a broker
just started does not meet all of them at once. An answer keeps what came and how long it took; silence and refusals are
answers too, told apart.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import orjson

from app.domain.errors import BrokerError
from app.ports.request_reply import RequestReply
from examples.credit.applicants import Applicant

PATH = "/credit/card"
HTTP_EVERY = 10  # one request in so many goes over HTTP
CALLERS = 32
WAIT_MS = 30_000  # far beyond the route's deadline: what takes longer is lost

Via = Literal["kafka", "http"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of one applicant."""

    request_id: str
    applicant: Applicant
    via: Via

    @property
    def body(self) -> bytes:
        """The request's JSON."""
        return orjson.dumps(
            {
                "request_id": self.request_id,
                "path": PATH,
                "entities": dict(self.applicant.entities),
                "inputs": dict(self.applicant.inputs),
                "metadata": {"channel": "demo"},
            }
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What one ask came to: the reply's members, or ``fault`` where there was none."""

    ask: Ask
    latency_ms: float
    reply: Mapping[str, Any] | None
    fault: str | None = None


def asks(run: str, people: Sequence[Applicant], count: int) -> Iterator[Ask]:
    """``count`` asks, going round the people; ids begin with ``run``.

    >>> from examples.credit.applicants import applicants
    >>> [(ask.request_id, ask.via) for ask in asks("demo", applicants(), 10)][8:]
    [('demo-00009', 'kafka'), ('demo-00010', 'http')]
    """
    for number in range(1, count + 1):
        via: Via = "http" if number % HTTP_EVERY == 0 else "kafka"
        yield Ask(f"{run}-{number:05}", people[(number - 1) % len(people)], via)


async def ask_all(
    wanted: Iterable[Ask], kafka: RequestReply, gateway_url: str, on_answer: Callable[[Answer], None]
) -> list[Answer]:
    """Ask all of them, at most ``CALLERS`` at a time."""
    answers: list[Answer] = []
    pending = iter(wanted)
    timeout = aiohttp.ClientTimeout(total=WAIT_MS / 1000)

    async with aiohttp.ClientSession(gateway_url, timeout=timeout) as http, asyncio.TaskGroup() as callers:

        async def caller() -> None:
            for ask in pending:
                answer = await (_ask_http(http, ask) if ask.via == "http" else _ask_kafka(kafka, ask))
                answers.append(answer)
                on_answer(answer)
                if len(answers) < CALLERS:
                    callers.create_task(caller())

        callers.create_task(caller())
    return answers


async def _ask_kafka(kafka: RequestReply, ask: Ask) -> Answer:
    began = time.perf_counter()
    try:
        reply = await kafka.call(ask.body, request_id=ask.request_id, wait_ms=WAIT_MS)
        return Answer(ask, _since(began), orjson.loads(reply.value))
    except (BrokerError, orjson.JSONDecodeError) as error:
        return Answer(ask, _since(began), None, f"{ask.request_id} over Kafka: {error}")


async def _ask_http(http: aiohttp.ClientSession, ask: Ask) -> Answer:
    began = time.perf_counter()
    try:
        async with http.post("/v1/decisions", data=ask.body, headers={"Content-Type": "application/json"}) as response:
            members: dict[str, Any] = orjson.loads(await response.read())
    except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError) as error:
        return Answer(ask, _since(began), None, f"{ask.request_id} over HTTP: {error!r}")
    if response.status == 200:
        return Answer(ask, _since(began), members)
    if "outcome" in members:  # a decision told as a problem: HTTP's status stands where the decision's was
        return Answer(ask, _since(began), members | {"status": members["outcome"]})
    return Answer(ask, _since(began), None, f"{ask.request_id} over HTTP: {members.get('detail', response.status)}")


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1000
