"""The world of rollouts workers, in memory: the registry, the audit's log and the table outlive every worker.

Any write may be a worker's last: it dies before it, or after. Workers may see the registry late, and several may
believe to be the one that judges.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from app.adapters.record_codec import decode_record, encode_record
from app.agents.rollouts import Judge
from app.agents.windows import Windows
from app.domain.decisions import DecisionRecord, Kind, TaskRecord
from app.domain.dispatch import TaskResult, TaskStatus
from app.domain.documents import Document
from app.domain.errors import HeadRefused, RevisionConflict
from app.domain.join import Status
from app.domain.registry import Revision, compile_revision
from app.domain.requests import InboundRecord, RequestId
from app.domain.rollouts import Running, rollouts_in
from app.ports.log import OutboundRecord
from tests.support.memory_audit import Crash
from tests.support.request_reply import FixedClock
from tests.support.rollouts import SCORED

PARTITIONS = 2
AUDIT = "inference.audit"


class World:
    """What is durable. ``documents`` are the first revision's."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.clock = FixedClock()
        self.revisions = [compile_revision(documents)]
        self.log: list[list[InboundRecord]] = [[] for _ in range(PARTITIONS)]
        self.entries: list[dict[str, bytes]] = [{} for _ in range(PARTITIONS)]
        self.committed = [0] * PARTITIONS
        self.writes_left: int | None = None
        self.after = False
        self.refused = False
        """Whether something unsound was published after the head."""
        self._numbers = itertools.count()

    # --- deaths -------------------------------------------------------------------------------------------------------

    def die_at(self, write: int, *, after: bool) -> None:
        """The ``write``-th write from now on (0: the next) kills its worker, before it is written or ``after``."""
        self.writes_left, self.after = write, after

    def before_write(self) -> None:
        """Called before each write."""
        if self.writes_left == 0 and not self.after:
            self.writes_left = None
            raise Crash

    def after_write(self) -> None:
        """Called after each write."""
        if self.writes_left == 0:
            self.writes_left = None
            raise Crash
        if self.writes_left is not None:
            self.writes_left -= 1

    # --- registry -----------------------------------------------------------------------------------------------------

    @property
    def head(self) -> Revision:
        """The current revision."""
        return self.revisions[-1]

    def running(self) -> Running:
        """The rollout, as it is now."""
        return next(each for each in rollouts_in(self.head.documents) if each.name == SCORED)

    def publish(self, revision: Revision, *, before: str, now_ms: int, message: str, over_refused: bool) -> None:
        """Compare-and-swap, from the last good revision."""
        self.before_write()
        if self.refused and not over_refused:
            raise HeadRefused("broker.registry: not JSON")
        if self.head.id != before:
            raise RevisionConflict(f"{self.head.id}, not {before}")
        self.revisions.append(revision)
        self.refused = False
        self.after_write()

    def statuses(self) -> list[tuple[str, int, int]]:
        """State, step and since of the rollout in each revision."""
        found = [each.status for one in self.revisions for each in rollouts_in(one.documents) if each.name == SCORED]
        return [(status.state, status.step, status.since) for status in found]

    # --- log ----------------------------------------------------------------------------------------------------------

    def append(self, partition: int, record: DecisionRecord) -> None:
        """An audit record, as a decide worker writes it."""
        headers = (
            ("request-id", record.request_id.encode()),
            ("execution-id", record.execution_id.encode()),
            ("kind", record.kind.encode()),
            ("status", b"completed"),
        )
        self._append(OutboundRecord(AUDIT, encode_record(record), b"", partition, headers))

    def _append(self, out: OutboundRecord) -> int:
        partition = out.partition or 0
        lane = self.log[partition]
        offset = len(lane)
        lane.append(InboundRecord(out.topic, partition, offset, self.clock.now, out.key, out.value, out.headers))
        return offset

    async def publish_records(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """``ports.log.Publisher.publish``."""
        self.before_write()
        offsets = [self._append(record) for record in records]
        self.after_write()
        return offsets

    def decide(self, status: TaskStatus = TaskStatus.OK, *, version: str = "2", under: Revision | None = None) -> None:
        """A decision, by the rollout's new version unless said otherwise, under the current revision or another."""
        number = next(self._numbers)
        task = TaskRecord(
            SCORED.task, "inline", version, "sha256:0", "http", "rollout", "required", None, (),
            TaskResult(SCORED.task, status, None, None, 12.0, (), b""),
        )  # fmt: skip
        self.append(number % PARTITIONS, self._record(number, Kind.DECISION, under, (task,)))

    def shadow(self, *, flipped: bool | None, segment: str | None = None, under: Revision | None = None) -> None:
        """What the new version would have said of a decision."""
        number = next(self._numbers)
        evidence: dict[str, Any] = {
            "task": SCORED.task,
            "champion": "1",
            "shadow": "2",
            "outputs": {"champion": {"y": 0.25}, "shadow": {"y": 0.75}},
            "result": {"champion": {}, "shadow": {}},
            "flipped": flipped,
            "segment": segment,
            "latency_ms": 5.0,
        }
        record = replace(self._record(number, Kind.SHADOW, under, ()), evidence=orjson.dumps(evidence))
        self.append(number % PARTITIONS, record)

    def _record(self, number: int, kind: Kind, under: Revision | None, tasks: tuple[TaskRecord, ...]) -> DecisionRecord:
        now = self.clock.now
        source = InboundRecord("inference.requests", 0, number, now, None, None, ())
        return DecisionRecord(
            kind, RequestId(f"r-{number}"), f"e-{number}", source, "application/json", "00" * 32, now, now + 1_000,
            "decide-0", "/scored", SCORED.route, SCORED.rule, (under or self.head).id, tasks, Status.COMPLETED, now,
        )  # fmt: skip

    def told(self) -> dict[str, list[bytes]]:
        """The records of the rollout in the log, by id."""
        found: dict[str, list[bytes]] = {}
        for record in self.log[0]:
            if ("kind", b"rollout") in record.headers:
                assert record.value is not None
                found.setdefault(decode_record(record.value).execution_id, []).append(record.value)
        return found

    def accounts(self) -> list[dict[str, Any]]:
        """What is told of each step, once each."""
        return [orjson.loads(decode_record(values[0]).evidence or b"") for values in self.told().values()]


@dataclass(slots=True)
class SeenRegistry:
    """The registry as a worker sees it: ``behind`` so many revisions, until it is asked for others."""

    world: World
    behind: int = 0

    @property
    def current(self) -> Revision | None:
        """See ports.registry.Registry."""
        return self.world.revisions[max(0, len(self.world.revisions) - 1 - self.behind)]

    @property
    def blank(self) -> bool:
        """See ports.registry.Registry."""
        return False

    @property
    def healthy(self) -> bool:
        """See ports.registry.Registry."""
        return True

    def get(self, revision_id: str) -> Revision | None:
        """See ports.registry.Registry."""
        seen = self.world.revisions[: len(self.world.revisions) - self.behind] or self.world.revisions[:1]
        # Who asks waits, and meanwhile it comes nearer.
        self.behind = max(0, self.behind - 1)
        return next((each for each in seen if each.id == revision_id), None)


@dataclass(slots=True)
class SharedTable:
    """The table, as a worker that believes to own all of it sees it."""

    world: World
    recovered: bool = True

    def owns(self, partition: int) -> bool:
        """All."""
        return True

    async def settled(self, partition: int) -> None:
        """At once."""

    def get(self, partition: int, request_id: str) -> bytes | None:
        """See ports.log.JoinTable."""
        return self.world.entries[partition].get(request_id)

    def entries(self, partition: int) -> Iterable[tuple[str, bytes]]:
        """All of a partition."""
        return self.world.entries[partition].items()

    async def put(self, partition: int, request_id: str, entry: bytes | None) -> None:
        """See ports.log.JoinTable."""
        self.world.before_write()
        if entry is None:
            self.world.entries[partition].pop(request_id, None)
        else:
            self.world.entries[partition][request_id] = entry
        self.world.after_write()


@dataclass(slots=True)
class Everything:
    """``AllWindows`` of the world."""

    world: World

    @property
    def partitions(self) -> Mapping[int, Mapping[str, bytes]]:
        """See AllWindows."""
        return dict(enumerate(self.world.entries))

    async def ends(self) -> Mapping[int, int]:
        """See AllWindows."""
        return {partition: len(lane) for partition, lane in enumerate(self.world.log)}

    async def reached(self, ends: Mapping[int, int]) -> bool:
        """See AllWindows."""
        return all(self.world.committed[partition] >= end for partition, end in ends.items())


@dataclass(slots=True)
class Publisher:
    """``ports.log.Publisher`` into the world."""

    world: World

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """See Publisher."""
        return await self.world.publish_records(records)


@dataclass(slots=True)
class RolloutsWorker:
    """One life of a worker."""

    world: World
    registry: SeenRegistry = field(init=False)
    windows: Windows = field(init=False)
    judge: Judge = field(init=False)

    def __post_init__(self) -> None:
        world = self.world
        self.registry = SeenRegistry(world)
        table = SharedTable(world)
        self.windows = Windows(table=table, registry=self.registry, clock=world.clock)
        self.judge = Judge(
            table=table,
            windows=Everything(world),
            registry=self.registry,
            publisher=Publisher(world),
            publish_next=world.publish,
            clock=world.clock,
            audit_topic=AUDIT,
            registry_topic="broker.registry",
        )

    async def count(self, records_max: int = 1_000, *, commits: bool = True) -> None:
        """Count what is not committed, ``records_max`` a partition at most."""
        for partition, lane in enumerate(self.world.log):
            batch = lane[self.world.committed[partition] :][:records_max]
            if batch:
                await self.windows.handle(partition, batch)
                if commits:
                    self.world.committed[partition] += len(batch)
