"""Rows that share a call: single rows of several requests in, as few calls of their model as it is busy for out.

A row goes to its model at once while fewer than ``CALLS_PER_ENDPOINT`` calls an endpoint are under way. Rows that come
while the model is busy gather, and as soon as a call returns they go together, as many as the version's
``policy.batch.maxSize`` allows. So nothing ever waits for company: an idle model answers as fast as without this, and a
busy one is asked less often the busier it is. The technique is known as natural or smart batching; compare the adaptive
batching of Clipper (Crankshaw et al., "Clipper: A Low-Latency Online Prediction Serving System", NSDI 2017), which sets
sizes and delays where this needs neither.

What one row does is not its neighbours' fate. A shared call that the server refuses for what is in it, breaks by, or
answers unsoundly is made again a row at a time, each in one attempt, so that the row at fault fails alone. One that an
overloaded server turns away is not: as many calls as there were rows are the last thing that helps it. A row whose
deadline comes is answered then, whatever its call still waits for. Whoever stops waiting for a row takes nothing from
the others.

Versions without ``policy.batch``, and calls that bring several rows, pass through.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import structlog
from prometheus_client import Histogram

from app.domain.dispatch import Answer, Attempt, Row, sharing
from app.domain.errors import Code, Problem
from app.domain.version_documents import BatchPolicy, HttpBackend, ModelVersionSpec
from app.ports.clock import Clock
from app.ports.model_backend import RowBackend

log = structlog.get_logger()

CALLS_PER_ENDPOINT: Final = 2
"""One that the server works on and one on its way; with more, rows would be spread over calls that cost as much."""
_LANES_MAX: Final = 4_096
_ROWS_AT_FAULT: Final = frozenset({"http 400", "http 413", "http 422", "http 500"})
"""Outcomes that one row, or their number, may have brought upon a call, beside an unsound answer.

A server that is away, too slow or overloaded (429, 502, 503, 504), or does not know the model (404), would be so for
each row alone too.
"""

_ROWS = Histogram(
    "broker_model_call_rows",
    "Rows of one call, of versions with a batch policy",
    ["model", "version"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)


class _Waiting:
    """A row that waits for its answer, first for a call and then for what it brings."""

    __slots__ = ("answer", "row", "sent_ms", "timer")

    def __init__(self, row: Row, answer: "asyncio.Future[Answer]") -> None:
        self.row = row
        self.answer = answer
        self.sent_ms: tuple[int, float, int] | None = None
        """Once it is in a call: when, on both clocks, and how many rows share it."""
        self.timer: asyncio.TimerHandle | None = None

    def settle(self, answer: Answer) -> None:
        """Answer it, unless it is answered or nobody waits for it."""
        if self.timer is not None:
            self.timer.cancel()
        if not self.answer.done():
            self.answer.set_result(answer)


class _Lane:
    """One version's calls under way, and the rows that wait for one of them to return."""

    def __init__(self, version: ModelVersionSpec, backend: HttpBackend, batch: BatchPolicy) -> None:
        self.version = version
        self.title = f"{version.model} {version.version}"
        self.endpoints = ", ".join(backend.endpoints)
        self.rows_max = batch.max_size
        self.calls_max = min(version.policy.concurrency, CALLS_PER_ENDPOINT * len(backend.endpoints))
        self.calls = 0
        self.waiting: list[_Waiting] = []
        self.rows = _ROWS.labels(version.model, version.version)


class RowSharing:
    """``ports.model_backend.ModelBackend`` before ``backend``, which makes the calls and is closed with this."""

    def __init__(self, backend: RowBackend, clock: Clock) -> None:
        self._backend = backend
        self._clock = clock
        self._lanes: dict[tuple[str, str], _Lane] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def infer(self, version: ModelVersionSpec, rows: Sequence[Row]) -> Sequence[Answer]:
        """See ``ModelBackend.infer``."""
        batch, backend = version.policy.batch, version.backend
        if batch is None or len(rows) != 1 or not isinstance(backend, HttpBackend):
            return await self._backend.infer(version, rows)
        lane = self._lane(version, backend, batch)
        if lane.calls >= lane.calls_max:
            return (await self._in_turn(lane, rows[0]),)
        lane.calls += 1
        lane.rows.observe(1)
        try:
            return await self._backend.infer(version, rows)
        finally:
            self._returned(lane)

    def refusal(self, version: ModelVersionSpec) -> Answer | None:
        """See ``ModelBackend.refusal``."""
        return self._backend.refusal(version)

    def _lane(self, version: ModelVersionSpec, backend: HttpBackend, batch: BatchPolicy) -> _Lane:
        key = (version.model, version.version)
        lane = self._lanes.get(key)
        if lane is not None:
            if lane.version is version:
                return lane
            if lane.version == version:
                # Another revision holds the same version: its spec is equal, and from now on identical.
                lane.version = version
                return lane
        while len(self._lanes) >= _LANES_MAX:
            del self._lanes[next(iter(self._lanes))]
        fresh = self._lanes[key] = _Lane(version, backend, batch)
        return fresh

    async def _in_turn(self, lane: _Lane, row: Row) -> Answer:
        """The row's answer from a call that begins when another returns; at its deadline, that there is none."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(row, loop.create_future())
        remaining_ms = row.deadline_ms - self._clock.now_ms()
        if remaining_ms <= 0:
            return self._expired(lane, waiting)
        waiting.timer = loop.call_later(remaining_ms / 1000, self._expire, lane, waiting)
        lane.waiting.append(waiting)
        try:
            return await waiting.answer
        finally:
            waiting.timer.cancel()

    def _expire(self, lane: _Lane, waiting: _Waiting) -> None:
        waiting.settle(self._expired(lane, waiting))

    def _expired(self, lane: _Lane, waiting: _Waiting) -> Answer:
        if waiting.sent_ms is None:
            said = f"the deadline had passed before {lane.title} was called"
            return Answer(None, Problem(Code.DEADLINE_EXCEEDED, said), (), b"")
        started_ms, started, rows = waiting.sent_ms
        latency_ms = self._clock.steady_ms() - started
        said = f"{lane.title} had not answered by the deadline, after {latency_ms:.0f} ms"
        # Which of the endpoints has it, only the call knows, and that is still under way.
        attempt = Attempt(lane.endpoints, started_ms, latency_ms, "deadline", rows)
        sent = self._backend.request_of(lane.version, waiting.row)
        return Answer(None, Problem(Code.DEADLINE_EXCEEDED, said), (attempt,), sent)

    def _returned(self, lane: _Lane) -> None:
        """A call has ended: the rows that have gathered go."""
        lane.calls -= 1
        if lane.waiting:
            now_ms = self._clock.now_ms()
            for each in lane.waiting:
                if each.row.deadline_ms <= now_ms:
                    # Its timer is late, as in a loop that has much to do: expired work is never sent.
                    self._expire(lane, each)
            lane.waiting = [each for each in lane.waiting if not each.answer.done()]
        if self._closed:
            _give_up(lane, lane.waiting)
            lane.waiting = []
        while lane.waiting and lane.calls < lane.calls_max:
            together = set(sharing([each.row for each in lane.waiting], lane.rows_max))
            gathered = [each for place, each in enumerate(lane.waiting) if place in together]
            lane.waiting = [each for place, each in enumerate(lane.waiting) if place not in together]
            lane.calls += 1
            # A task of its own: whoever waits for one of the rows may be cancelled, and the call goes on.
            task = asyncio.create_task(self._call(lane, gathered))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _call(self, lane: _Lane, gathered: Sequence[_Waiting]) -> None:
        count = len(gathered)
        lane.rows.observe(count)
        sent_ms = self._clock.now_ms(), self._clock.steady_ms(), count
        for each in gathered:
            each.sent_ms = sent_ms
        # The call may take as long as the most patient of its rows; each of the others has its own timer.
        until_ms = max(each.row.deadline_ms for each in gathered)
        rows = [replace(each.row, deadline_ms=until_ms) for each in gathered]
        try:
            answers = await self._backend.infer(lane.version, rows)
            apart = []
            for each, answer in zip(gathered, answers, strict=True):
                if _may_be_anothers(answer):
                    apart.append(self._alone(lane, each, answer))
                else:
                    each.settle(answer)
            if apart:
                await asyncio.gather(*apart)
        except Exception as error:  # there is nobody else to whom this could be raised
            log.exception("model_call_failed", model=lane.version.model, version=lane.version.version, rows=count)
            problem = Problem(Code.MODEL_ERROR, f"{lane.title} could not be called: {error!r}")
            for each in gathered:
                each.settle(Answer(None, problem, (), b""))
        finally:
            _give_up(lane, gathered)
            self._returned(lane)

    async def _alone(self, lane: _Lane, waiting: _Waiting, shared: Answer) -> None:
        """Ask again for one row of a call that failed; what it tried before stays told."""
        if waiting.answer.done():
            return
        if waiting.timer is not None:
            # From here the call is the row's own, and ends by its deadline.
            waiting.timer.cancel()
        answer = await self._backend.infer_once(lane.version, waiting.row)
        waiting.settle(replace(answer, attempts=(*shared.attempts, *answer.attempts), sent=answer.sent or shared.sent))

    async def close(self) -> None:
        """Release connections; calls under way are given up, and later ones answered as unavailable."""
        self._closed = True
        await self._backend.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _give_up(lane: _Lane, waiting: Sequence[_Waiting]) -> None:
    """Answer whoever is left: nobody is, unless a call was cancelled because this is closed."""
    for each in waiting:
        problem = Problem(Code.MODEL_UNAVAILABLE, f"{lane.title} had not answered when its worker stopped")
        each.settle(Answer(None, problem, (), b""))


def _may_be_anothers(answer: Answer) -> bool:
    """Whether a row's problem may have been brought upon its call by another row."""
    if answer.problem is None or not answer.attempts or answer.attempts[-1].rows == 1:
        return False
    return answer.problem.code is Code.MODEL_OUTPUT_INVALID or answer.attempts[-1].outcome in _ROWS_AT_FAULT
