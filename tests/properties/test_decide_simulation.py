"""The promises under everything that can go wrong, simulated: whole histories, found and shrunk by hypothesis.

Two workers share two partitions. Writes get lost, go unacknowledged or take long; workers die before or after any
write, come back and share anew; callers repeat themselves, contradict themselves and send nonsense; pools answer late,
twice or never, some past their policy's time and long before the request's. Then everything heals, and what the log
holds is held against the promises. Time is virtual and nothing is random but hypothesis, so a printed history is the
whole bug.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterator

import orjson
import pytest
import structlog
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from app.adapters.record_codec import EntryState, read_entry_header
from app.adapters.task_codec import decode_task
from app.agents.decider import CATCH_UP_MS
from app.agents.tasks import VERSION_SHARE
from app.domain.decisions import DecisionRecord, Kind
from app.domain.dispatch import TaskStatus
from app.domain.errors import Code, Problem
from app.domain.rollout_stats import UNACKNOWLEDGED, UNATTENDED
from tests.support.decide_world import (
    AUDIT,
    JOINS,
    REPLIES,
    REQUESTS,
    TASKS,
    World,
    every_route,
    header,
    held_by,
    recorded_in,
)
from tests.support.memory_log import Fate, Stored
from tests.support.virtual_time import VirtualLoop

IDS = ("a", "b", "c")
WORKERS = ("one", "two")
ROUTES = (
    "/inline",
    "/queued",
    "/mixed",
    "/pair",
    "/optional",
    "/standby",
    "/standin",
    "/fixed",
    "/quorum",
    "/first",
    "/chain",
    "/doubtful",
    "/shadowed",
    "/silent",
    "/patient",
    "/unheard",
    "/crossed",
)
SETTLED_WITHIN_S = 12.0
REVISION = every_route()

names = st.sampled_from(WORKERS)
# What a frozen process held has a test of its own (test_decider): the log's last entry is not the table's there.
fates = st.lists(st.sampled_from([fate for fate in Fate if fate is not Fate.HELD]), min_size=1, max_size=6)
troubles = st.lists(st.sampled_from((Fate.WRITTEN, Fate.SLOW, Fate.LOST, Fate.UNACKNOWLEDGED)), min_size=5, max_size=20)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Thousands of histories would be told line by line."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


class Decide(RuleBasedStateMachine):
    """Rules are what the outside does; time passes between them, or does not."""

    @initialize(routes=st.tuples(*(st.sampled_from(ROUTES) for _ in IDS)), pending_max=st.sampled_from((1, 2, 100)))
    def begin(self, routes: tuple[str, ...], pending_max: int) -> None:
        """Two workers, a partition each. Each id is of one route, as a caller's would be."""
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        self.routes = dict(zip(IDS, routes, strict=True))
        self.sent: dict[str, Stored] = {}
        self.runner.run(self._begin(pending_max))

    async def _begin(self, pending_max: int) -> None:
        self.world = World(REVISION, {"joins_pending_max": pending_max})
        await self.world.start("one", [0])
        await self.world.start("two", [1])

    @property
    def alive(self) -> list[str]:
        """The workers that live."""
        return [name for name in WORKERS if self.world.processes[name].alive]

    # --- what callers and pools do ------------------------------------------------------------------------------------

    @rule(request_id=st.sampled_from(IDS), amount=st.sampled_from([1.0, 1.0, 1.0, 30.0, 20_000.0, -1.0]))
    def send(self, request_id: str, amount: float) -> None:
        """A request; with an amount that was not the id's first, a contradiction."""
        correlation = f"c{len(self.sent)}"
        self.sent[correlation] = self.world.send(
            request_id, self.routes[request_id], amount=amount, correlation=correlation
        )
        self.step(0)

    @rule(nonsense=st.sampled_from([b"", b"{", b"[]", b'{"path":"/nowhere"}', b'{"path":1}', b"\xc3\x01", b"\x00"]))
    def send_nonsense(self, nonsense: bytes) -> None:
        """Bytes that are no request, or one to nowhere, under no id."""
        correlation = f"c{len(self.sent)}"
        self.sent[correlation] = self.world.send(None, correlation=correlation, value=nonsense)
        self.step(0)

    @precondition(lambda self: self.world.log.records(TASKS))
    @rule(data=st.data(), failed=st.booleans())
    def answer(self, data: st.DataObject, failed: bool) -> None:
        """A pool answers some task, perhaps again."""
        tasks = self.world.tasks()
        task = tasks[data.draw(st.integers(0, len(tasks) - 1), "task")]
        self.world.answer(task, problem=Problem(Code.MODEL_ERROR, "no") if failed else None)
        self.step(0)

    @precondition(lambda self: self.world.log.records(TASKS))
    @rule(pause=st.sampled_from([0, 1, 2, 60]), backwards=st.booleans())
    def answer_all(self, pause: int, backwards: bool) -> None:
        """A pool answers everything there is, one task after the other."""
        tasks = self.world.tasks()
        for task in reversed(tasks) if backwards else tasks:
            self.world.answer(task)
            self.step(pause)

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    @rule(name=names, coming=fates)
    def arm(self, name: str, coming: list[Fate]) -> None:
        """A worker's next writes go as told."""
        self.world.processes[name].arm(*coming)

    @rule(name=names, coming=troubles)
    def trouble(self, name: str, coming: list[Fate]) -> None:
        """A worker's broker is unwell for a while."""
        self.world.processes[name].arm(*coming)

    @precondition(lambda self: self.alive)
    @rule(name=names)
    def kill(self, name: str) -> None:
        """kill -9."""
        self.world.processes[name].kill()
        self.runner.run(self.world.processes[name].gone())

    @precondition(lambda self: not self.alive)
    @rule(name=names)
    def start(self, name: str) -> None:
        """Nobody is left, so somebody comes."""
        self.runner.run(self._share(name, name, name))

    @rule(name=names, first=names, second=names)
    def share(self, name: str, first: str, second: str) -> None:
        """A dead worker comes back, or a living one stays; either way the partitions are given out anew."""
        self.runner.run(self._share(name, first, second))

    async def _share(self, name: str, first: str, second: str) -> None:
        if not self.world.processes[name].alive:
            await self.world.processes[name].gone()
            await self.world.start(name, ())
        alive = self.alive
        owners = {0: first if first in alive else alive[0], 1: second if second in alive else alive[-1]}
        await self.world.rebalance(owners)

    @rule(milliseconds=st.sampled_from([1, 2, 3, 5, 20, 60, 80, 150, 400, CATCH_UP_MS]))
    def step(self, milliseconds: int) -> None:
        """Time passes."""
        self.runner.run(asyncio.sleep(milliseconds / 1000))
        assert not self.world.faults

    # --- what must be true in the end ---------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Everything heals and settles; then the log is held against the promises."""
        if not hasattr(self, "world"):
            return
        try:
            self.runner.run(self._heal())
            self._judge()
        finally:
            self.runner.run(self.world.close())
            self.runner.close()

    async def _heal(self) -> None:
        for process in self.world.processes.values():
            process.publisher.fates.clear()
        await self._share("one", "one", "one")
        await asyncio.sleep(0.1)
        for task in self.world.tasks():
            self.world.answer(task)
        await asyncio.sleep(SETTLED_WITHIN_S)

    def _judge(self) -> None:
        world = self.world
        assert not world.faults
        audits = [(s.order, recorded_in(s.record.value or b""), s.record.value) for s in world.log.records(AUDIT)]
        decisions: dict[str, DecisionRecord] = {}
        versions: dict[str, set[bytes | None]] = defaultdict(set)
        audited_at: dict[str, int] = {}
        for order, record, value in audits:
            versions[record.execution_id].add(value)
            audited_at.setdefault(record.execution_id, order)
            if record.kind is Kind.DECISION:
                first = decisions.setdefault(record.request_id, record)
                assert first.execution_id == record.execution_id, f"{record.request_id} was decided twice"
        assert all(len(bytes_) == 1 for bytes_ in versions.values()), "one audit record, in two versions"
        self._judge_replies(decisions, audited_at)
        self._judge_tasks()
        self._judge_versions(decisions)
        self._judge_end(decisions)

    def _judge_replies(self, decisions: dict[str, DecisionRecord], audited_at: dict[str, int]) -> None:
        answered: dict[str, set[bytes | None]] = defaultdict(set)
        entered_at = self._entered_at()
        for reply in self.world.log.records(REPLIES):
            execution_id = header(reply.record, "execution-id") or ""
            answered[header(reply.record, "kafka_correlationId") or ""].add(reply.record.value)
            assert audited_at.get(execution_id, reply.order) < reply.order, "a reply before its audit record"
            decided = decisions[header(reply.record, "request-id") or ""]
            if decided.execution_id == execution_id:
                assert entered_at[execution_id] < reply.order, "a reply before its entry"
                assert reply.record.value == decided.reply
        for correlation, stored in self.sent.items():
            assert len(answered[correlation]) == 1, f"{correlation} got {len(answered[correlation])} different replies"
            (value,) = answered[correlation]
            members = orjson.loads(value or b"")
            decided = decisions[members["request_id"]]
            same = stored.record.value == decided.source.value
            conflict = any(error["code"] == Code.REQUEST_ID_CONFLICT for error in members["errors"])
            assert (value == decided.reply) is same
            assert conflict is not same

    def _entered_at(self) -> dict[str, int]:
        entered: dict[str, int] = {}
        for stored in self.world.log.records(JOINS):
            held = held_by(stored.record.value or b"")
            if not held.pending:
                entered.setdefault(held.execution_id, stored.order)
        return entered

    def _judge_tasks(self) -> None:
        for stored in self.world.log.records(TASKS):
            assert stored.time_ms < decode_task(stored.record.value or b"").row.deadline_ms, "expired work was sent"

    def _judge_versions(self, decisions: dict[str, DecisionRecord]) -> None:
        """Each answer is recorded as of the version that gave it, and no pool was given up before its time."""
        versions = REVISION.versions
        for record in decisions.values():
            for task in (each for one in record.tasks for each in (*one.earlier, one)):
                result = task.result
                assert result is not None
                if result.status is TaskStatus.OK:
                    assert result.attempts[-1].endpoint.rpartition(" ")[2] == task.version
                if result.attempts and result.attempts[-1].endpoint == TASKS:
                    asked = result.attempts[-1]
                    assert record.decided_ms is not None
                    assert record.decided_ms >= asked.started_ms + result.latency_ms
                    if result.status is TaskStatus.SKIPPED:
                        assert asked.outcome in ("cancelled", UNATTENDED, UNACKNOWLEDGED)
                    else:
                        assert asked.outcome in ("timeout", "deadline", UNATTENDED, UNACKNOWLEDGED)
                        failed = TaskStatus.ERROR if asked.outcome == UNACKNOWLEDGED else TaskStatus.TIMEOUT
                        assert result.status in (failed, TaskStatus.TIMEOUT, TaskStatus.DEFAULTED)
                        left_ms = record.deadline_ms - asked.started_ms
                        # Whoever has something to go on with is given up earlier.
                        early = asked.outcome in ("timeout", UNACKNOWLEDGED)
                        share_ms = round(left_ms * VERSION_SHARE) if early else left_ms
                        assert result.latency_ms >= min(versions[task.model, task.version].policy.timeout, share_ms)
                assert len({task.version, *(each.version for each in task.earlier)}) == len(task.earlier) + 1

    def _judge_end(self, decisions: dict[str, DecisionRecord]) -> None:
        """Nothing is left: no join waits, nor does who handles a record, and all that was sent is acknowledged."""
        for process in self.world.processes.values():
            assert process.handling == 0, f"{process.name} waits for what nobody ends"
        latest = {s.record.key: s.record.value for s in self.world.log.records(JOINS)}
        for entry in latest.values():
            assert read_entry_header(entry or b"").state is EntryState.COMPLETED
        assert len(latest) == len(decisions)
        for partition, lane in enumerate(self.world.log.topics[REQUESTS]):
            assert self.world.committed.get((REQUESTS, partition), 0) == len(lane)


TestDecide = Decide.TestCase
TestDecide.settings = settings(
    max_examples=150,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
