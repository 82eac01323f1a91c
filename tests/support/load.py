"""A steady load on a test cluster, and the verdict on what came of it.

Requests go out at a fixed rate, every tenth again a while later: same id, same body, same key, another correlation id.
All replies are read from a topic of the load's own, from its start, so that one too many is seen as well as one too
few. ``verdict`` holds replies, audit topic and audit stores against each other, and fails where a promise is broken:
a request without reply, two different replies or decisions of one id, a decision without its proven record.
"""

import asyncio
import random
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import TracebackType
from typing import Any, Final, Self

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from app.adapters.audit_reader import AuditReader
from app.adapters.avro import AvroCodec
from app.adapters.dynamodb import DynamoPointerTable
from app.adapters.s3 import S3ObjectStore
from app.domain.audit import DECISION
from app.domain.requests import Headers
from tests.support.cluster import PARTITIONS, Cluster
from tests.support.cluster_documents import POOL, SUBJECTS, expected, expected_by_default

DUPLICATE_SHARE: Final = 0.1
DUPLICATE_WITHIN_S: Final = 4.0
_POLL_MS: Final = 200
_POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Asked:
    """One message that was sent; several share a request id."""

    correlation: bytes
    request_id: str
    path: str
    subject: str
    x: float
    at_s: float
    """Wall clock, when it was due to go out."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One record of the reply topic."""

    correlation: bytes
    request_id: str
    value: bytes
    headers: Headers
    at_s: float
    """Wall clock, when it was produced."""

    @property
    def body(self) -> dict[str, Any]:
        """Its members."""
        members: dict[str, Any] = orjson.loads(self.value)
        return members


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a load came to, once every promise was found kept."""

    requests: int
    duplicates: int
    replies: int
    statuses: Mapping[str, int]
    longest_wait_s: float
    """From sending to the first reply, of the request that waited longest."""
    disturbed_s: float
    """For how long the cluster was worked on: processes and services stopped and started, by ``Load.during``."""
    longest_gap_s: float
    """Between two replies."""
    by_path: Mapping[str, Mapping[str, int]]
    """Requests by path and status."""
    wait_by_path_s: Mapping[str, float]
    """The longest wait of each path."""
    bodies: Mapping[str, Mapping[str, Any]]
    """Each request's reply."""

    @property
    def wait_beyond_s(self) -> float:
        """How much longer than the cluster was worked on the longest wait was: how fast a machine starts a process is
        not what is measured."""
        return self.longest_wait_s - self.disturbed_s

    def __str__(self) -> str:
        statuses = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items()))
        return (
            f"{self.requests} requests and {self.duplicates} duplicates: {statuses}; {self.replies} replies, "
            f"longest wait {self.longest_wait_s:.1f} s, worked on {self.disturbed_s:.1f} s, "
            f"longest gap {self.longest_gap_s:.1f} s"
        )


@dataclass(slots=True)
class Load:
    """``total`` requests at ``rate`` a second, over ``paths`` in turn. An async context manager; it sends inside.

    With ``unanswered_max`` it waits while so many messages have no reply, and its schedule slides by that: a machine
    that cannot keep up is asked for what it can do, and the waits that are measured are not those of a growing queue.
    """

    cluster: Cluster
    total: int
    rate: float
    unanswered_max: int | None = None
    paths: Sequence[str] = ("/inline", "/queued", "/mixed")
    seed: int = 17
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    asked: list[Asked] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    _sent: int = 0
    _begun: int = 0
    _disturbed_s: float = 0.0
    _answered: set[bytes] = field(default_factory=set)
    _enough: bool = False
    _moved: asyncio.Condition = field(default_factory=asyncio.Condition)
    _work: list[asyncio.Task[None]] = field(default_factory=list)
    _admin: AIOKafkaAdminClient = field(init=False)
    _producer: AIOKafkaProducer = field(init=False)
    _consumer: AIOKafkaConsumer = field(init=False)

    @property
    def reply_topic(self) -> str:
        """Where its replies go, and no others."""
        return f"{self.cluster.settings.topic_prefix}{self.name}.replies"

    async def __aenter__(self) -> Self:
        bootstrap = self.cluster.settings.kafka_bootstrap
        self._admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
        self._producer = AIOKafkaProducer(bootstrap_servers=bootstrap, enable_idempotence=True, acks="all", linger_ms=2)
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False
        )
        await self._admin.start()
        await self._admin.create_topics([NewTopic(self.reply_topic, PARTITIONS, 1)])
        await self._producer.start()
        await self._consumer.start()
        self._consumer.assign([TopicPartition(self.reply_topic, number) for number in range(PARTITIONS)])
        self._plan()
        self._work = [asyncio.create_task(self._send_all()), asyncio.create_task(self._read())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        await self._consumer.stop()
        await self._producer.stop()
        await self._admin.close()

    # --- sending and reading ------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        chance = random.Random(self.seed)
        began = time.time() + 0.1
        for number in range(self.total):
            at_s = began + number / self.rate
            request_id = f"{self.name}-{number}"
            first = Asked(
                uuid.uuid4().bytes,
                request_id,
                self.paths[number % len(self.paths)],
                f"subject-{number % SUBJECTS}",
                float(number),
                at_s,
            )
            self.asked.append(first)
            if chance.random() < DUPLICATE_SHARE:
                later = at_s + chance.uniform(0.0, DUPLICATE_WITHIN_S)
                self.asked.append(Asked(uuid.uuid4().bytes, request_id, first.path, first.subject, first.x, later))
        self.asked.sort(key=lambda asked: asked.at_s)

    async def _send_all(self) -> None:
        slid_s = 0.0
        async with asyncio.TaskGroup() as sends:
            for number, planned in enumerate(self.asked):
                await asyncio.sleep(max(0.0, planned.at_s + slid_s - time.time()))
                if await self._held_back(number):
                    slid_s = max(slid_s, time.time() - planned.at_s)
                if self._enough:
                    del self.asked[number:]
                    return
                self.asked[number] = replace(planned, at_s=planned.at_s + slid_s)
                self._begun = number + 1
                sends.create_task(self._send(self.asked[number]))

    async def _held_back(self, begun: int) -> bool:
        """Wait, where ``unanswered_max`` asks for it, for replies to the ``begun`` messages; whether it did."""
        most = self.unanswered_max
        if most is None or begun - len(self._answered) < most:
            return False
        async with self._moved:
            await self._moved.wait_for(lambda: self._enough or begun - len(self._answered) < most)
        return True

    async def enough(self) -> None:
        """Send no more: what was to happen under load has happened."""
        async with self._moved:
            self._enough = True
            self._moved.notify_all()
        await self._work[0]

    async def _send(self, asked: Asked) -> None:
        body = {
            "request_id": asked.request_id,
            "path": asked.path,
            "entities": {"subject_id": asked.subject},
            "inputs": {"x": asked.x},
        }
        while True:
            try:
                await self._producer.send_and_wait(
                    self.cluster.settings.topic("inference.requests"),
                    orjson.dumps(body),
                    key=asked.subject.encode(),
                    headers=[
                        ("kafka_correlationId", asked.correlation),
                        ("kafka_replyTopic", self.reply_topic.encode()),
                    ],
                )
                break
            except KafkaError:
                # An outage; what is sent twice for it is one duplicate more.
                await asyncio.sleep(_POLL_S)
        async with self._moved:
            self._sent += 1
            self._moved.notify_all()

    async def _read(self) -> None:
        while True:
            try:
                batches = await self._consumer.getmany(timeout_ms=_POLL_MS)
            except KafkaError:
                await asyncio.sleep(_POLL_S)
                continue
            if not batches:
                continue
            async with self._moved:
                for records in batches.values():
                    for record in records:
                        headers = tuple(record.headers)
                        named = dict(headers)
                        self.replies.append(
                            Reply(
                                named["kafka_correlationId"],
                                named["request-id"].decode(),
                                record.value,
                                headers,
                                record.timestamp / 1000,
                            )
                        )
                        self._answered.add(named["kafka_correlationId"])
                self._moved.notify_all()

    def last(self, count: int) -> set[str]:
        """The ids of the ``count`` requests that were first asked last."""
        return set(list(dict.fromkeys(asked.request_id for asked in self.asked))[-count:])

    async def during(self, deed: Callable[..., object], *arguments: object) -> None:
        """Do something to the cluster, in a thread; the verdict tells for how long that was done."""
        began = time.monotonic()
        try:
            await asyncio.to_thread(deed, *arguments)
        finally:
            self._disturbed_s += time.monotonic() - began

    # --- waiting ------------------------------------------------------------------------------------------------------

    async def sent(self, count: int, within_s: float = 60.0) -> None:
        """Wait until ``count`` messages are in Kafka."""
        await self._until(lambda: self._sent >= count, within_s, f"{count} messages sent")

    async def replied(self, count: int, within_s: float = 60.0) -> None:
        """Wait until ``count`` messages have a reply."""
        await self._until(lambda: len(self._answered) >= count, within_s, f"{count} replies")

    async def go_on(self, count: int) -> None:
        """Send ``count`` messages more, then no others."""
        await self.sent(self._begun + count)
        await self.enough()

    async def told(self, code: str, count: int, within_s: float = 90.0) -> None:
        """Wait until ``count`` replies tell of an error by this code."""
        sought = f'"code":"{code}"'.encode()
        await self._until(
            lambda: sum(sought in reply.value for reply in self.replies) >= count, within_s, f"{count} times {code}"
        )

    async def answered(self, within_s: float = 120.0) -> None:
        """Wait until every message has a reply."""
        await self._until(lambda: not self._unanswered(), within_s, "every message answered")

    async def _until(self, holds: Any, within_s: float, what: str) -> None:
        try:
            async with asyncio.timeout(within_s), self._moved:
                await self._moved.wait_for(holds)
        except TimeoutError:
            missing = self._unanswered()
            raise AssertionError(
                f"not within {within_s:.0f} s: {what}; {self._sent} of {len(self.asked)} sent, {len(missing)} without "
                f"reply, such as {missing[:5]}\n{self.cluster.tails()}"
            ) from None

    def _unanswered(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.correlation not in self._answered]

    async def settled(self, within_s: float = 60.0) -> None:
        """Wait until the broker has acknowledged all that it was sent, and every reply to it is read."""
        for role, topics in (
            ("decide", ("inference.requests", "inference.results")),
            (f"pool-{POOL}", (f"inference.tasks.{POOL}",)),
            ("audit", ("inference.audit",)),
        ):
            await self._group_done(role, [self.cluster.settings.topic(topic) for topic in topics], within_s)
        partitions = [TopicPartition(self.reply_topic, number) for number in range(PARTITIONS)]
        async with asyncio.timeout(within_s):
            ends = await self._consumer.end_offsets(partitions)
            while sum(ends.values()) > len(self.replies):  # noqa: ASYNC110 - bounded; the reader has no event for it
                await asyncio.sleep(_POLL_S)

    async def _group_done(self, role: str, topics: Sequence[str], within_s: float) -> None:
        partitions = [TopicPartition(topic, number) for topic in topics for number in range(PARTITIONS)]
        end, behind = time.monotonic() + within_s, ["nothing asked yet"]
        while behind:
            assert time.monotonic() < end, f"{role} has not acknowledged {behind}\n{self.cluster.tails()}"
            committed = await self._admin.list_consumer_group_offsets(f"{self.cluster.settings.topic_prefix}{role}")
            ends = await self._consumer.end_offsets(partitions)
            behind = [
                f"{at.topic}/{at.partition}: {committed[at].offset if at in committed else None} of {ends[at]}"
                for at in partitions
                if ends[at] > (committed[at].offset if at in committed else 0)
            ]
            if behind:
                await asyncio.sleep(_POLL_S)

    # --- the verdict --------------------------------------------------------------------------------------------------

    async def verdict(self, answered_within_s: float = 120.0) -> Verdict:
        """Wait for the end and judge; AssertionError names the promise that was broken."""
        await self.answered(answered_within_s)
        await self.settled()
        by_id: defaultdict[str, set[bytes]] = defaultdict(set)
        first: dict[bytes, Reply] = {}
        for reply in self.replies:
            by_id[reply.request_id].add(reply.value)
            held = first.setdefault(reply.correlation, reply)
            if reply.at_s < held.at_s:
                first[reply.correlation] = reply
        ids = {asked.request_id for asked in self.asked}
        assert {reply.correlation for reply in self.replies} == {asked.correlation for asked in self.asked}
        assert by_id.keys() == ids
        decided_twice = {request_id: values for request_id, values in by_id.items() if len(values) > 1}
        assert not decided_twice, f"two different replies of one request: {list(decided_twice.items())[:3]}"
        for asked in self.asked:
            reply = first[asked.correlation]
            assert reply.request_id == asked.request_id
            members = reply.body
            if members["status"] in ("completed", "partial"):
                right = {expected(asked.x, asked.subject)}
                if asked.path == "/soft":
                    right.add(expected_by_default(asked.x))
                assert members["result"]["y"] in right, (asked, members)
        values = {request_id: next(iter(values)) for request_id, values in by_id.items()}
        await self._check_audit(values)
        bodies = {request_id: orjson.loads(value) for request_id, value in values.items()}
        by_path: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for request_id, path in {asked.request_id: asked.path for asked in self.asked}.items():
            by_path[path][bodies[request_id]["status"]] += 1
        waits: defaultdict[str, float] = defaultdict(float)
        for asked in self.asked:
            waits[asked.path] = max(waits[asked.path], first[asked.correlation].at_s - asked.at_s)
        times = sorted(reply.at_s for reply in first.values())
        return Verdict(
            requests=len(ids),
            duplicates=len(self.asked) - len(ids),
            replies=len(self.replies),
            statuses=Counter(body["status"] for body in bodies.values()),
            longest_wait_s=max(waits.values()),
            disturbed_s=self._disturbed_s,
            longest_gap_s=max((b - a for a, b in pairwise(times)), default=0.0),
            by_path=by_path,
            wait_by_path_s=waits,
            bodies=bodies,
        )

    async def _check_audit(self, replied: Mapping[str, bytes]) -> None:
        """Each id has one decision on the audit topic and in the stores, and its record holds the reply's bytes."""
        codec = AvroCodec("AuditRecord")
        on_topic: defaultdict[str, set[bytes]] = defaultdict(set)
        for value in await self._audit_topic():
            record = codec.decode(value)
            if record["request_id"] in replied:
                assert record["kind"] == "decision", f"a {record['kind']} of {record['request_id']}"
                on_topic[record["request_id"]].add(value)
        for request_id, reply in replied.items():
            values = on_topic[request_id]
            assert len(values) == 1, f"{request_id} has {len(values)} different records on the audit topic"
            assert codec.decode(next(iter(values)))["reply"] == reply
        settings = self.cluster.settings
        async with (
            S3ObjectStore(settings.audit_bucket) as objects,
            DynamoPointerTable(settings.audit_table) as pointers,
        ):
            report = await AuditReader(objects, pointers).verify(replied)
            assert report.sound, f"missing {report.missing[:5]}, faults {report.faults[:5]}"
            assert report.items == len(replied)
            keys = [(each.request_id, each.sort_key) async for each in pointers.all() if each.request_id in replied]
        assert Counter(keys) == Counter((request_id, DECISION) for request_id in replied)

    async def _audit_topic(self) -> list[bytes]:
        topic = self.cluster.settings.topic("inference.audit")
        partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        values: list[bytes] = []
        async with AIOKafkaConsumer(
            bootstrap_servers=self.cluster.settings.kafka_bootstrap, auto_offset_reset="earliest"
        ) as consumer:
            consumer.assign(partitions)
            total = sum((await consumer.end_offsets(partitions)).values())
            async with asyncio.timeout(60):
                while len(values) < total:
                    for records in (await consumer.getmany(timeout_ms=_POLL_MS)).values():
                        values += [record.value for record in records]
        return values
