"""Rows that share a call: at once when idle, together when busy, each with its own answer and its own fate."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest

from app.adapters.row_sharing import CALLS_PER_ENDPOINT, RowSharing
from app.domain.dispatch import Answer, Row
from app.domain.errors import Code
from tests.support.memory_backend import InMemoryBackend
from tests.support.models import row_of, version_of
from tests.support.virtual_time import START_MS, VirtualClock, in_virtual_time

CALL_S = 0.01
VERSION = version_of(policy={"batch": {"maxSize": 4}, "timeout": "60000ms"})


class Model:
    """Answers ``x`` in 10 ms; a call with a row of ``poison`` fails whole. ``calls`` are the rows of each."""

    def __init__(self, *, takes_s: float = CALL_S) -> None:
        self.calls: list[list[Any]] = []
        self.running = self.peak = 0
        self._takes_s = takes_s

    async def __call__(self, rows: Sequence[Row]) -> Sequence[Mapping[str, Any]]:
        self.calls.append([row.values["x"] for row in rows])
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self._takes_s)
        finally:
            self.running -= 1
        if any(row.values["x"] == "poison" for row in rows):
            raise ValueError("no good")
        return [{"y": row.values["x"]} for row in rows]


def sharing(model: Callable[[Sequence[Row]], Awaitable[Sequence[Mapping[str, Any]]]]) -> RowSharing:
    """A backend before ``model``, on the running virtual loop."""
    clock = VirtualClock(asyncio.get_running_loop())
    return RowSharing(InMemoryBackend(clock, model), clock)


def row(x: Any, *, within_ms: int = 10_000) -> Row:
    """A row of one column; its id says which."""
    return row_of({"x": x}, request_id=f"r-{x}", now_ms=START_MS, within_ms=within_ms)


async def ask(backend: RowSharing, each: Row) -> Answer:
    """One row's answer."""
    (answer,) = await backend.infer(VERSION, (each,))
    return answer


def together(backend: RowSharing, *rows: Row) -> "list[asyncio.Task[Answer]]":
    """All rows at the same moment."""
    return [asyncio.create_task(ask(backend, each)) for each in rows]


@in_virtual_time
async def test_an_idle_model_is_asked_at_once() -> None:
    """A row that finds no call under way waits for none: its answer takes the call's time and no more."""
    model, clock = Model(), VirtualClock(asyncio.get_running_loop())
    backend = sharing(model)
    for x in range(3):
        started = clock.steady_ms()
        assert (await ask(backend, row(x))).outputs == {"y": x}
        assert clock.steady_ms() - started == CALL_S * 1000
    assert model.calls == [[0], [1], [2]]


@in_virtual_time
async def test_rows_that_come_while_the_model_is_busy_go_together() -> None:
    """The first rows go alone; those that come meanwhile go when a call returns, as many a call as the policy says."""
    model = Model()
    answers = await asyncio.gather(*together(sharing(model), *map(row, range(9))))
    assert [answer.outputs for answer in answers] == [{"y": x} for x in range(9)]
    assert model.calls == [[0], [1], [2, 3, 4, 5], [6, 7, 8]]
    assert model.peak == CALLS_PER_ENDPOINT


@in_virtual_time
async def test_a_shared_call_is_recorded_with_each_row() -> None:
    """Each row's record holds its own request and how many shared the call; not its neighbours' inputs."""
    answers = await asyncio.gather(*together(sharing(Model()), *map(row, range(6))))
    assert [answer.attempts[-1].rows for answer in answers] == [1, 1, 4, 4, 4, 4]
    assert [answer.sent for answer in answers] == [f"m r-{x} {{'x': {x}}}".encode() for x in range(6)]


@in_virtual_time
async def test_only_rows_of_one_shape_share() -> None:
    """Rows of other types or columns go in a call of their own, in the order in which they came."""
    model = Model()
    other = row_of({"x": 9, "z": 1}, now_ms=START_MS)
    answers = await asyncio.gather(*together(sharing(model), row(0), row(1), row(2), row("text"), other, row(3)))
    assert [answer.outputs for answer in answers] == [{"y": x} for x in (0, 1, 2, "text", 9, 3)]
    assert model.calls == [[0], [1], [2, 3], ["text"], [9]]


@in_virtual_time
async def test_a_row_whose_deadline_passes_while_it_waits_is_not_sent() -> None:
    """It is answered at its deadline; the model never sees it, and the others' call goes on."""
    model, clock = Model(), VirtualClock(asyncio.get_running_loop())
    backend = sharing(model)
    running = together(backend, row(0), row(1), row(2, within_ms=4), row(3))
    late = await running[2]
    assert clock.now_ms() == START_MS + 4
    assert late.problem is not None
    assert (late.problem.code, late.attempts, late.sent) == (Code.DEADLINE_EXCEEDED, (), b"")
    assert [(await each).outputs for each in running] == [{"y": 0}, {"y": 1}, None, {"y": 3}]
    assert model.calls == [[0], [1], [3]]


@in_virtual_time
async def test_an_expired_row_is_not_queued() -> None:
    """A row that comes too late to a busy model is answered at once."""
    model = Model()
    answers = await asyncio.gather(*together(sharing(model), row(0), row(1), row(2, within_ms=0)))
    assert answers[2].problem is not None
    assert answers[2].problem.code is Code.DEADLINE_EXCEEDED
    assert model.calls == [[0], [1]]


@in_virtual_time
async def test_a_late_timer_sends_nothing_expired() -> None:
    """Where the loop was held up until after a row's deadline, the row is answered as expired and not sent."""
    model, clock = Model(), VirtualClock(asyncio.get_running_loop())
    backend = RowSharing(InMemoryBackend(clock, model), clock)
    running = together(backend, row(0), row(1), row(2, within_ms=100), row(3))
    await asyncio.sleep(CALL_S / 2)
    clock.start_ms += 200
    late = await running[2]
    assert late.problem is not None
    assert (late.problem.code, late.attempts) == (Code.DEADLINE_EXCEEDED, ())
    assert (await running[3]).outputs == {"y": 3}
    assert model.calls == [[0], [1], [3]]


@in_virtual_time
async def test_a_hasty_row_does_not_cut_its_neighbours_call() -> None:
    """A row whose deadline comes in mid-call is answered then, with what was sent; the others get their answers."""
    model, clock = Model(), VirtualClock(asyncio.get_running_loop())
    running = together(sharing(model), row(0), row(1), row(2, within_ms=15), row(3))
    hasty = await running[2]
    assert clock.now_ms() == START_MS + 15
    assert hasty.problem is not None
    assert hasty.problem.code is Code.DEADLINE_EXCEEDED
    (attempt,) = hasty.attempts
    assert (attempt.outcome, attempt.rows, attempt.started_ms) == ("deadline", 2, START_MS + 10)
    assert hasty.sent == b"m r-2 {'x': 2}"
    assert (await running[3]).outputs == {"y": 3}


@in_virtual_time
async def test_a_poison_row_fails_alone() -> None:
    """A shared call that fails is made again a row at a time, once: the row at fault fails alone."""
    model = Model()
    answers = await asyncio.gather(*together(sharing(model), *map(row, (0, 1, 2, "a", "poison", "b"))))
    # "a", "poison" and "b" are of one type.
    assert [answer.outputs for answer in answers] == [{"y": 0}, {"y": 1}, {"y": 2}, {"y": "a"}, None, {"y": "b"}]
    assert model.calls == [[0], [1], [2], ["a", "poison", "b"], ["a"], ["poison"], ["b"]]
    poisoned = answers[4]
    assert poisoned.problem is not None
    assert poisoned.problem.code is Code.MODEL_ERROR
    assert [(attempt.outcome, attempt.rows) for attempt in poisoned.attempts] == [("http 422", 3), ("http 422", 1)]
    assert [(attempt.outcome, attempt.rows) for attempt in answers[3].attempts] == [("http 422", 3), ("ok", 1)]


@in_virtual_time
async def test_a_model_that_is_away_is_not_asked_row_by_row() -> None:
    """What failed for want of a server is not repeated for each row."""
    model = Model()

    async def away(rows: Sequence[Row]) -> Sequence[Mapping[str, Any]]:
        await model(rows)
        raise OSError("connection refused")

    answers = await asyncio.gather(*together(sharing(away), *map(row, range(5))))
    assert {answer.problem and answer.problem.code for answer in answers} == {Code.MODEL_UNAVAILABLE}
    assert model.calls == [[0], [1], [2, 3, 4]]


@pytest.mark.parametrize("status", [429, 502, 503, 504, 404])
def test_an_overloaded_model_is_not_asked_row_by_row(status: int) -> None:
    """A shared call that it turns away is not made again as many times as it had rows."""

    @in_virtual_time
    async def run() -> None:
        model = Model()

        async def overloaded(rows: Sequence[Row]) -> Sequence[Mapping[str, Any]]:
            await model(rows)
            raise ValueError(f"http {status}")

        answers = await asyncio.gather(*together(sharing(overloaded), *map(row, range(5))))
        assert {answer.problem and answer.problem.code for answer in answers} == {Code.MODEL_ERROR}
        assert model.calls == [[0], [1], [2, 3, 4]]

    run()


@in_virtual_time
async def test_who_stops_waiting_takes_nothing_from_the_others() -> None:
    """A cancelled row is not sent; one that is cancelled in mid-call leaves the call to its neighbours."""
    model = Model()
    running = together(sharing(model), *map(row, range(6)))
    await asyncio.sleep(CALL_S / 2)
    running[2].cancel()
    await asyncio.sleep(CALL_S)
    running[3].cancel()
    outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes] == [x in (2, 3) for x in range(6)]
    assert [each.result().outputs for each in running[4:]] == [{"y": 4}, {"y": 5}]
    assert model.calls == [[0], [1], [3, 4, 5]]


@in_virtual_time
async def test_a_cancelled_first_row_frees_its_place() -> None:
    """A row that called directly and is cancelled gives its place to those that wait."""
    model = Model()
    running = together(sharing(model), *map(row, range(4)))
    await asyncio.sleep(CALL_S / 2)
    running[0].cancel()
    answers = await asyncio.gather(*running[1:])
    assert [answer.outputs for answer in answers] == [{"y": 1}, {"y": 2}, {"y": 3}]


@in_virtual_time
async def test_concurrency_bounds_shared_calls() -> None:
    """A version that allows one call at once has one."""
    version = version_of(policy={"batch": {"maxSize": 4}, "concurrency": 1})
    model = Model()
    backend = sharing(model)
    await asyncio.gather(*(backend.infer(version, (row(x),)) for x in range(6)))
    assert (model.peak, model.calls) == (1, [[0], [1, 2, 3, 4], [5]])


@in_virtual_time
async def test_versions_without_a_batch_policy_pass_through() -> None:
    """Their rows go as they come, under their own concurrency."""
    model = Model()
    backend = sharing(model)
    await asyncio.gather(*(backend.infer(version_of(), (row(x),)) for x in range(5)))
    assert model.calls == [[0], [1], [2], [3], [4]]
    assert model.peak == 5


@in_virtual_time
async def test_nobody_is_left_waiting_when_it_closes() -> None:
    """Rows under way and rows that wait are answered as unavailable."""
    backend = sharing(Model(takes_s=1_000.0))
    running = together(backend, *map(row, range(3)))
    await asyncio.sleep(CALL_S)
    running[0].cancel()
    await asyncio.sleep(CALL_S)  # row 2 is in a call of the backend's own by now
    waiting = together(backend, row(4), row(5))
    await asyncio.sleep(CALL_S)
    await backend.close()
    answers = await asyncio.gather(running[2], *waiting)
    assert {answer.problem and answer.problem.code for answer in answers} == {Code.MODEL_UNAVAILABLE}
    running[1].cancel()


@in_virtual_time
async def test_a_fault_of_the_backend_s_code_is_an_answer_that_says_so() -> None:
    """Rows whose shared call raised what no backend should are answered, each with what it was."""

    async def broken(rows: Sequence[Row]) -> Sequence[Mapping[str, Any]]:
        await asyncio.sleep(CALL_S)
        if len(rows) > 1:
            raise ZeroDivisionError("of its own")
        return [{"y": 1}]

    answers = await asyncio.gather(*together(sharing(broken), *map(row, range(4))))
    assert [answer.outputs for answer in answers[:2]] == [{"y": 1}] * 2
    for answer in answers[2:]:
        assert answer.problem is not None
        assert answer.problem.code is Code.MODEL_ERROR
        assert "ZeroDivisionError" in answer.problem.message
