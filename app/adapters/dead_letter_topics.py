"""Dead-letter topics, read and sent back from: what ``model-broker dlt`` stands on.

A redrive sends a letter to the topic and partition that it came from, as it was there: key, value and headers without
the account of its death. What was sent is remembered in the consumer group ``<prefix>dlt-redrive``, committed after
Kafka has acknowledged the copies, a few at a time; whoever redrives is a member of that group for as long, so that two
people at once share the work instead of doing it twice. A process that is killed between an acknowledgement and its
commit is the one case in which letters (``BATCH_LETTERS`` at most) are sent again.

Kafka forgets the commits of an idle group after ``offsets.retention.minutes``, a week by default, while letters stay a
month. A letter older than that in a partition without a commit may have been redriven, so it counts as redriven.
"""

import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeVar

from confluent_kafka import (
    OFFSET_INVALID,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    ConfigResource,
    ResourceType,
)

from app.adapters.dead_letters import (
    EXCEPTION_FQCN,
    EXCEPTION_MESSAGE,
    HEADER_PREFIX,
    ORIGINAL_CONSUMER_GROUP,
    ORIGINAL_OFFSET,
    ORIGINAL_PARTITION,
    ORIGINAL_TOPIC,
    SUFFIX,
    VALUE_BYTES_DROPPED,
)
from app.adapters.topics import CONNECT_WITHIN_S, own_topics, read_documents, refused_by_kafka
from app.domain.errors import LetterUnknown, RedriveRefused, StoreUnavailable
from app.domain.redriven import Redriven
from app.domain.requests import Headers, InboundRecord
from app.settings import Settings

REDRIVE_GROUP: Final = "dlt-redrive"
BATCH_LETTERS: Final = 20
"""Sent before their commit: enough to hide its round trip, few enough to be sent twice after a kill."""
ANSWER_WITHIN_S: Final = 15.0
JOIN_WITHIN_S: Final = 45.0
"""A member that was killed holds its partitions for SESSION_MS, and a coordinator may wait some seconds for more."""
SESSION_MS: Final = 10_000
RETENTION_MINUTES: Final = 10_080
"""Kafka's own default of ``offsets.retention.minutes``, where the brokers do not tell."""
RECORD_BYTES_MAX: Final = 2_000_000
_POLL_S: Final = 0.1
_MOVING: Final = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
    }
)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A letter as it lies in its topic. ``redriven``: it was sent again, or is too old for anybody to know."""

    record: InboundRecord
    redriven: bool

    def header(self, name: str) -> bytes | None:
        """The last header of that name: an account written later stands after an earlier one."""
        return next((value for key, value in reversed(self.record.headers) if key == name), None)

    def text(self, name: str) -> str | None:
        """A header as text."""
        value = self.header(name)
        return None if value is None else value.decode(errors="replace")

    def number(self, name: str) -> int | None:
        """A header as a big-endian number of 4 or 8 bytes; None where it is none."""
        value = self.header(name)
        if value is None or len(value) not in (4, 8):
            return None
        return int(struct.unpack(">i" if len(value) == 4 else ">q", value)[0])

    @property
    def original(self) -> str | None:
        """Where it came from: ``topic/partition/offset``; None where the headers do not say."""
        topic, partition = self.text(ORIGINAL_TOPIC), self.number(ORIGINAL_PARTITION)
        if topic is None or partition is None:
            return None
        return f"{topic}/{partition}/{self.number(ORIGINAL_OFFSET)}"

    @property
    def kind(self) -> str | None:
        """What was wrong, for programs."""
        return self.text(EXCEPTION_FQCN)

    @property
    def reason(self) -> str | None:
        """What was wrong, for people."""
        return self.text(EXCEPTION_MESSAGE)

    @property
    def group(self) -> str | None:
        """The consumer group that gave up."""
        return self.text(ORIGINAL_CONSUMER_GROUP)

    @property
    def own_headers(self) -> Headers:
        """The headers that the record had before it died."""
        return tuple((name, value) for name, value in self.record.headers if not name.startswith(HEADER_PREFIX))

    def refusal(self) -> str | None:
        """Why it cannot be sent back, or None."""
        came_from = self.record.topic.removesuffix(SUFFIX)
        if self.original is None:
            return "its headers do not say where it came from"
        if self.text(ORIGINAL_TOPIC) != came_from:
            return f"its headers name topic {self.text(ORIGINAL_TOPIC)}, and only {came_from}'s letters belong here"
        if dropped := self.text(VALUE_BYTES_DROPPED):
            return f"its value of {dropped} bytes did not fit here; while the original lasts, it is at {self.original}"
        return None


@dataclass(frozen=True, slots=True)
class PartitionState:
    """One partition: its letters are at ``first`` to below ``end``; which of them were redriven."""

    partition: int
    first: int
    end: int
    redriven: Redriven

    @property
    def waiting(self) -> int:
        """How many letters were not sent again."""
        return max(0, self.end - self.redriven.upto - sum(offset < self.end for offset in self.redriven.beyond))


@dataclass(frozen=True, slots=True)
class Redrive:
    """What became of a redrive: positions of the letters sent, and those not sent with the reason."""

    sent: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]


class DeadLetterTopics:
    """The dead-letter topics of this broker, under its prefix. Every call is bounded.

    Raises ConfigurationError where Kafka does not answer at all, StoreUnavailable where it stops answering.
    """

    def __init__(self, settings: Settings) -> None:
        self._bootstrap = settings.kafka_bootstrap
        self._settings = settings
        self._prefix = settings.topic_prefix
        self._group = settings.topic(REDRIVE_GROUP)
        self._client: dict[str, str | int | float | bool] = {"bootstrap.servers": self._bootstrap, "log_level": 0}

    # --- looking ------------------------------------------------------------------------------------------------------

    def topics(self) -> dict[str, int]:
        """Each dead-letter topic and its number of partitions."""
        try:
            found = AdminClient(self._client).list_topics(timeout=CONNECT_WITHIN_S).topics
        except KafkaException as error:
            raise refused_by_kafka(self._bootstrap, "listing topics", error) from error
        ours = own_topics(found, self._settings, read_documents())
        return {
            name: len(topic.partitions)
            for name, topic in sorted(found.items())
            if name in ours and name.endswith(SUFFIX) and topic.error is None
        }

    def named(self, name: str) -> tuple[str, int]:
        """The topic that ``name`` means, with prefix and suffix or not, and its partitions. Raises LetterUnknown."""
        topics = self.topics()
        for candidate in (name, name + SUFFIX, self._prefix + name, self._prefix + name + SUFFIX):
            if candidate in topics:
                return candidate, topics[candidate]
        known = f"there are {', '.join(topics)}" if topics else "there is none: run `model-broker topics apply`"
        raise LetterUnknown(f"no dead-letter topic {name}; {known}")

    def states(self, topic: str, partitions: int) -> tuple[PartitionState, ...]:
        """The partitions of ``topic``."""
        with self._reader() as reader, self._answering(f"reading positions of {topic}"):
            return tuple(self._state(reader, topic, partition) for partition in range(partitions))

    def latest(self, topic: str, partitions: int, count: int) -> tuple[DeadLetter, ...]:
        """The latest ``count`` letters of ``topic``, the latest first."""
        letters: list[DeadLetter] = []
        if count > 0:
            for state in self.states(topic, partitions):
                letters += self._letters(topic, state, max(state.first, state.end - count), state.end)
        letters.sort(key=lambda letter: (-letter.record.timestamp_ms, letter.record.partition, -letter.record.offset))
        return tuple(letters[:count])

    def waiting(self, topic: str, partitions: int) -> Iterator[DeadLetter]:
        """The letters of ``topic`` that were not sent again, by partition and offset."""
        for state in self.states(topic, partitions):
            letters = self._letters(topic, state, max(state.first, state.redriven.upto), state.end)
            yield from (letter for letter in letters if not letter.redriven)

    def read(self, topic: str, partition: int, offset: int) -> DeadLetter:
        """One letter. Raises LetterUnknown."""
        name, partitions = self.named(topic)
        if not 0 <= partition < partitions:
            raise LetterUnknown(f"{name} has partitions 0 to {partitions - 1}, and not {partition}")
        state = self.states(name, partitions)[partition]
        for letter in self._letters(name, state, offset, min(offset + 1, state.end)):
            if letter.record.offset == offset:
                return letter
        raise LetterUnknown(
            f"no letter at {name}/{partition}/{offset}; the partition holds offsets {state.first} to {state.end - 1}"
            if state.end > state.first
            else f"no letter at {name}/{partition}/{offset}; the partition is empty"
        )

    # --- sending back -------------------------------------------------------------------------------------------------

    def redrive_one(self, letter: DeadLetter, *, again: bool = False) -> Redrive:
        """Send one letter back. Raises RedriveRefused."""
        record = letter.record
        with self._member(record.topic, [record.partition]) as member:
            redriven = self._position(member, record.topic, record.partition)
            if record.offset in redriven and not again:
                raise RedriveRefused(
                    f"{record.position} was redriven before, or is too old for Kafka to know: --again sends it again"
                )
            if refusal := letter.refusal():
                raise RedriveRefused(f"{record.position} cannot be redriven: {refusal}")
            _, result = self._send(member, self._producer(), redriven, [letter])
        if result.refused:
            raise RedriveRefused(f"{record.position} was not redriven: {result.refused[0][1]}")
        return result

    def redrive_all(self, topic: str, partitions: int) -> Redrive:
        """Send back every letter of ``topic`` that waits now. Raises RedriveRefused."""
        sent: list[str] = []
        refused: list[tuple[str, str]] = []
        producer = self._producer()
        with self._member(topic, range(partitions)) as member:
            for state in self.states(topic, partitions):
                redriven = state.redriven
                letters = self._letters(topic, state, max(state.first, redriven.upto), state.end)
                for batch in _batches(letter for letter in letters if not letter.redriven):
                    reasons = {letter.record.position: letter.refusal() for letter in batch}
                    refused += [(position, reason) for position, reason in reasons.items() if reason is not None]
                    good = [letter for letter in batch if reasons[letter.record.position] is None]
                    if good:
                        redriven, result = self._send(member, producer, redriven, good)
                        sent += result.sent
                        refused += result.refused
        return Redrive(tuple(sent), tuple(refused))

    def _producer(self) -> Producer:
        return Producer(
            {
                **self._client,
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": 0,
                "message.max.bytes": RECORD_BYTES_MAX,
                "message.timeout.ms": int(ANSWER_WITHIN_S * 1000),
            }
        )

    def _send(
        self, member: Consumer, producer: Producer, redriven: Redriven, letters: Sequence[DeadLetter]
    ) -> tuple[Redriven, Redrive]:
        """Send letters of one partition, wait for Kafka's word on each, and commit those that it has."""
        topic, partition = letters[0].record.topic, letters[0].record.partition
        self._hold(member, topic, [partition])
        after = redriven
        for letter in letters:
            after = after.adding(letter.record.offset)
        try:
            _ = after.metadata  # before anything is sent: what cannot be remembered must not be done
        except ValueError as error:
            raise RedriveRefused(f"{topic}/{partition}: {error}") from error
        failures: dict[int, str] = {}
        acknowledged: set[int] = set()

        def told(offset: int) -> Callable[[KafkaError | None, Message], None]:
            def tell(error: KafkaError | None, _: Message) -> None:
                if error is None:
                    acknowledged.add(offset)
                else:
                    failures[offset] = error.str()

            return tell

        for letter in letters:
            producer.produce(
                letter.text(ORIGINAL_TOPIC) or "",
                letter.record.value,
                letter.record.key,
                letter.number(ORIGINAL_PARTITION) or 0,
                headers=list(letter.own_headers),
                on_delivery=told(letter.record.offset),
            )
        producer.flush(2 * ANSWER_WITHIN_S)
        for letter in letters:
            if letter.record.offset in acknowledged:
                redriven = redriven.adding(letter.record.offset)
        if acknowledged:
            self._commit(member, topic, partition, redriven)
        sent = tuple(letter.record.position for letter in letters if letter.record.offset in acknowledged)
        refused = tuple(
            (letter.record.position, failures.get(letter.record.offset, "Kafka did not acknowledge it in time"))
            for letter in letters
            if letter.record.offset not in acknowledged
        )
        return redriven, Redrive(sent, refused)

    def _commit(self, member: Consumer, topic: str, partition: int, redriven: Redriven) -> None:
        place = TopicPartition(topic, partition, redriven.upto, redriven.metadata)
        try:
            member.commit(offsets=[place], asynchronous=False)
        except KafkaException as error:
            raise StoreUnavailable(
                f"letters of {topic}/{partition} were sent, and that could not be committed ({error.args[0].str()}): "
                "the next redrive sends the last of them again"
            ) from error

    # --- the group ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _member(self, topic: str, partitions: Sequence[int]) -> Iterator[Consumer]:
        """Membership in the group, with ``partitions`` of ``topic`` in hand. Raises RedriveRefused where others are."""
        consumer = Consumer(
            {
                **self._client,
                "group.id": self._group,
                "session.timeout.ms": SESSION_MS,
                "heartbeat.interval.ms": SESSION_MS // 4,
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
            }
        )
        try:
            consumer.subscribe([topic], on_assign=_take_paused)
            give_up_at = time.monotonic() + JOIN_WITHIN_S
            while not consumer.assignment():
                _served(consumer, 0.2)
                if time.monotonic() > give_up_at:
                    raise RedriveRefused(
                        f"no partition of {topic} was given to this process within {JOIN_WITHIN_S:.0f} s: "
                        "another redrive holds them, or Kafka is away; try again"
                    )
            self._hold(consumer, topic, partitions)
            yield consumer
        finally:
            consumer.close()

    def _hold(self, member: Consumer, topic: str, partitions: Sequence[int]) -> None:
        """Serve a rebalance that may be due, then check that the partitions are still ours."""
        _served(member, 0)
        held = {place.partition for place in member.assignment()}
        if missing := sorted(set(partitions) - held):
            raise RedriveRefused(
                f"another redrive of {topic} is running and holds partitions {', '.join(map(str, missing))}: "
                "wait until it ends, then ask again for what is left"
            )

    # --- reading ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _reader(self) -> Iterator[Consumer]:
        """A consumer that reads positions and records and belongs to no group."""
        consumer = Consumer(
            {
                **self._client,
                "group.id": self._group,
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",
                "isolation.level": "read_uncommitted",
            }
        )
        try:
            yield consumer
        finally:
            consumer.close()

    def _state(self, reader: Consumer, topic: str, partition: int) -> PartitionState:
        place = TopicPartition(topic, partition)
        first, end = _patient(lambda: reader.get_watermark_offsets(place, timeout=ANSWER_WITHIN_S))
        return PartitionState(partition, first, end, self._position(reader, topic, partition).from_at_least(first))

    def _position(self, reader: Consumer, topic: str, partition: int) -> Redriven:
        """What the group's commit says; without one, letters that a forgotten commit may cover count as redriven."""
        with self._answering(f"reading the position of {topic}/{partition}"):
            (found,) = _patient(lambda: reader.committed([TopicPartition(topic, partition)], timeout=ANSWER_WITHIN_S))
            if found.offset != OFFSET_INVALID:
                return Redriven.read(found.offset, found.metadata or "")
            known_from_ms = int(time.time() * 1000) - self._remembered_ms()
            known_from = TopicPartition(topic, partition, known_from_ms)
            (young,) = _patient(lambda: reader.offsets_for_times([known_from], timeout=ANSWER_WITHIN_S))
            if young.offset >= 0:
                return Redriven(young.offset)
            place = TopicPartition(topic, partition)
            _, end = _patient(lambda: reader.get_watermark_offsets(place, timeout=ANSWER_WITHIN_S))
            return Redriven(end)

    def _remembered_ms(self) -> int:
        """How long Kafka remembers the commits of an idle group."""
        admin = AdminClient(self._client)
        broker = next(iter(admin.list_topics(timeout=ANSWER_WITHIN_S).brokers))
        resource = ConfigResource(ResourceType.BROKER, str(broker))
        try:
            (asked,) = admin.describe_configs([resource], request_timeout=ANSWER_WITHIN_S).values()
            minutes = int(asked.result(timeout=ANSWER_WITHIN_S)["offsets.retention.minutes"].value)
        except (KafkaException, KeyError, ValueError):
            # Some services do not let clients read their configuration.
            minutes = RETENTION_MINUTES
        return minutes * 60_000

    def _letters(self, topic: str, state: PartitionState, start: int, end: int) -> Iterator[DeadLetter]:
        """The letters from ``start`` to below ``end``, in order."""
        if start >= end or start < state.first:
            return
        with self._reader() as reader:
            reader.assign([TopicPartition(topic, state.partition, start)])
            quiet_since = time.monotonic()
            while time.monotonic() - quiet_since < ANSWER_WITHIN_S:
                message = reader.poll(0.5)
                if message is None:
                    continue
                error = message.error()
                if error is not None:
                    if error.code() == KafkaError._PARTITION_EOF:
                        return
                    raise StoreUnavailable(f"{topic}/{state.partition} cannot be read: {error.str()}")
                record = _inbound(message)
                if record.offset >= end:
                    return
                yield DeadLetter(record, record.offset in state.redriven)
                quiet_since = time.monotonic()
                if record.offset == end - 1:
                    return
        raise StoreUnavailable(f"{topic}/{state.partition} gave nothing for {ANSWER_WITHIN_S:.0f} s: is Kafka up?")

    @contextmanager
    def _answering(self, doing: str) -> Iterator[None]:
        try:
            yield
        except KafkaException as error:
            raise StoreUnavailable(f"Kafka at {self._bootstrap}: {doing}: {error.args[0].str()}") from error


def _patient(ask: Callable[[], _T]) -> _T:
    """What Kafka answers; asked again, within a bound, while a partition's leader or the coordinator is moving."""
    give_up_at = time.monotonic() + ANSWER_WITHIN_S
    while True:
        try:
            return ask()
        except KafkaException as error:
            if error.args[0].code() not in _MOVING or time.monotonic() > give_up_at:
                raise
        time.sleep(_POLL_S)


def _batches(letters: Iterable[DeadLetter]) -> Iterator[list[DeadLetter]]:
    rest = iter(letters)
    while batch := list(islice(rest, BATCH_LETTERS)):
        yield batch


def _take_paused(consumer: Consumer, places: list[TopicPartition]) -> None:
    # The group is a lock and a memory here; letters are read beside it.
    consumer.assign(places)
    consumer.pause(places)


def _served(consumer: Consumer, timeout_s: float) -> None:
    message = consumer.poll(timeout_s)
    error = None if message is None else message.error()
    if error is not None and error.fatal():
        raise StoreUnavailable(f"the redrive group cannot be joined: {error.str()}")


def _inbound(message: Message) -> InboundRecord:
    headers: Any = message.headers() or ()
    return InboundRecord(
        str(message.topic()),
        int(message.partition() or 0),
        int(message.offset() or 0),
        int(message.timestamp()[1]),
        _bytes(message.key()),
        _bytes(message.value()),
        tuple((name, value or b"") for name, value in headers),
    )


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value
