"""The registry's topic: revisions published by compare-and-swap, followed by every worker.

The topic is compacted and has one partition. A revision is a record of its own (key: its id, value: zstd of its
canonical JSON); the record under the key ``current`` points at the one that counts. Compaction keeps the last record
of a key, so a publisher that lost a race must never write: publishers share one transactional id, which fences all but
the latest; that one reads to the end, checks that the head is still what its caller saw, and writes both records in
one transaction.

The pointer of before is compacted away, so each revision record carries its publications in headers, one a header, the
oldest first: what a history is told from. A revision that is published again carries those of before too.

A follower believes nothing: a revision whose content does not hash to its id, or would be refused by ``apply``, is
refused, counted and logged, and the last good one stays. Governance is judged when a version is to decide, for it
depends on the day: what nobody approved is logged and counted here, and not asked (``routing``).
"""

import asyncio
import contextlib
import logging
import re
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import orjson
import structlog
import zstandard
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError as AiokafkaError
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka import TopicPartition as AssignedPartition
from prometheus_client import Counter, Gauge

from app.adapters.kafka_clients import REQUEST_TIMEOUT_MS, close_clients
from app.adapters.topics import CONNECT_WITHIN_S, REGISTRY_TOPIC, refused_by_kafka
from app.domain.documents import Document
from app.domain.errors import (
    ConfigurationError,
    DocumentsRefused,
    Fault,
    HeadRefused,
    PublisherFenced,
    PublishFailed,
    RevisionConflict,
    StoreUnavailable,
)
from app.domain.registry import REVISION_BYTES_MAX, Revision, canonical, load_revision, unapproved_of
from app.garbage import uncollected
from app.settings import Settings

POINTER_KEY: Final = b"current"
REVISIONS_KEPT: Final = 16
"""Revisions that a follower holds, compressed: a pending join lives for a deadline, an hour at most."""
COMPILED_KEPT: Final = 4
"""Revisions that it holds ready to use."""
RECORD_BYTES_MAX: Final = REVISION_BYTES_MAX + 65_536
PUBLICATION_HEADER: Final = "publication"
PUBLICATIONS_KEPT: Final = 50
"""Publications of one revision that its record tells, the last ones; headers count into a record's size."""
MESSAGE_LENGTH_MAX: Final = 500
POINTER_DELETED: Final = (
    "the pointer to the current revision was deleted; workers keep the last good one; publish again with "
    "`model-broker apply -f DIR`"
)
"""What commands say then: that nothing was ever published would be untrue."""

POINTER_UNREADABLE: Final = (
    "the pointer to the current revision cannot be read; workers keep the last good one; publish again with "
    "`model-broker apply -f DIR`"
)

_REVISION_ID: Final = re.compile(r"sha256:[0-9a-f]{64}")
_POLL_MS: Final = 500
_RETRY_S: Final = 1.0
_REFUSAL_LENGTH_MAX: Final = 300

_log = structlog.get_logger()
# librdkafka logs at its own discretion what its exceptions say too; being fenced is an outcome here, not an emergency.
_librdkafka = logging.getLogger(f"{__name__}.librdkafka")
_librdkafka.addHandler(logging.NullHandler())
_librdkafka.propagate = False

SWITCHES = Counter("broker_registry_switches", "Times that this process went over to a newly published revision.")
REFUSED = Counter("broker_registry_refused", "Records on the registry's topic that were refused, by kind.", ["record"])
DOCUMENTS = Gauge("broker_registry_documents", "Documents of the revision in use; 0: none is loaded.")
PUBLISHED = Gauge("broker_registry_published_timestamp_seconds", "When the revision in use was published.")
UNAPPROVED = Gauge("broker_registry_unapproved", "Uses of versions that nobody approved, in the revision in use.")
REVISION = Gauge("broker_registry_revision_info", "1, for the revision in use.", ["revision"])


@dataclass(frozen=True, slots=True)
class Pointer:
    """What the key ``current`` holds: which revision counts since when, which one it replaced, and why.

    ``offset`` is where a publication lay that a later one of the same revision has carried along; else None.
    """

    revision: str
    previous: str | None
    published_at: int
    documents: int
    message: str | None = None
    offset: int | None = None

    @classmethod
    def read(cls, value: bytes) -> "Pointer":
        """The pointer in a record's value; ValueError says why it is none."""
        try:
            content = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("revision"), str):
            raise ValueError("not an object with a revision")
        previous, published_at, documents = (content.get(key) for key in ("previous", "published_at", "documents"))
        message = content.get("message")
        if not isinstance(previous, str | None) or not isinstance(message, str | None):
            raise ValueError("previous or message is not text or null")
        if not isinstance(published_at, int) or not isinstance(documents, int):
            raise ValueError("published_at or documents is not a whole number")
        offset = content.get("offset")
        if not isinstance(offset, int | None):
            raise ValueError("offset is not a whole number")
        return cls(content["revision"], previous, published_at, documents, message, offset)

    def as_bytes(self) -> bytes:
        """The record's value; ``published_at`` is in epoch milliseconds."""
        content = asdict(self)
        if self.offset is None:
            del content["offset"]
        return orjson.dumps(content)


@dataclass(frozen=True, slots=True)
class Published:
    """A pointer, and the revision that it names."""

    pointer: Pointer
    revision: Revision


@dataclass(frozen=True, slots=True)
class Head:
    """What the topic ends in. ``published`` is None where nothing was published, or where it is refused: ``faults``.

    ``last_good`` is what workers go by: the published one, or where that is refused the last sound one before it.
    ``deleted``: revisions were published, and the pointer that named the current one is gone. ``offset`` is that of the
    last record under ``current``: it tells one pointer that cannot be read from another.
    """

    id: str | None
    published: Published | None
    last_good: Revision | None = None
    faults: tuple[Fault, ...] = ()
    deleted: bool = False
    offset: int | None = None

    @property
    def refusal(self) -> str | None:
        """Why workers go by ``last_good`` and not by what the pointer says; None where the pointer is good."""
        if self.deleted:
            return POINTER_DELETED
        return "; ".join(str(each) for each in self.faults) or None

    @property
    def carried(self) -> tuple[Document, ...]:
        """The documents whose status goes over to the next revision: those that workers go by."""
        return self.last_good.documents if self.last_good is not None else ()


@dataclass(frozen=True, slots=True)
class Publication:
    """One line of the history. Where its record does not tell, the time is Kafka's and the rest None.

    ``refused`` is why workers go by an older one instead; it is known of the last ``REVISIONS_KEPT``.
    """

    revision: str
    published_at: int
    previous: str | None
    documents: int | None
    message: str | None
    current: bool = False
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class History:
    """What was published, the newest first; ``faults``: why workers refuse what the pointer says now."""

    publications: tuple[Publication, ...]
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """A revision looked up, and what the topic ends in meanwhile."""

    revision: Revision
    head: Head


# --- reading and publishing, for commands -----------------------------------------------------------------------------


def read_head(settings: Settings, *, timeout_s: float = 30.0) -> Head:
    """The end of the topic as it is now, sound or not.

    Raises:
        ConfigurationError: Kafka does not answer at all, or there is no registry topic.
        StoreUnavailable: Kafka stops answering, for ``timeout_s``.
    """
    return _head_of(_read_topic(settings, timeout_s))


def _head_of(topic: "_Topic") -> Head:
    if topic.pointer is None:
        deleted = bool(topic.records) and not topic.faults
        return Head(None, None, topic.contents.newest_sound(), topic.faults, deleted, topic.pointer_offset)
    try:
        revision = topic.contents.load(topic.pointer.revision)
    except DocumentsRefused as error:
        last_good = topic.contents.newest_sound()
        return Head(topic.pointer.revision, None, last_good, error.faults, offset=topic.pointer_offset)
    return Head(topic.pointer.revision, Published(topic.pointer, revision), revision, offset=topic.pointer_offset)


def read_history(settings: Settings, *, timeout_s: float = 30.0) -> History:
    """Every publication that the topic tells of, in the order in which they were written, whatever the clocks said.

    ``current`` is what is pointed at, or where the pointer cannot be read the last sound one, by which workers go.

    Raises:
        ConfigurationError, StoreUnavailable: as ``read_head``.
    """
    topic = _read_topic(settings, timeout_s)
    lines = _in_log_order(topic.records)
    lines.reverse()
    faults = topic.faults
    if topic.pointer is None:
        last_good = topic.contents.newest_sound()
        current = None if last_good is None else last_good.id
        if lines and not faults:
            faults = (Fault(settings.topic(REGISTRY_TOPIC), "", "current", POINTER_DELETED),)
    else:
        current = topic.pointer.revision
    newest = next((at for at, one in enumerate(lines) if one.revision == current), None)
    refused = {identity: topic.contents.refusal(identity) for identity in topic.contents}
    told = (replace(one, current=at == newest, refused=refused.get(one.revision)) for at, one in enumerate(lines))
    return History(tuple(told), faults)


def _in_log_order(records: Mapping[str, "_Record"]) -> list[Publication]:
    """What the records tell, the oldest first; what was carried along without its place is placed by its time."""
    placed: list[tuple[int, Publication]] = []
    unplaced: list[Publication] = []
    for identity, record in records.items():
        if not record.publications:
            placed.append((record.offset, Publication(identity, record.written_at, None, None, None)))
        for each in record.placed:
            told = Publication(each.revision, each.published_at, each.previous, each.documents, each.message)
            if each.offset is None:
                unplaced.append(told)
            else:
                placed.append((each.offset, told))
    placed.sort(key=lambda line: line[0])
    lines = [told for _, told in placed]
    for told in sorted(unplaced, key=lambda one: one.published_at):
        before = [at for at, line in enumerate(lines) if line.published_at <= told.published_at]
        lines.insert(before[-1] + 1 if before else 0, told)
    return lines


def find_revision(settings: Settings, beginning: str, *, timeout_s: float = 30.0) -> Found:
    """The revision whose id begins with ``beginning``, with or without ``sha256:``, however old it is.

    Raises:
        ConfigurationError: no revision's id does, or several do; or there is no registry topic.
        StoreUnavailable: as ``read_head``.
        DocumentsRefused: it is not a sound revision.
    """
    digits = beginning.removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{4,64}", digits):
        raise ConfigurationError(f"{beginning!r} is no beginning of a revision's id: give 4 hexadecimal digits or more")
    topic = _read_topic(settings, timeout_s, wanted=f"sha256:{digits}")
    found = [identity for identity in topic.records if identity.startswith(f"sha256:{digits}")]
    if len(found) != 1:
        several = f"{len(found)} revisions begin so: {', '.join(found[:5])}; give more of it"
        raise ConfigurationError(several if found else f"no revision {beginning}: `model-broker history` lists them")
    return Found(topic.wanted.load(found[0]), _head_of(topic))


def read_published(settings: Settings, *, timeout_s: float = 30.0) -> Published | None:
    """The current revision, or None where none was published yet.

    Raises:
        ConfigurationError, StoreUnavailable: as ``read_head``; or the pointer to the current revision was deleted.
        DocumentsRefused: what the topic points at is not a sound revision.
    """
    head = read_head(settings, timeout_s=timeout_s)
    if head.deleted:
        raise ConfigurationError(f"{settings.topic(REGISTRY_TOPIC)}: {POINTER_DELETED}")
    if head.faults:
        raise DocumentsRefused(head.faults)
    return head.published


def publish_revision(
    settings: Settings,
    revision: Revision,
    *,
    expected: Head | str | None,
    now_ms: int,
    message: str | None = None,
    timeout_s: float = 30.0,
) -> Pointer:
    """Make ``revision`` the current one, provided that the current one still is ``expected`` (None: there is none).

    A head stands for what it says is current; where workers refuse that, the very same record must be the last still.
    ``now_ms`` is when it counts as published, in epoch milliseconds. ``message`` says in the history why; line breaks
    become spaces, and what is too long is cut.

    Raises:
        RevisionConflict: another revision was published meanwhile; nothing was written.
        PublisherFenced: another publisher is at it; nothing was written.
        ConfigurationError, StoreUnavailable: as ``read_published``; nothing was written.
        PublishFailed: Kafka did not confirm; whether it was published is told by reading.
    """
    said = " ".join(message.split())[:MESSAGE_LENGTH_MAX] if message else None
    previous = expected.id if isinstance(expected, Head) else expected
    pointer = Pointer(revision.id, previous, now_ms, len(revision.documents), said or None)
    topic = settings.topic(REGISTRY_TOPIC)
    producer = Producer(
        {
            "bootstrap.servers": settings.kafka_bootstrap,
            "transactional.id": f"{topic}.publisher",
            "message.max.bytes": RECORD_BYTES_MAX,
            "transaction.timeout.ms": int(timeout_s * 1_000),
        },
        logger=_librdkafka,
    )
    # Until a transaction has begun nothing can have been written, and until its commit was asked for nothing counts.
    committing = False
    try:
        producer.init_transactions(timeout_s)
        found_topic = _read_topic(settings, timeout_s)
        found = found_topic.pointer.revision if found_topic.pointer is not None else None
        if found != previous:
            raise RevisionConflict(
                f"the current revision is {found or 'none'} by now, not {previous or 'none'}: nothing was published; "
                "look at the difference again and apply again"
            )
        if isinstance(expected, Head) and expected.published is None and expected.offset != found_topic.pointer_offset:
            raise RevisionConflict(
                "somebody wrote another pointer to the current revision by now: nothing was published; look at the "
                "difference again and apply again"
            )
        producer.begin_transaction()
        content = zstandard.ZstdCompressor(level=10).compress(canonical(revision.documents))
        before = found_topic.records.get(revision.id)
        told = [each.as_bytes() for each in before.placed[1 - PUBLICATIONS_KEPT :]] if before else []
        headers: list[tuple[str, str | bytes | None]] = [
            (PUBLICATION_HEADER, each) for each in (*told, pointer.as_bytes())
        ]
        producer.produce(topic, key=revision.id.encode(), value=content, headers=headers, partition=0)
        producer.produce(topic, key=POINTER_KEY, value=pointer.as_bytes(), partition=0)
        committing = True
        producer.commit_transaction(timeout_s)
    except KafkaException as error:
        reason = error.args[0]
        if reason.code() in (KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.PRODUCER_FENCED):
            raise PublisherFenced(
                "another publisher took over while this one was at it: nothing was published; apply again"
            ) from error
        committing = committing and not reason.txn_requires_abort()
        if committing:
            raise PublishFailed(
                f"Kafka did not confirm revision {revision.id} ({reason.str()}): see with `model-broker get routes` or "
                "`apply --dry-run` whether it is the current one, and apply again if not"
            ) from error
        raise StoreUnavailable(
            f"Kafka at {settings.kafka_bootstrap}: publishing to {topic}: {reason.str()}; nothing was published"
        ) from error
    finally:
        # An unfinished transaction would hold readers back until it times out.
        if not committing:
            with contextlib.suppress(KafkaException):
                producer.abort_transaction(5.0)
    return pointer


def publish_next(
    settings: Settings,
    revision: Revision,
    *,
    before: str,
    now_ms: int,
    message: str,
    over_refused: bool,
    timeout_s: float = 30.0,
) -> Pointer:
    """Make ``revision`` the current one, provided that workers still go by ``before``, from which it was made.

    ``over_refused``: also where the topic's end is refused, and ``before`` is the last good revision, which stays.

    Raises:
        HeadRefused: the topic's end is refused; nothing was written.
        RevisionConflict, StoreUnavailable, PublishFailed: as ``publish_revision``.
    """
    head = read_head(settings, timeout_s=timeout_s)
    good = head.last_good.id if head.last_good is not None else None
    if head.refusal is not None and not (over_refused and good == before):
        raise HeadRefused(head.refusal)
    if good != before:
        raise RevisionConflict(f"workers go by {good or 'none'} by now, not by {before}: nothing was published")
    return publish_revision(settings, revision, expected=head, now_ms=now_ms, message=message, timeout_s=timeout_s)


@dataclass(frozen=True, slots=True)
class _Record:
    """What a revision's record tells beside its content."""

    offset: int
    written_at: int
    publications: tuple[Pointer, ...]

    @property
    def placed(self) -> tuple[Pointer, ...]:
        """The publications; the last one lies where the record does."""
        return (*self.publications[:-1], *(replace(each, offset=self.offset) for each in self.publications[-1:]))


@dataclass(slots=True)
class _Topic:
    """The topic, read to its end. ``wanted`` has what was asked for beside the last contents."""

    pointer: Pointer | None = None
    pointer_offset: int | None = None
    faults: tuple[Fault, ...] = ()
    records: dict[str, _Record] = field(default_factory=dict)
    contents: "_Contents" = field(default_factory=lambda: _Contents(REVISIONS_KEPT))
    wanted: "_Contents" = field(default_factory=lambda: _Contents(1))


def _read_topic(settings: Settings, timeout_s: float, *, wanted: str | None = None) -> _Topic:
    """``wanted``: the beginning of an id whose content is kept too, however old it is."""
    name = settings.topic(REGISTRY_TOPIC)
    topic = _Topic()
    last: bytes | None = None
    for message in _records(settings.kafka_bootstrap, name, timeout_s):
        key, value = message.key(), message.value()
        if key == POINTER_KEY:
            last, topic.pointer_offset = value, message.offset()
            topic.contents.note(value)
        elif value is not None and (identity := _identity(key)) is not None:
            topic.records[identity] = _Record(message.offset() or 0, message.timestamp()[1], _publications(message))
            published = bool(topic.records[identity].publications)
            topic.contents.add(identity, value, message.timestamp()[1], published=published)
            if wanted is not None and identity.startswith(wanted):
                topic.wanted.add(identity, value, message.timestamp()[1], published=published)
    if last is not None:
        try:
            topic.pointer = Pointer.read(last)
        except ValueError as error:
            topic.faults = (Fault(name, "", "current", f"{POINTER_UNREADABLE} ({error})"),)
    return topic


def _identity(key: str | bytes | None) -> str | None:
    """The revision that a record's key names; None for a stray record, which must not push a revision out."""
    text = key.decode("utf-8", "replace") if isinstance(key, bytes) else key or ""
    return text if _REVISION_ID.fullmatch(text) else None


def _publications(message: Message) -> tuple[Pointer, ...]:
    """What a revision record's headers tell; a record without, or with others, was not written by ``apply``."""
    # The client gives headers as pairs; its types allow for a mapping, which it takes when sending.
    pairs: list[tuple[str, str | bytes | None]] = list(message.headers() or ())  # type: ignore[arg-type]
    return _told_by(message.key(), pairs)


def _told_by(key: str | bytes | None, headers: Iterable[tuple[str, str | bytes | None]]) -> tuple[Pointer, ...]:
    """The publications of the revision ``key`` that a record's headers tell."""
    found = []
    for name, value in headers:
        if name == PUBLICATION_HEADER and isinstance(value, bytes):
            with contextlib.suppress(ValueError):
                pointer = Pointer.read(value)
                if pointer.revision.encode() == key:
                    found.append(pointer)
    return tuple(found)


def _records(bootstrap: str, topic: str, timeout_s: float) -> Iterator[Message]:
    """All committed records of the topic's partition, to its end as it is now."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            # The client wants a group's name even where the partition is assigned by hand and nothing is committed.
            "group.id": f"{topic}.reader.{uuid.uuid4()}",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "fetch.message.max.bytes": RECORD_BYTES_MAX,
            "fetch.max.bytes": 2 * RECORD_BYTES_MAX,
            "receive.message.max.bytes": 3 * RECORD_BYTES_MAX,
        },
        logger=_librdkafka,
    )
    try:
        try:
            known = consumer.list_topics(topic, timeout=min(timeout_s, CONNECT_WITHIN_S)).topics[topic]
        except KafkaException as failure:
            raise refused_by_kafka(bootstrap, f"reading {topic}", failure) from failure
        if known.error is not None:
            raise ConfigurationError(f"no topic {topic}: create it with `model-broker topics apply`")
        consumer.assign([AssignedPartition(topic, 0, OFFSET_BEGINNING)])
        while True:
            message = consumer.poll(timeout_s)
            if message is None:
                raise StoreUnavailable(f"Kafka at {bootstrap}: reading {topic} took more than {timeout_s:.0f} s")
            error = message.error()
            if error is None:
                yield message
            elif error.code() == KafkaError._PARTITION_EOF:
                return
            elif not error.retriable():
                raise KafkaException(error)
    except KafkaException as error:
        reason = error.args[0].str()
        raise StoreUnavailable(
            f"Kafka at {bootstrap}: reading {topic}: {reason}; is it running, and is BROKER_KAFKA_BOOTSTRAP right?"
        ) from error
    finally:
        consumer.close()


# --- contents ---------------------------------------------------------------------------------------------------------


class _Contents:
    """The contents of the last ``kept`` revisions as they were published, compressed.

    A record alone publishes nothing: those that were never in force go first. ``_in_force``: the others, the one that
    was last so at the end.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._compressed: OrderedDict[str, bytes] = OrderedDict()
        self._written_at: dict[str, int] = {}
        self._in_force: OrderedDict[str, None] = OrderedDict()

    def add(self, identity: str, value: bytes, written_at: int, *, published: bool) -> None:
        """Keep a record's value; ``written_at`` in epoch milliseconds; ``published``: as its headers tell."""
        self._compressed[identity] = value
        self._written_at[identity] = written_at
        self._compressed.move_to_end(identity)
        if published:
            self._comes_into_force(identity)
        if len(self._compressed) > self._kept:
            spare = (each for each in self._compressed if each not in self._in_force and each != identity)
            out = next(spare, None) or next(iter(self._in_force))
            del self._compressed[out], self._written_at[out]
            self._in_force.pop(out, None)

    def note(self, pointer: bytes | None) -> None:
        """A pointer, as it was read: what it names is in force, whoever wrote it."""
        with contextlib.suppress(ValueError):
            named = Pointer.read(pointer or b"").revision
            if named in self._compressed:
                self._comes_into_force(named)

    def _comes_into_force(self, identity: str) -> None:
        self._in_force[identity] = None
        self._in_force.move_to_end(identity)

    def written_at(self, identity: str) -> int:
        """When the record of one of them was written, in epoch milliseconds."""
        return self._written_at[identity]

    def load(self, identity: str) -> Revision:
        """The revision, checked and compiled. Raises DocumentsRefused."""
        at = f"revision {identity[:80]}"
        compressed = self._compressed.get(identity)
        if compressed is None:
            raise DocumentsRefused([Fault(at, "", "", "is not on the topic, or was published too long ago")])
        try:
            # A frame says how much it holds; believing it without a bound would let one record exhaust the memory.
            size = zstandard.frame_content_size(compressed)
            if not 0 <= size <= REVISION_BYTES_MAX:
                raise DocumentsRefused([Fault(at, "", "", f"holds {size} bytes; {REVISION_BYTES_MAX} are allowed")])
            content = zstandard.ZstdDecompressor().decompress(compressed)
        except zstandard.ZstdError as error:
            raise DocumentsRefused([Fault(at, "", "", f"not zstd: {error}")]) from error
        with uncollected():
            return load_revision(identity, content)

    def newest_sound(self) -> Revision | None:
        """Of those that load, the one that was last in force."""
        for identity in reversed(self._in_force):
            with contextlib.suppress(DocumentsRefused):
                return self.load(identity)
        return None

    def refusal(self, identity: str) -> str | None:
        """Why workers refuse the revision; None where it is sound."""
        try:
            self.load(identity)
        except DocumentsRefused as error:
            first, *more = error.faults
            said = ": ".join(part for part in (first.document, first.field, first.message) if part)
            return said[:_REFUSAL_LENGTH_MAX] + (f" (and {len(more)} more)" if more else "")
        return None

    def __contains__(self, identity: str) -> bool:
        return identity in self._compressed

    def __iter__(self) -> Iterator[str]:
        return iter(self._compressed)


# --- following, for workers -------------------------------------------------------------------------------------------


class RegistryFollower:
    """Keeps ``current`` at the last good revision on the topic, within a second of its publication.

    Older pointers are compacted away. So who starts where the last one is bad, or gone, goes by the sound revision that
    was in force last, as commands do: it is the one that whoever runs already has kept.

    ``on_switch`` is called in the event loop with each revision gone over to. Reading is without a consumer group:
    every process reads everything. Kafka being away changes nothing; what was published meanwhile comes
    when it is back.
    """

    def __init__(self, settings: Settings, *, on_switch: Sequence[Callable[[Revision], None]] = ()) -> None:
        self._bootstrap = settings.kafka_bootstrap
        self._partition = TopicPartition(settings.topic(REGISTRY_TOPIC), 0)
        self._on_switch = tuple(on_switch)
        self._contents = _Contents(REVISIONS_KEPT)
        self._compiled: OrderedDict[str, Revision] = OrderedDict()
        self._compiled_lock = threading.Lock()
        self._current: Published | None = None
        self._blank = True
        self._adopted = asyncio.Event()
        self._consumer: AIOKafkaConsumer | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def current(self) -> Revision | None:
        """See ports.registry.Registry."""
        return self._current.revision if self._current is not None else None

    @property
    def published_at_ms(self) -> int | None:
        """When the current revision was published."""
        return self._current.pointer.published_at if self._current is not None else None

    @property
    def blank(self) -> bool:
        """See ports.registry.Registry."""
        return self._blank

    @property
    def healthy(self) -> bool:
        """See ports.registry.Registry."""
        return self._current is not None and self._reading is not None and not self._reading.done()

    def get(self, revision_id: str) -> Revision | None:
        """See ports.registry.Registry. Compiles at the first call for an old revision."""
        if self._current is not None and self._current.revision.id == revision_id:
            return self._current.revision
        if revision_id not in self._contents and revision_id not in self._compiled:
            return None
        try:
            return self._load(revision_id)
        except DocumentsRefused as error:
            _log.error("registry_revision_refused", revision=revision_id, faults=[str(each) for each in error.faults])
            return None

    async def usable(self) -> None:
        """Returns once there is a revision; at once where nothing was ever published, for that is an answer, too."""
        if not self._blank:
            await self._adopted.wait()

    async def start(self, *, timeout_s: float = 30.0) -> None:
        """Read what was published so far, then follow.

        Raises:
            ConfigurationError: no registry topic, or Kafka does not answer within ``timeout_s``.
        """
        topic = self._partition.topic
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_partition_fetch_bytes=RECORD_BYTES_MAX,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        try:
            async with asyncio.timeout(timeout_s):
                await consumer.start()
                if topic not in await consumer.topics():
                    raise ConfigurationError(f"no topic {topic}: create it with `model-broker topics apply`")
                consumer.assign([self._partition])
                await consumer.seek_to_beginning(self._partition)
                end = (await consumer.end_offsets([self._partition]))[self._partition]
                await self._read_until(consumer, end)
        except (AiokafkaError, TimeoutError) as error:
            await close_clients(consumer.stop())
            raise ConfigurationError(
                f"Kafka at {self._bootstrap}: reading {topic}: {error or f'no answer within {timeout_s:.0f} s'}; "
                "is it running, and is BROKER_KAFKA_BOOTSTRAP right?"
            ) from error
        except BaseException:
            await close_clients(consumer.stop())
            raise
        self._consumer = consumer
        self._reading = asyncio.create_task(self._follow(consumer), name="registry-follower")
        self._reading.add_done_callback(_tell_if_failed)

    async def stop(self) -> None:
        """Stop following; ``current`` stays."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._consumer is not None:
            await close_clients(self._consumer.stop())
            self._consumer = None

    async def _read_until(self, consumer: AIOKafkaConsumer, end: int) -> None:
        pointers: list[bytes | None] = []
        while await consumer.position(self._partition) < end:
            pointers += self._take(await consumer.getmany(self._partition, timeout_ms=_POLL_MS))
            del pointers[:-REVISIONS_KEPT]
        await self._switch(pointers)
        if self._current is None:
            await self._fall_back(None if pointers else "there is no pointer to the current revision")

    async def _follow(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            try:
                pointers = self._take(await consumer.getmany(self._partition, timeout_ms=_POLL_MS))
                await self._switch(pointers)
                if pointers and self._current is None:
                    await self._fall_back(None)
            except AiokafkaError as error:
                # The client reconnects by itself; what it gives up on is tried again, at a pace that logs can bear.
                _log.warning("registry_read_failed", error=repr(error))
                await asyncio.sleep(_RETRY_S)

    def _take(self, batches: dict[TopicPartition, list[Any]]) -> list[bytes | None]:
        """Keep the revisions that were read; returns the pointers, in order."""
        pointers: list[bytes | None] = []
        for record in batches.get(self._partition, ()):
            if record.key == POINTER_KEY:
                self._blank = False
                pointers.append(record.value)
                self._contents.note(record.value)
            elif (identity := _identity(record.key)) is None:
                REFUSED.labels("stray").inc()
                _log.error("registry_record_stray", offset=record.offset, key=repr(record.key)[:100])
            elif record.value is not None:
                self._blank = False
                published = bool(_told_by(record.key, record.headers))
                self._contents.add(identity, record.value, record.timestamp, published=published)
        return pointers

    async def _switch(self, pointers: list[bytes | None]) -> None:
        """Go over to the last good revision that ``pointers`` name, if any; each bad one after it is an alarm."""
        for value in reversed(pointers):
            record = "pointer"
            try:
                if value is None:
                    raise ValueError("it was deleted")
                pointer = Pointer.read(value)
                record = "revision"
                # Compiling thousands of documents takes a second; requests are decided meanwhile.
                revision = await asyncio.to_thread(self._load, pointer.revision)
            except (ValueError, DocumentsRefused) as error:
                REFUSED.labels(record).inc()
                faults = [str(each) for each in error.faults] if isinstance(error, DocumentsRefused) else [str(error)]
                kept = self.current.id if self.current is not None else None
                _log.error("registry_refused", record=record, faults=faults[:20], faults_total=len(faults), kept=kept)
                continue
            self._adopt(Published(pointer, revision))
            return

    async def _fall_back(self, fault: str | None) -> None:
        """Go by the newest sound revision, if there is any; ``fault``: what is wrong and not yet an alarm."""
        if self._blank:
            return
        newest = await asyncio.to_thread(self._contents.newest_sound)
        kept = newest.id if newest is not None else None
        if fault is not None:
            REFUSED.labels("pointer").inc()
            _log.error("registry_refused", record="pointer", faults=[fault], faults_total=1, kept=kept)
        if newest is None:
            _log.error("registry_without_revision", hint="no published revision is sound: run `model-broker apply`")
            return
        _log.error("registry_fell_back", revision=newest.id, hint="run `model-broker apply` to publish anew")
        written_at = self._contents.written_at(newest.id)
        self._adopt(Published(Pointer(newest.id, None, written_at, len(newest.documents)), newest))

    def _adopt(self, published: Published) -> None:
        before = self.current
        self._current = published
        self._adopted.set()
        DOCUMENTS.set(len(published.revision.documents))
        PUBLISHED.set(published.pointer.published_at / 1_000)
        if before is not None and before.id == published.revision.id:
            return
        SWITCHES.inc()
        unapproved = unapproved_of(published.revision)
        UNAPPROVED.set(len(unapproved))
        if unapproved:
            # `apply` refuses them, so somebody wrote the revision by hand.
            _log.error("registry_unapproved", revision=published.revision.id, uses=unapproved[:20])
        REVISION.labels(published.revision.id).set(1)
        if before is not None:
            with contextlib.suppress(KeyError):
                REVISION.remove(before.id)
        _log.info(
            "registry_switched",
            revision=published.revision.id,
            previous=before.id if before is not None else None,
            documents=len(published.revision.documents),
        )
        for callback in self._on_switch:
            callback(published.revision)

    def _load(self, revision_id: str) -> Revision:
        # Runs in the event loop and in threads. Compiling is left outside the lock: doing it twice is harmless.
        with self._compiled_lock:
            revision = self._compiled.get(revision_id)
        if revision is None:
            revision = self._contents.load(revision_id)
        with self._compiled_lock:
            self._compiled[revision_id] = revision
            self._compiled.move_to_end(revision_id)
            if len(self._compiled) > COMPILED_KEPT:
                self._compiled.popitem(last=False)
        return revision


def _tell_if_failed(reading: "asyncio.Task[None]") -> None:
    # Nobody awaits the reading; the process goes on with its revision, and is not healthy any more.
    if not reading.cancelled() and (error := reading.exception()) is not None:
        _log.error("registry_follower_failed", exc_info=error)
