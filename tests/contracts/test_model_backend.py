"""What every model backend promises: in memory, over HTTP against a real server, and each where rows share calls."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web

from app.adapters.http_oip import HttpOipBackend
from app.adapters.row_sharing import RowSharing
from app.domain.dispatch import Row
from app.domain.errors import Code
from app.domain.version_documents import ModelVersionSpec
from app.ports.model_backend import ModelBackend
from tests.support.memory_backend import InMemoryBackend
from tests.support.model_server import ModelServer, doubled, respond, serving, tensor
from tests.support.models import MovableClock, row_of, version_of

Behaviour = Callable[[], Awaitable[str]]


@dataclass(slots=True)
class Rig:
    """A backend, the address that its versions name, and a switch for how the model behaves."""

    backend: ModelBackend
    clock: MovableClock
    endpoint: str
    behave: Callable[[Behaviour | None], None]
    calls: Callable[[], int]
    shared: bool

    def version(self, policy: Mapping[str, Any] | None = None) -> ModelVersionSpec:
        """A version served here, with a batch policy where rows share calls."""
        return version_of(
            self.endpoint, policy={**({"batch": {"maxSize": 8}} if self.shared else {}), **(policy or {})}
        )


@pytest.fixture(params=["memory", "http", "memory, shared", "http, shared"])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    clock = MovableClock()
    shared = request.param.endswith("shared")
    if request.param.startswith("memory"):
        built = _memory(clock, shared=shared)
        yield built
        await built.backend.close()
        return
    async with serving() as server:
        http = HttpOipBackend(clock)
        backend = RowSharing(http, clock) if shared else http
        yield Rig(
            backend,
            clock,
            server.url,
            lambda behaviour: _behave(server, behaviour),
            lambda: len(server.calls),
            shared,
        )
        await backend.close()


def _behave(server: ModelServer, behaviour: Behaviour | None) -> None:
    async def handler(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
        verdict = "ok" if behaviour is None else await behaviour()
        if verdict == "error":
            return respond({"error": "no good"}, 400)
        if verdict == "short":
            return respond({"outputs": [tensor("y", [0], [])]})
        return await doubled(request, body)

    server.handler = handler


def _memory(clock: MovableClock, *, shared: bool) -> Rig:
    current: list[Behaviour | None] = [None]
    called = 0

    async def model(rows: Sequence[Row]) -> Sequence[Mapping[str, Any]]:
        nonlocal called
        called += 1
        verdict = "ok" if current[0] is None else await current[0]()
        if verdict == "error":
            raise ValueError("no good")
        return [] if verdict == "short" else [{"y": 2 * row.values["x"]} for row in rows]  # type: ignore[operator]  # x is a number here

    def behave(behaviour: Behaviour | None) -> None:
        current[0] = behaviour

    memory = InMemoryBackend(clock, model)
    backend = RowSharing(memory, clock) if shared else memory
    return Rig(backend, clock, "http://127.0.0.1:1", behave, lambda: called, shared)


def _always(verdict: str) -> Behaviour:
    async def behaviour() -> str:
        return verdict

    return behaviour


async def _hang() -> str:
    await asyncio.Event().wait()
    return "ok"


async def test_answers_in_order(rig: Rig) -> None:
    """Each row of one call gets its own answer, in the rows' order."""
    rows = [row_of({"x": value}, request_id=f"r-{value}") for value in (1, 2, 3)]
    answers = await rig.backend.infer(rig.version(), rows)
    assert [answer.outputs for answer in answers] == [{"y": 2}, {"y": 4}, {"y": 6}]
    assert all(answer.problem is None and answer.attempts[-1].outcome == "ok" for answer in answers)
    assert rig.calls() == 1


async def test_no_rows_no_call(rig: Rig) -> None:
    """Nothing asked is nothing called."""
    assert tuple(await rig.backend.infer(rig.version(), ())) == ()
    assert rig.calls() == 0


async def test_expired_is_not_called(rig: Rig) -> None:
    """After the earliest deadline of the rows nothing is called, and the problem says so."""
    rows = [row_of(), row_of(within_ms=-1)]
    answers = await rig.backend.infer(rig.version(), rows)
    assert [answer.problem and answer.problem.code for answer in answers] == [Code.DEADLINE_EXCEEDED] * 2
    assert rig.calls() == 0
    assert answers[0].attempts == ()


async def test_refusal_is_a_problem(rig: Rig) -> None:
    """A model that refuses its inputs is a problem with its own words, not an exception."""
    rig.behave(_always("error"))
    (answer,) = await rig.backend.infer(rig.version(), (row_of(),))
    assert answer.outputs is None
    assert answer.problem is not None
    assert answer.problem.code is Code.MODEL_ERROR
    assert "no good" in answer.problem.message


async def test_too_few_answers(rig: Rig) -> None:
    """Fewer answers than rows are an unsound output for every row: none can be told whose it is."""
    rig.behave(_always("short"))
    answers = await rig.backend.infer(rig.version(), (row_of(), row_of()))
    assert [answer.problem and answer.problem.code for answer in answers] == [Code.MODEL_OUTPUT_INVALID] * 2


async def test_hanging_model_is_a_timeout(rig: Rig) -> None:
    """A model that does not answer costs its policy's timeout."""
    rig.behave(_hang)
    version = rig.version({"timeout": "50ms", "retries": 0})
    async with asyncio.timeout(5):
        (answer,) = await rig.backend.infer(version, (row_of(),))
    assert answer.problem is not None
    assert answer.problem.code is Code.MODEL_TIMEOUT


async def test_deadline_bounds_a_call(rig: Rig) -> None:
    """A deadline nearer than the policy's timeout ends the call, and the problem names the deadline."""
    rig.behave(_hang)
    version = rig.version({"timeout": "60000ms"})
    async with asyncio.timeout(5):
        (answer,) = await rig.backend.infer(version, (row_of(within_ms=80),))
    assert answer.problem is not None
    assert answer.problem.code is Code.DEADLINE_EXCEEDED


async def test_concurrency_is_bounded(rig: Rig) -> None:
    """No more calls of a version run at once than its policy allows; the others wait, at most until their deadline."""
    running = peak = 0
    full, go = asyncio.Event(), asyncio.Event()

    async def behaviour() -> str:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        if running == 2:
            full.set()
        await go.wait()
        running -= 1
        return "ok"

    rig.behave(behaviour)
    version = rig.version({"concurrency": 2, "timeout": "5000ms"})
    patient = [asyncio.create_task(_one(rig, version, row_of())) for _ in range(6)]
    async with asyncio.timeout(5):
        await full.wait()
        hasty = await _one(rig, version, row_of(within_ms=50))
        go.set()
        answers = await asyncio.gather(*patient)
    assert peak == 2
    assert hasty == Code.DEADLINE_EXCEEDED
    assert answers == [None] * 6


async def _one(rig: Rig, version: Any, row: Row) -> Code | None:
    (answer,) = await rig.backend.infer(version, (row,))
    return None if answer.problem is None else answer.problem.code


async def test_closed_backend_is_unavailable(rig: Rig) -> None:
    """A call after closing is a problem, not an exception."""
    await rig.backend.close()
    (answer,) = await rig.backend.infer(rig.version(), (row_of(),))
    assert answer.problem is not None
    assert answer.problem.code is Code.MODEL_UNAVAILABLE
