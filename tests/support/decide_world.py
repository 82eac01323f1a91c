"""A small world for the decide engine: Kafka in memory, workers that can die at any write, a pool, a model, a clock.

A ``DecideProcess`` is what ``app.main`` wires, over doubles of what is outside the process: the real admission,
decider, ledger, join and acknowledgements. The log and the committed offsets outlive it; all else dies with it. The
world judges as it goes: an offset may be acknowledged only once its outcome is durable, and nothing may crash a worker.
"""

import asyncio
import functools
import itertools
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import orjson

from app.adapters.record_codec import EntryState, decode_record, entry_record, read_entry_header
from app.adapters.request_codec import RequestDecoder
from app.adapters.task_codec import QueuedTask, decode_result, decode_task, encode_result
from app.agents.admission import Admission
from app.agents.decider import Decider
from app.agents.ledger import Ledger
from app.agents.shadows import Shadows
from app.agents.skew import SkewGuard
from app.agents.tasks import Tasks
from app.agents.timers import Timers
from app.domain.acks import OrderedAcks
from app.domain.decisions import DecisionRecord, Kind, TaskRecord
from app.domain.dispatch import Answer, Attempt, Row, TaskStatus
from app.domain.errors import Code, NotOwner, Problem
from app.domain.on_demand import FeatureFunction
from app.domain.registry import Revision
from app.domain.requests import Headers, InboundRecord
from app.domain.version_documents import ModelVersionSpec
from app.ports.clock import Clock
from app.ports.log import OutboundRecord
from app.settings import Settings
from tests.support.memory_feature_store import MemoryFeatureStore
from tests.support.memory_log import Fate, MemoryLog, MemoryPublisher, MemoryTable, Stored
from tests.support.registry_documents import document, model_version, reasons, revision, route, task
from tests.support.virtual_time import VirtualClock

REQUESTS: Final = "inference.requests"
RESULTS: Final = "inference.results"
TASKS: Final = "inference.tasks.default"
AUDIT: Final = "inference.audit"
JOINS: Final = "decide-joins-changelog"
REPLIES: Final = "my.replies"
DEAD: Final = "inference.requests-dlt"
TOPICS: Final = (REQUESTS, RESULTS, TASKS, AUDIT, JOINS, REPLIES, DEAD, "secrets")
COMMIT_EVERY_S: Final = 0.05
SILENT: Final = ("silent", "patient", "unheard", "lonely", "remembered", "crossed", "both", "follow")
"""Routes whose pools have less time than the 5 s of their requests: 80 ms, 60 ms, or 3 s."""


def documents() -> list[dict[str, Any]]:
    """Routes of every shape: inline, queued, both; required, optional and defaulted; a view, a pool without a topic.

    And of every order and end: tasks after tasks, versions that stand in, quorums, shadows. Versions 1, 4 are inline,
    2 is queued, 3 is in a pool without a topic, 5 is inline and expired; 6 and 7 are queued and have little
    time, 8 has much.
    """
    here: dict[str, Any] = {"select": {"version": "1"}}
    there: dict[str, Any] = {"select": {"version": "2"}}
    nowhere: dict[str, Any] = {"select": {"version": "3"}}
    hurried: dict[str, Any] = {"version": "6"}
    doubtful = {"when": "outputs.pd.probability > 0.1"}
    sure = {"when": "outputs.pd.probability > 1.0"}
    rule: dict[str, dict[str, Any]] = {
        "quorum": {"join": {"policy": "quorum", "n": 2}},
        "first": {"join": {"policy": "first"}},
        "ageing": {"join": {"policy": "quorum", "n": 2}},
        "reasoned": {"reasons": reasons(HIGH="result.probability > 0.2", NEVER="false", ALWAYS="true")},
    }
    shapes: dict[str, tuple[list[dict[str, Any]], dict[str, str]]] = {
        "inline": ([task(**here)], {"probability": "outputs.pd.probability"}),
        "queued": ([task(**there)], {"probability": "outputs.pd.probability"}),
        "mixed": ([task(**here), task(name="late", **there)], {"sum": "outputs.pd.probability"}),
        "pair": ([task(**there), task(name="late", **there)], {}),
        "optional": ([task(**here), task(name="extra", need="optional", **there)], {}),
        "defaulted": (
            [task(need="default", default={"probability": 0.5}, **here)],
            {"probability": "outputs.pd.probability"},
        ),
        "unserved": ([task(**nowhere)], {}),
        "broken": ([task(**here)], {"impossible": "outputs.pd.probability + inputs.absent"}),
        "standby": (
            [task(fallback=[{"version": "2"}], **here), task(name="late", **there)],
            {"probability": "outputs.pd.probability"},
        ),
        "standin": ([task(fallback=[{"version": "3"}, {"version": "4"}], **there)], {}),
        "fixed": (
            [task(fallback=[{"version": "4"}, {"default": {"probability": 0.5}}], **here)],
            {"probability": "outputs.pd.probability"},
        ),
        "expired": ([task(select={"version": "5"}, fallback=[{"alias": "champion"}])], {}),
        "withdrawn": ([task(select={"version": "5"}, fallback=[{"alias": "champion"}], onUnavailable="reject")], {}),
        "quorum": ([task(**here), task(name="b", **there), task(name="c", **there)], {}),
        "first": ([task(**here), task(name="b", **there)], {}),
        "chain": (
            [task(**there), task(name="b", after=["pd"], **here), task(name="c", after=["b"], **there)],
            {"probability": "outputs.c.probability"},
        ),
        "doubtful": (
            [task(**here), task(name="b", after=["pd"], **doubtful, **there)],
            {"probability": "has(outputs.b) ? outputs.b.probability : outputs.pd.probability"},
        ),
        "sure": (
            [task(**here), task(name="b", after=["pd"], **sure, **there)],
            {"probability": "has(outputs.b) ? outputs.b.probability : outputs.pd.probability"},
        ),
        "follower": (
            [task(need="optional", **here), task(name="b", need="optional", after=["pd"], **here)],
            {},
        ),
        "reasoned": ([task(**here)], {"probability": "outputs.pd.probability"}),
        "unasked": (
            [
                task(**here),
                task(name="b", after=["pd"], when="outputs.pd.probability > 1.0", shadow=[{"version": "4"}], **here),
            ],
            {},
        ),
        "repeated": ([task(fallback=[{"alias": "champion"}, {"version": "4"}], **here)], {}),
        "ageing": ([task(select={"version": "5"}), task(name="b", **here), task(name="c", **here)], {}),
        "undefined": ([task(**here)], {"impossible": "outputs.pd.probability / 0.0", "list": "[1.0]"}),
        "mute": ([task(shadow=[{"version": "4"}], **here)], {}),
        "pooled": ([task(shadow=[{"version": "2"}], **here)], {"high": "outputs.pd.probability > 0.4"}),
        "silent": ([task(select=hurried, fallback=[{"version": "4"}])], {"probability": "outputs.pd.probability"}),
        "patient": (
            [task(select=hurried, fallback=[{"version": "7"}, {"version": "4"}]), task(name="b", **here)],
            {"probability": "outputs.pd.probability"},
        ),
        "unheard": ([task(select=hurried, need="default", default={"probability": 0.5})], {}),
        "lonely": ([task(select=hurried)], {}),
        "remembered": ([task(select={"version": "8"}, fallback=[{"version": "4"}])], {}),
        "crossed": ([task(**here), task(name="b", select=hurried, fallback=[{"version": "4"}])], {}),
        "both": (
            [task(fallback=[{"version": "6"}, {"version": "4"}], **here), task(name="b", select=hurried)],
            {"probability": "outputs.pd.probability"},
        ),
        "follow": ([task(select=hurried, need="optional"), task(name="b", after=["pd"], when="true", **here)], {}),
        "shadowed": (
            [task(shadow=[{"version": "4", "segment": 'inputs.amount > 1000.0 ? "large" : "small"'}], **here)],
            {"high": "outputs.pd.probability > 0.4"},
        ),
    }
    return [
        document("Model", "credit-pd", {"owner": "risk", "aliases": {"champion": "1"}}),
        model_version("1"),
        model_version("2", backend={"type": "kafka", "pool": "default"}, policy={"timeout": "1s"}),
        model_version("3", backend={"type": "kafka", "pool": "nobody"}),
        model_version("4"),
        model_version("5", governance={"approvedBy": "model-risk", "validUntil": "2025-01-01"}),
        model_version("6", backend={"type": "kafka", "pool": "default"}, policy={"timeout": "80ms"}),
        model_version("7", backend={"type": "kafka", "pool": "default"}, policy={"timeout": "60ms"}),
        model_version("8", backend={"type": "kafka", "pool": "default"}, policy={"timeout": "3s"}),
        document(
            "FeatureView",
            "applicant",
            {
                "entities": [{"name": "applicant_id", "type": "INT64"}],
                "features": [{"name": "age", "type": "INT64"}],
                "source": {"type": "redis", "project": "credit"},
            },
        ),
        *(
            route(
                name,
                f"/{name}",
                deadline="5s" if name in SILENT else "400ms",
                rules=[{"name": "default", "tasks": tasks, "result": result, **rule.get(name, {})}],
            )
            for name, (tasks, result) in shapes.items()
        ),
        route(
            "choosy",
            "/choosy",
            rules=[{"name": "rich", "when": "inputs.amount > 1000.0", "tasks": [task(**here)], "result": {}}],
        ),
    ]


class FixedRegistry:
    """A ``Registry`` with one revision, or none."""

    def __init__(self, current: Revision | None) -> None:
        self.current = current
        self.blank = current is None
        self.healthy = True

    def get(self, revision_id: str) -> Revision | None:
        """See ``Registry``."""
        return self.current if self.current is not None and self.current.id == revision_id else None


class ScriptedModel:
    """A ``ModelBackend`` that takes as many virtual milliseconds as the amount says, and never answers twice alike.

    So two decisions for one request would differ in their bytes. A negative amount is an error, one above 10,000 hangs,
    past the row's deadline too.
    """

    def __init__(self, clock: Clock, numbers: "itertools.count[int]") -> None:
        self._clock = clock
        self._numbers = numbers
        self.calls: list[tuple[str, str]] = []
        self.ejected: set[str] = set()

    async def infer(self, version: ModelVersionSpec, rows: Sequence[Row]) -> Sequence[Answer]:
        """See ``ModelBackend``."""
        (row,) = rows
        self.calls.append((row.request_id, row.task))
        amount = row.values["amount"]
        assert isinstance(amount, float)
        attempt = Attempt(f"scripted {version.version}", self._clock.now_ms(), 0.0, "ok")
        if amount < 0:
            return (Answer(None, Problem(Code.MODEL_ERROR, "negative"), (attempt,), b""),)
        if amount > 10_000:
            await asyncio.get_running_loop().create_future()
        given_ms = row.deadline_ms - self._clock.now_ms()
        await asyncio.sleep(min(amount, given_ms) / 1000)
        if amount > given_ms:
            late = replace(attempt, latency_ms=float(given_ms), outcome="deadline")
            return (Answer(None, Problem(Code.DEADLINE_EXCEEDED, "too late"), (late,), b"row"),)
        return (Answer({"probability": probability(next(self._numbers))}, None, (attempt,), b"row"),)

    def refusal(self, version: ModelVersionSpec) -> Answer | None:
        """See ``ModelBackend``."""
        if version.version not in self.ejected:
            return None
        attempt = Attempt(f"scripted {version.version}", self._clock.now_ms(), 0.0, "ejected")
        return Answer(None, Problem(Code.MODEL_EJECTED, "out"), (attempt,), b"")

    async def close(self) -> None:
        """See ``ModelBackend``."""


def probability(number: int) -> float:
    """A different output for each number."""
    return 1 / (number + 2)


class World:
    """What outlives processes, and the processes."""

    def __init__(
        self,
        registry: Revision | None,
        settings: Mapping[str, Any] | None = None,
        functions: Mapping[str, FeatureFunction] | None = None,
    ) -> None:
        self.functions = functions or {}
        self.loop = asyncio.get_running_loop()
        self.clock = VirtualClock(self.loop)
        self.log = MemoryLog(self.clock, TOPICS)
        self.registry = FixedRegistry(registry)
        self.features = MemoryFeatureStore()
        self.settings = Settings.model_validate(
            {"reply_topics_allowed": ["*replies"], "shadows_in_flight_max": 4, **(settings or {})}
        )
        self.numbers = itertools.count()
        self.model = ScriptedModel(self.clock, self.numbers)
        self.committed: dict[tuple[str, int], int] = {}
        self.processes: dict[str, DecideProcess] = {}
        self.faults: list[str] = []
        self.skew: SkewGuard | None = None
        self._ids = itertools.count()

    def new_id(self) -> str:
        """An execution id."""
        return f"execution-{next(self._ids)}"

    # --- processes ----------------------------------------------------------------------------------------------------

    async def start(self, name: str, owned: Sequence[int] = (0, 1)) -> "DecideProcess":
        """Start a process that is given ``owned``, alone."""
        process = self.processes[name] = DecideProcess(self, name)
        process.revoke()
        process.assign(frozenset(owned))
        return process

    async def rebalance(self, owners: Mapping[int, str]) -> None:
        """Give each partition to a living process; records flow again a little before tables have settled."""
        alive = [process for process in self.processes.values() if process.alive]
        for process in alive:
            process.revoke()
        await asyncio.sleep(0.005)
        for process in alive:
            if process.alive:
                process.assign(frozenset(partition for partition, name in owners.items() if name == process.name))
                await asyncio.sleep(0.001)

    async def close(self) -> None:
        """End every process."""
        for process in self.processes.values():
            process.kill()
            await process.gone()

    # --- callers and pools --------------------------------------------------------------------------------------------

    def send(
        self,
        request_id: str | None,
        path: str = "/inline",
        *,
        amount: object = 5.0,
        correlation: str = "c",
        reply_to: str | None = REPLIES,
        value: bytes | None = None,
        headers: Headers = (),
    ) -> Stored:
        """Append a request; ``value`` in place of a body made of the other arguments."""
        body: dict[str, Any] = {"path": path, "entities": {"applicant_id": 17}, "inputs": {"amount": amount}}
        address: Headers = () if reply_to is None else (("kafka_replyTopic", reply_to.encode()),)
        named: Headers = () if request_id is None else (("request-id", request_id.encode()),)
        every = (*named, *address, ("kafka_correlationId", correlation.encode()), *headers)
        record = OutboundRecord(
            REQUESTS, orjson.dumps(body) if value is None else value, (request_id or correlation).encode(), None, every
        )
        return self.log.append(record)

    def tasks(self) -> list[QueuedTask]:
        """The tasks that were sent to the pool, repetitions too."""
        return [decode_task(stored.record.value or b"") for stored in self.log.records(TASKS)]

    def answer(
        self,
        queued: QueuedTask,
        *,
        problem: Problem | None = None,
        task: str | None = None,
        score: float | None = None,
        called: bool = True,
    ) -> Stored:
        """A pool worker's answer to a task: ``score``, or the next number's; ``called``: whether the model was."""
        given = probability(next(self.numbers)) if score is None else score
        outputs = None if problem is not None else {"probability": given}
        attempt = Attempt(f"pool {queued.version}", self.clock.now_ms(), 1.0, "ok")
        answer = Answer(outputs, problem, (attempt,) if called else (), b"")
        value = encode_result(
            queued.row.request_id,
            task or queued.row.task,
            answer,
            latency_ms=1.0,
            instance="pool",
            execution_id=queued.row.execution_id,
            version=queued.version,
        )
        key = queued.row.request_id.encode()
        return self.log.append(OutboundRecord(RESULTS, value, key, queued.results_partition))

    # --- what came of it ----------------------------------------------------------------------------------------------

    def replies(self, correlation: str | None = None) -> list[Stored]:
        """The replies, or those to one correlation id."""
        found = self.log.records(REPLIES)
        if correlation is None:
            return found
        return [reply for reply in found if header(reply.record, "kafka_correlationId") == correlation]

    def reply(self, correlation: str = "c") -> dict[str, Any]:
        """The members of the one reply to a correlation id; several must be the same bytes."""
        (value,) = {reply.record.value for reply in self.replies(correlation)}
        members: dict[str, Any] = orjson.loads(value or b"")
        return members

    def audits(self) -> list[DecisionRecord]:
        """The audit records, in the order they were written."""
        return [recorded_in(stored.record.value or b"") for stored in self.log.records(AUDIT)]

    def entries(self, request_id: str) -> list[EntryState | None]:
        """The states that a request id's entry went through; None: deleted."""
        return [
            None if stored.record.value is None else read_entry_header(stored.record.value).state
            for stored in self.log.records(JOINS)
            if stored.record.key == request_id.encode()
        ]

    # --- judgements on the way ----------------------------------------------------------------------------------------

    def judge_acknowledged(self, record: InboundRecord) -> None:
        """A request that is acknowledged has a durable outcome; a result is in its join, or of no use any more."""
        if record.topic == REQUESTS and not self._has_outcome(record):
            self.faults.append(f"{record.position} was acknowledged without an outcome")
        if record.topic == RESULTS:
            result = decode_result(record.value or b"")
            entry = self._entry(record.partition, result.request_id)
            if entry is None or read_entry_header(entry).state is not EntryState.PENDING:
                return
            held = held_by(entry)
            if held.execution_id != result.execution_id:
                return
            asked = (result.task, result.version)
            if any((task.name, task.version) == asked and is_out(task) for task in held.tasks):
                self.faults.append(f"{record.position} was acknowledged, and its join does not hold it")

    def _entry(self, partition: int, request_id: str) -> bytes | None:
        found = [s for s in self.log.topics[JOINS][partition] if s.record.key == request_id.encode()]
        return found[-1].record.value if found else None

    def _has_outcome(self, record: InboundRecord) -> bool:
        for stored in self.log.records(JOINS):
            if stored.record.value is not None:
                held = held_by(stored.record.value)
                if (held.source.partition, held.source.offset) == (record.partition, record.offset):
                    return True
                # A duplicate's outcome is the one that its request has, once it is decided.
                same = held.request_id.encode() in (value for name, value in record.headers if name == "request-id")
                if same and not held.pending:
                    return True
        audits = (recorded_in(stored.record.value or b"") for stored in self.log.topics[AUDIT][record.partition])
        return any(audit.source.offset == record.offset for audit in audits if audit.kind is Kind.REFUSAL)


def is_out(task: TaskRecord) -> bool:
    """Whether a task of a pending join is still to be answered."""
    return task.result is None or task.result.status is TaskStatus.PENDING


@functools.lru_cache(maxsize=256)
def held_by(entry: bytes) -> DecisionRecord:
    """The record in an entry of the joins table."""
    return decode_record(entry_record(entry))


@functools.lru_cache(maxsize=256)
def recorded_in(value: bytes) -> DecisionRecord:
    """The record in an audit record."""
    return decode_record(value)


def header(record: OutboundRecord, name: str) -> str | None:
    """A header's text, or None."""
    return next((value.decode() for key, value in record.headers if key == name), None)


@dataclass(slots=True)
class _Cursor:
    """What a process has taken of one partition since it was given it."""

    position: int
    acks: OrderedAcks[InboundRecord] = field(default_factory=OrderedAcks)


class DecideProcess:
    """One decide worker, from its start to its death."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self.name = name
        self.alive = True
        self._tasks: set[asyncio.Task[None]] = set()
        self._handling = 0
        self._cursors: dict[tuple[str, int], _Cursor] = {}
        self.publisher = MemoryPublisher(world.log, kill=self.kill)
        self.table = MemoryTable(world.log, JOINS, self.publisher)
        ledger = Ledger(
            table=self.table, replies=self.publisher, settings=world.settings, clock=world.clock, group="decide"
        )
        timers = Timers(world.clock)
        self.decider = Decider(
            admission=Admission(RequestDecoder(), self.publisher, world.settings),
            ledger=ledger,
            registry=world.registry,
            tasks=Tasks(
                ledger=ledger,
                features=world.features,
                backend=world.model,
                replies=self.publisher,
                timers=timers,
                clock=world.clock,
                settings=world.settings,
                functions=world.functions,
                skew=world.skew,
            ),
            shadows=Shadows(
                backend=world.model,
                ledger=ledger,
                replies=self.publisher,
                clock=world.clock,
                settings=world.settings,
                skew=world.skew,
            ),
            timers=timers,
            clock=world.clock,
            new_id=world.new_id,
            settings=world.settings,
            instance=name,
            on_crash=self._on_crash,
        )
        self._spawn(self.decider.run_timers())
        self._spawn(self._commit_now_and_then())
        world.log.listeners.append(self._take)

    async def _on_crash(self, error: BaseException) -> None:
        self._world.faults.append(f"{self.name} crashed: {error!r}")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._world.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- life ---------------------------------------------------------------------------------------------------------

    def arm(self, *fates: Fate) -> None:
        """Decide what becomes of the next writes."""
        self.publisher.fates.extend(fates)

    def kill(self) -> None:
        """Die at once: nothing is written, committed or finished from here on."""
        if self.alive:
            self.alive = False
            self.publisher.dead = True
            self._world.log.listeners.remove(self._take)
            for task in (*self._tasks, *self.decider._background):
                task.cancel()

    async def gone(self) -> None:
        """Wait until nothing of a dead process runs."""
        await self.decider.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def revoke(self) -> None:
        """A rebalance begins: commit what is finished, and take nothing more."""
        self._commit()
        self.table.revoke()
        self._cursors = {}

    def assign(self, owned: frozenset[int]) -> None:
        """A rebalance ends."""
        for topic in (REQUESTS, RESULTS):
            for partition in owned:
                self._cursors[topic, partition] = _Cursor(self._world.committed.get((topic, partition), 0))
        self._take()
        gained = self.table.assign(owned)
        self.decider.on_ownership(owned, gained, self.table.entries)

    # --- records in ---------------------------------------------------------------------------------------------------

    @property
    def handling(self) -> int:
        """How many records are being handled, of whichever assignment."""
        return self._handling

    def _take(self) -> None:
        for (topic, partition), cursor in self._cursors.items():
            lane = self._world.log.topics[topic][partition]
            while cursor.position < len(lane):
                record = lane[cursor.position].inbound()
                cursor.position += 1
                cursor.acks.start(record.offset, record)
                self._spawn(self._handle(cursor, record))

    async def _handle(self, cursor: _Cursor, record: InboundRecord) -> None:
        self._handling += 1
        try:
            if record.topic == REQUESTS:
                await self.decider.on_request(record)
            else:
                await self.decider.on_result(record.partition, decode_result(record.value or b""))
        except NotOwner:
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, a worker would crash by it, and the test says so
            self._world.faults.append(f"{self.name} crashed at {record.position}: {error!r}")
            return
        finally:
            self._handling -= 1
        if self.alive and self._cursors.get((record.topic, record.partition)) is cursor:
            self._world.judge_acknowledged(record)
            for _ in cursor.acks.finish(record.offset):
                pass

    async def _commit_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(COMMIT_EVERY_S)
            self._commit()

    def _commit(self) -> None:
        if self.alive:
            for tp, cursor in self._cursors.items():
                oldest = cursor.acks.oldest
                self._world.committed[tp] = cursor.position if oldest is None else oldest


def every_route() -> Revision:
    """The revision of ``documents``."""
    return revision(documents())


def with_route(name: str, tasks: list[dict[str, Any]], **rule: Any) -> Revision:
    """The revision of ``documents``, and a route with these tasks and 5 s for them."""
    rules = [{"name": "default", "result": {}, "tasks": tasks, **rule}]
    return revision([*documents(), route(name, f"/{name}", deadline="5s", rules=rules)])


async def settled(made: World) -> None:
    """Let everything come to its end; nothing may have gone wrong."""
    await asyncio.sleep(2)
    await made.close()
    assert not made.faults


def decision(made: World) -> DecisionRecord:
    """The record of the one decision."""
    (record,) = (each for each in made.audits() if each.kind is Kind.DECISION)
    return record


def statuses(reply: Mapping[str, Any]) -> dict[str, str]:
    """Each task's status in a reply."""
    return {name: output["status"] for name, output in reply["outputs"].items()}
