"""Rows that share calls, whatever comes when: each gets its own answer, and calls stay within their bounds."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from app.adapters.row_sharing import CALLS_PER_ENDPOINT, RowSharing
from app.domain.dispatch import Answer, Row, sharing
from app.domain.errors import Code
from tests.support.memory_backend import InMemoryBackend
from tests.support.models import row_of, version_of
from tests.support.virtual_time import START_MS, VirtualClock, VirtualLoop

ROWS_MAX = 3
VERSION = version_of(policy={"batch": {"maxSize": ROWS_MAX}, "timeout": "60000ms"})
NUMBERS = st.integers(0, 99)
SHAPES = st.one_of(
    NUMBERS.map(lambda x: {"x": x}), NUMBERS.map(lambda x: {"x": str(x)}), NUMBERS.map(lambda x: {"x": x, "z": 0})
)
COMERS = st.lists(
    st.tuples(SHAPES, st.integers(0, 30), st.integers(-1, 60), st.one_of(st.none(), st.integers(0, 30))), max_size=14
)
"""Who comes: values, when, within what time, and after how long it stops waiting; milliseconds."""


@given(COMERS, st.lists(st.integers(0, 25), min_size=1, max_size=8), st.sets(NUMBERS, max_size=3))
def test_each_row_gets_its_own_answer(
    comers: Sequence[tuple[dict[str, Any], int, int, int | None]], times: Sequence[int], poison: set[int]
) -> None:
    """Every row ends by its deadline with its own output, or with a problem that it may have; no two get mixed up."""
    calls: list[Sequence[Row]] = []
    running = peak = 0

    async def model(rows: Sequence[Row]) -> Sequence[Mapping[str, Any]]:
        nonlocal running, peak
        calls.append(rows)
        if len(rows) > 1:
            running, peak = running + 1, max(peak, running + 1)
        try:
            await asyncio.sleep(times[len(calls) % len(times)] / 1000)
        finally:
            running -= len(rows) > 1
        if any(row.values["x"] in poison for row in rows):
            raise ValueError("no good")
        return [{"y": f"{row.request_id} {row.values['x']!r}"} for row in rows]

    async def come(backend: RowSharing, clock: VirtualClock, number: int) -> Answer | None:
        values, at_ms, within_ms, patience_ms = comers[number]
        await asyncio.sleep(at_ms / 1000)
        row = row_of(values, request_id=f"r{number}", now_ms=START_MS + at_ms, within_ms=within_ms)
        try:
            async with asyncio.timeout(None if patience_ms is None else patience_ms / 1000):
                (answer,) = await backend.infer(VERSION, (row,))
        except TimeoutError:
            return None
        assert clock.now_ms() <= max(row.deadline_ms, START_MS + at_ms) + 1
        return answer

    async def run() -> list[Answer | None]:
        clock = VirtualClock(asyncio.get_running_loop())
        backend = RowSharing(InMemoryBackend(clock, model), clock)
        return await asyncio.gather(*(come(backend, clock, number) for number in range(len(comers))))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        answers = runner.run(run())
    for number, answer in enumerate(answers):
        x = comers[number][0]["x"]
        if answer is None:
            continue
        if answer.problem is None:
            assert answer.outputs == {"y": f"r{number} {x!r}"}
            assert f"r{number} ".encode() in answer.sent
        else:
            expired = answer.problem.code is Code.DEADLINE_EXCEEDED
            assert expired or (answer.problem.code is Code.MODEL_ERROR and x in poison)
    assert peak <= CALLS_PER_ENDPOINT
    for rows in calls:
        assert len(rows) <= ROWS_MAX
        assert all(row.types == rows[0].types and tuple(row.values) == tuple(rows[0].values) for row in rows)


@given(st.lists(SHAPES, min_size=1, max_size=12), st.integers(1, 5))
def test_what_shares_a_call(shapes: Sequence[dict[str, Any]], rows_max: int) -> None:
    """The first row goes, with the next ones of its shape, as many as may; those left behind keep their order."""
    rows = [row_of(values) for values in shapes]
    places = sharing(rows, rows_max)
    alike = [place for place, row in enumerate(rows) if row.types == rows[0].types]
    assert places == alike[:rows_max]
