"""The audit worker: records of decisions in from ``inference.audit``; objects and pointers to them out.

One batch of a partition becomes one object in S3; each record in it then gets its pointer in DynamoDB; only then are
the batch's offsets acknowledged. So a crash at any point repeats work and loses none: the object is found under its
name and held against the log, and a pointer that stands already is left alone (``app.domain.audit`` has the rules).
While a store is away its batch waits and is tried again, for as long as it takes; the process does not report ready.

Two things must not happen and are shouted about when they do, as ``broker_audit_conflicts_total`` and an error in the
log: two different decisions of one request (the first stands, the second is kept beside it), and a stored object that
contradicts the log (it stays as it is, the log's records are stored beside it).
"""

import asyncio
import time
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

import faust
import structlog
from faust.types import StreamT
from prometheus_client import Counter, Gauge, Histogram

from app.adapters.dead_letters import dead_letter, publish_dead_letters
from app.agents.delivery import Intake
from app.domain.audit import (
    DECISION,
    AuditObject,
    Evidence,
    ObjectIndex,
    Place,
    Pointer,
    beside,
    frame,
    object_key,
    point,
    read_evidence,
    read_index,
    reconcile,
    yielding,
)
from app.domain.errors import PublishFailed, StoreUnavailable
from app.domain.requests import InboundRecord
from app.observability import LATENCY_BUCKETS_S
from app.ports.log import OutboundRecord, Publisher
from app.ports.record_sink import ObjectStore, PointerTable
from app.settings import Settings

log = structlog.get_logger()

RETRY_DELAYS_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Between attempts at one step; the last repeats for as long as the store is away."""
IN_FLIGHT_BATCHES: Final = 2
"""How many full batches the worker holds at most: one that is written, one that gathers."""

_RECORDS = Counter(
    "broker_audit_records", "Audit records by outcome: pointed, duplicate, conflict, variant, malformed", ["outcome"]
)
_OBJECTS = Counter("broker_audit_objects", "Audit objects by outcome: written, found, contested", ["outcome"])
_CONFLICTS = Counter("broker_audit_conflicts", "Alarm: evidence that contradicts evidence", ["what"])
_RETRIES = Counter("broker_audit_retries", "Attempts that have to be repeated", ["dependency"])
_WAITING = Gauge("broker_audit_batches_waiting", "Batches that wait for a dependency to come back", ["dependency"])
_BATCH_SECONDS = Histogram(
    "broker_audit_batch_seconds", "From a batch's first look to its acknowledgement", buckets=LATENCY_BUCKETS_S
)
for _what in ("decision", "object"):  # an alarm that has never rung reads 0, not absent
    _CONFLICTS.labels(_what)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Standing:
    """An object that was found written, and may go further than the batch that found it."""

    key: str
    version: str | None
    index: ObjectIndex


class AuditSink:
    """What happens to one batch. ``group`` is the consumer group, named in dead letters."""

    def __init__(
        self,
        *,
        objects: ObjectStore,
        pointers: PointerTable,
        publisher: Publisher,
        group: str,
        retry_delays_s: Sequence[float] = RETRY_DELAYS_S,
    ) -> None:
        self._objects = objects
        self._pointers = pointers
        self._publisher = publisher
        self._group = group
        self._retry_delays_s = retry_delays_s
        self._standing: dict[tuple[str, int], _Standing] = {}

    async def handle(self, partition: int, records: Sequence[InboundRecord]) -> None:
        """Store a batch and point to each of its records; returns when all of it is durable."""
        started = time.monotonic()
        batch, letters = self._read(records)
        pending, pointers = batch, list[Pointer]()
        while pending:
            placed, pending = await self._place(pending)
            pointers += placed
        tally = await self._point(pointers)
        if letters:
            await self._until_done("kafka", lambda: publish_dead_letters(self._publisher, letters))
            tally["malformed"] = len(letters)
        for outcome, count in tally.items():
            _RECORDS.labels(outcome).inc(count)
        elapsed_s = time.monotonic() - started
        _BATCH_SECONDS.observe(elapsed_s)
        log.info(
            "audit_batch",
            partition=partition,
            first_offset=records[0].offset,
            last_offset=records[-1].offset,
            objects=sorted({pointer.object_key for pointer in pointers}),
            elapsed_ms=round(elapsed_s * 1000, 1),
            **tally,
        )

    def _read(self, records: Sequence[InboundRecord]) -> tuple[list[Evidence], list[OutboundRecord]]:
        """The well-formed records by rising offset, each once; a dead letter for each of the others."""
        batch: list[Evidence] = []
        letters: list[OutboundRecord] = []
        by_offset = {record.offset: record for record in records}
        for _, record in sorted(by_offset.items()):
            try:
                batch.append(read_evidence(record))
            except ValueError as error:
                log.warning("audit_record_malformed", position=record.position, reason=str(error))
                letters.append(dead_letter(record, str(error), "audit_record_malformed", self._group))
        return batch, letters

    async def _place(self, batch: Sequence[Evidence]) -> tuple[list[Pointer], list[Evidence]]:
        """Give the batch's first records a place in one object; pointers to them, and the records that are left."""
        log_partition = (batch[0].topic, batch[0].partition)
        standing = self._standing.get(log_partition)
        if standing is not None and standing.index.covers(batch[0]):
            resolution = reconcile(batch, standing.index)
            if not resolution.faults:
                placed = self._pointers_into(standing.key, standing.version, standing.index.places, resolution.covered)
                return placed, list(resolution.rest)
            del self._standing[log_partition]
            self._shout(standing.key, object_key(*log_partition, batch[0].offset), resolution.faults)
        made = frame(batch)
        stored = await self._until_done("s3", lambda: self._objects.put_if_absent(made.key, made.body, made.metadata))
        if stored is not None:
            _OBJECTS.labels("written").inc()
            return self._pointers_into(made.key, stored.version, made.places, batch), []
        return await self._continue(batch, made)

    async def _continue(self, batch: Sequence[Evidence], made: AuditObject) -> tuple[list[Pointer], list[Evidence]]:
        """An object stands under the batch's name: go on after it, or beside it."""
        standing, faults = await self._until_done("s3", lambda: self._look(made.key))
        if standing is not None:
            resolution = reconcile(batch, standing.index)
            if not resolution.faults:
                _OBJECTS.labels("found").inc()
                self._standing[batch[0].topic, batch[0].partition] = standing
                return self._pointers_into(
                    standing.key, standing.version, standing.index.places, resolution.covered
                ), list(resolution.rest)
            faults = resolution.faults
        apart = beside(made)
        stored = await self._until_done(
            "s3", lambda: self._objects.put_if_absent(apart.key, apart.body, apart.metadata)
        )
        if stored is None:  # its name says what its bytes are: it is the same, of an earlier attempt
            stored = await self._until_done("s3", lambda: self._objects.head(apart.key))
        _OBJECTS.labels("contested").inc()
        self._shout(made.key, apart.key, faults)
        return self._pointers_into(apart.key, stored.version if stored else None, apart.places, batch), []

    def _shout(self, key: str, beside_key: str, faults: Sequence[str]) -> None:
        _CONFLICTS.labels("object").inc()
        log.error(
            "audit_object_conflict",
            object=key,
            stored_beside=beside_key,
            faults=faults[:5],
            fault_count=len(faults),
            hint="the object stays untouched; find out who wrote it, or whether the topic was made anew",
        )

    async def _look(self, key: str) -> tuple[_Standing | None, tuple[str, ...]]:
        """The object under ``key``, or what makes it unreadable."""
        head = await self._objects.head(key)
        if head is None:
            raise StoreUnavailable(f"{key} was there a moment ago and is not now")
        try:
            body = await self._objects.read(key, head.version)
            return _Standing(key, head.version, read_index(body, head.metadata)), ()
        except LookupError as error:
            raise StoreUnavailable(f"{key} was there a moment ago and is not now: {error}") from error
        except ValueError as error:
            return None, (str(error),)

    def _pointers_into(
        self, key: str, version: str | None, places: Mapping[int, Place], records: Sequence[Evidence]
    ) -> list[Pointer]:
        bucket = self._objects.bucket
        return [point(record, places[record.offset], bucket, key, version) for record in records]

    async def _point(self, pointers: Sequence[Pointer]) -> Tally[str]:
        """Write the pointers; one that meets a different one goes beside it. How many ended in which way."""
        tally: Tally[str] = Tally()
        pending = [(pointer, pointer) for pointer in pointers]
        while pending:
            wanted = [pointer for pointer, _ in pending]
            found = await self._until_done("dynamodb", lambda: self._pointers.put_if_absent(wanted))  # noqa: B023 - awaited before it changes
            beaten: list[tuple[Pointer, Pointer]] = []
            for (pointer, first), standing in zip(pending, found, strict=True):
                if standing is None:
                    tally[_outcome(pointer, first)] += 1
                elif standing.sha256 == pointer.sha256:
                    tally["duplicate"] += 1
                else:
                    if pointer.sort_key == DECISION:
                        self._shout_decision(pointer, standing)
                    beaten.append((yielding(pointer), first))
            pending = beaten
        return tally

    def _shout_decision(self, second: Pointer, first: Pointer) -> None:
        # On meeting the first, not on keeping the second: that may have happened in an attempt whose answer got lost.
        _CONFLICTS.labels("decision").inc()
        log.error(
            "audit_decision_conflict",
            request_id=second.request_id,
            first={"execution_id": first.execution_id, "source": first.source},
            second={"execution_id": second.execution_id, "source": second.source},
            hint="two different decisions of one request: the first stands, the second is kept; see `decision show`",
        )

    async def _until_done(self, dependency: str, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """The attempt's result, however often it takes; only the worker's end cancels the wait."""
        failures = 0
        try:
            while True:
                try:
                    return await attempt()
                except (StoreUnavailable, PublishFailed) as error:
                    delay_s = self._retry_delays_s[min(failures, len(self._retry_delays_s) - 1)]
                    if failures == 0:
                        _WAITING.labels(dependency).inc()
                    failures += 1
                    _RETRIES.labels(dependency).inc()
                    log.warning("audit_batch_waits", dependency=dependency, reason=str(error), retry_in_s=delay_s)
                    await asyncio.sleep(delay_s)
        finally:
            if failures:
                _WAITING.labels(dependency).dec()


def _outcome(pointer: Pointer, first: Pointer) -> str:
    """How a written pointer counts, by where it was first wanted.

    What is not a decision and told again, with other times, is a variant and no alarm.
    """
    if pointer.sort_key == first.sort_key:
        return "pointed"
    return "conflict" if first.sort_key == DECISION else "variant"


def attach(
    app: faust.App,
    *,
    topic: str,
    objects: ObjectStore,
    pointers: PointerTable,
    publisher: Publisher,
    settings: Settings,
    group: str,
) -> Intake:
    """Add the audit agent to ``app``; ``topic`` and ``group`` are full names. Returns its intake, to be drained."""
    intake = Intake(app, in_flight_max=IN_FLIGHT_BATCHES * settings.audit_batch_records)
    sink = AuditSink(objects=objects, pointers=pointers, publisher=publisher, group=group)

    async def audit(stream: StreamT[Any]) -> None:
        await intake.batches(
            cast(faust.Stream[bytes], stream),
            sink.handle,
            records_max=settings.audit_batch_records,
            bytes_max=settings.audit_batch_bytes,
            wait_ms=settings.audit_batch_wait,
        )

    channel = app.topic(topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")
    app.agent(channel, name="audit")(audit)
    return intake
