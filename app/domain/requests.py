"""Requests: a Kafka record's bytes in; a request, its identity, its deadline and its reply address out.

The address is read first and by itself, so that even a request whose body cannot be read gets an answer. Spring's
header names and FastStream's are both understood, and what correlates is echoed byte for byte under the name it
came by.
"""

import hashlib
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, NewType

import orjson

from app.domain.errors import Code, Problem, RequestRefused, Undecodable

RequestId = NewType("RequestId", str)
Headers = tuple[tuple[str, bytes], ...]

REQUEST_ID_LENGTH_MAX: Final = 128
ROLLOUT_ID_PREFIX: Final = "rollout/"
"""How the ids begin under which a rollout's steps are recorded; no caller's does."""
_CORRELATION_HEADERS: Final = ("kafka_correlationId", "correlation_id")
_REPLY_TOPIC_HEADERS: Final = ("kafka_replyTopic", "reply_to")
_CONTENT_TYPE_HEADERS: Final = ("content-type", "contentType")
_MEMBERS: Final = frozenset({"request_id", "path", "entities", "inputs", "metadata"})
_ID_NAMESPACE: Final = uuid.UUID("5f0e3a52-6d7b-5d9c-8f43-2f6d1f0f6c11")

JSON: Final = "application/json"
AVRO: Final = "application/avro"


@dataclass(frozen=True, slots=True)
class InboundRecord:
    """A consumed Kafka record, as it came."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers

    @property
    def position(self) -> str:
        """Where the record lies: ``topic/partition/offset``."""
        return f"{self.topic}/{self.partition}/{self.offset}"


@dataclass(frozen=True, slots=True)
class ReplyAddress:
    """Where a reply goes, and the headers that correlate it, exactly as they came."""

    topic: str
    partition: int | None
    correlation: Headers

    def allowed_by(self, globs: Sequence[str], prefix: str = "") -> bool:
        """Whether a glob admits the topic; the prefix of this broker's own topics is not part of the pattern."""
        return any(fnmatchcase(self.topic, pattern) or fnmatchcase(self.topic, prefix + pattern) for pattern in globs)


@dataclass(frozen=True, slots=True)
class Request:
    """A request that could be read. ``body`` is the digest by which a duplicate is told from a conflict."""

    request_id: RequestId
    path: str
    entities: Mapping[str, Any]
    inputs: Mapping[str, Any]
    metadata: Mapping[str, Any]
    deadline_ms: int | None
    traceparent: str | None
    priority: str
    content_type: str
    body: str
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Envelope:
    """What the headers alone say; readable whatever the body is."""

    request_id: RequestId | None
    address: ReplyAddress | None
    deadline_ms: int | None
    traceparent: str | None
    priority: str
    content_type: str


def _first(headers: Headers, names: Sequence[str]) -> bytes | None:
    """The first header of ``names`` that says something: one without a value, or an empty one, is none."""
    for name, value in headers:
        if value and name in names:
            return value
    return None


def _text(value: bytes | None, header: str) -> str | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RequestRefused(Problem(Code.REQUEST_INVALID, f"header {header} is not UTF-8: send text")) from error


def read_address(headers: Headers) -> ReplyAddress | None:
    """The reply address, or None where none can be read; never raises.

    A partition that is not four bytes is none here, and the envelope refuses it: the refusal goes to the topic.

    >>> read_address((("kafka_replyTopic", b"r"), ("kafka_correlationId", b"1"))).topic
    'r'
    """
    topic = _first(headers, _REPLY_TOPIC_HEADERS)
    if not topic:
        return None
    partition = _first(headers, ("kafka_replyPartition",))
    try:
        name = topic.decode("ascii")
    except UnicodeDecodeError:
        return None
    return ReplyAddress(
        name,
        int.from_bytes(partition, "big") if partition is not None and len(partition) == 4 else None,
        tuple((key, value) for key, value in headers if value and key in _CORRELATION_HEADERS),
    )


def address_headers(headers: Headers, bytes_max: int = 4_096) -> Headers:
    """The headers that make the reply address; none where they are too long to be kept.

    >>> address_headers((("reply_to", b"r"), ("padding", b"x")))
    (('reply_to', b'r'),)
    """
    kept = tuple(
        (name, value)
        for name, value in headers
        if name in (*_CORRELATION_HEADERS, *_REPLY_TOPIC_HEADERS, "kafka_replyPartition")
    )
    return kept if sum(len(value) for _, value in kept) <= bytes_max else ()


def read_envelope(record: InboundRecord) -> Envelope:
    """What the headers say.

    Raises:
        RequestRefused: a header that is understood holds what it cannot mean.
    """
    headers = record.headers
    request_id = _text(_first(headers, ("request-id",)), "request-id")
    deadline = _text(_first(headers, ("deadline-ms",)), "deadline-ms")
    if deadline is not None and not (deadline.isascii() and deadline.isdigit() and len(deadline) <= 16):
        raise RequestRefused(
            Problem(
                Code.REQUEST_INVALID,
                f"header deadline-ms is {deadline[:40]!r}: send epoch milliseconds as decimal text",
            )
        )
    priority = _text(_first(headers, ("priority",)), "priority") or "normal"
    if priority not in ("high", "normal", "low"):
        raise RequestRefused(
            Problem(Code.REQUEST_INVALID, f"header priority is {priority[:40]!r}: send high, normal or low")
        )
    topics = {value for name, value in headers if value and name in _REPLY_TOPIC_HEADERS}
    if len(topics) > 1:
        named = ", ".join(sorted(topic[:80].decode(errors="replace") for topic in topics))
        raise RequestRefused(
            Problem(Code.REQUEST_INVALID, f"headers name {len(topics)} reply topics ({named}): send one")
        )
    partition = _first(headers, ("kafka_replyPartition",))
    if partition is not None and len(partition) != 4:
        raise RequestRefused(
            Problem(
                Code.REQUEST_INVALID,
                f"header kafka_replyPartition has {len(partition)} bytes: send 4, big-endian, or no such header",
            )
        )
    content_type = _text(_first(headers, _CONTENT_TYPE_HEADERS), "content-type") or JSON
    return Envelope(
        None if request_id is None else checked_id(request_id),
        read_address(headers),
        None if deadline is None else int(deadline),
        _text(_first(headers, ("traceparent",)), "traceparent"),
        priority,
        content_type.strip('"').partition(";")[0].strip().lower(),
    )


def checked_id(text: str) -> RequestId:
    """``text`` as a request id.

    Raises:
        RequestRefused: it is empty, too long, has characters that do not print, or begins as rollouts' records do.
    """
    if not text or len(text) > REQUEST_ID_LENGTH_MAX or not text.isprintable():
        raise RequestRefused(
            Problem(
                Code.REQUEST_INVALID,
                f"request id {text[:40]!r} is unusable: send 1 to {REQUEST_ID_LENGTH_MAX} printable characters",
            )
        )
    if text.startswith(ROLLOUT_ID_PREFIX):
        raise RequestRefused(
            Problem(
                Code.REQUEST_INVALID,
                f"request id {text[:40]!r} is unusable: ids that begin with {ROLLOUT_ID_PREFIX} are those of rollouts' "
                "own records; send another",
            )
        )
    return RequestId(text)


def positional_id(record: InboundRecord) -> RequestId:
    """The id of a request that names none: the same at every delivery of this record."""
    return RequestId(str(uuid.uuid5(_ID_NAMESPACE, record.position)))


def identify(record: InboundRecord, body: Mapping[str, Any] | None = None) -> RequestId:
    """The id under which a request that is refused is answered and recorded; never raises.

    The header's, else the body's where the body could be read. A header that cannot serve as an id yields to nothing
    in the body: its sender may have meant another request.
    """
    try:
        text = _first(record.headers, ("request-id",))
        own_id = text.decode() if text is not None else (body or {}).get("request_id")
        return checked_id(own_id) if isinstance(own_id, str) else positional_id(record)
    except (UnicodeDecodeError, RequestRefused):
        return positional_id(record)


def decode_json(value: bytes) -> Mapping[str, Any]:
    """The JSON body's members.

    Raises:
        Undecodable: not JSON, or not an object.
    """
    try:
        body = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise Undecodable(Problem(Code.REQUEST_MALFORMED, f"the body is not JSON: {error}")) from error
    if not isinstance(body, dict):
        raise Undecodable(Problem(Code.REQUEST_MALFORMED, f"the body is a JSON {type(body).__name__}: send an object"))
    return body


def read_request(envelope: Envelope, body: Mapping[str, Any], record: InboundRecord) -> Request:
    """The request that a decoded body and its headers make.

    Raises:
        RequestRefused: an unknown member, or one of the wrong type; the message names it.
    """
    unknown = sorted(set(body) - _MEMBERS)
    if unknown:
        raise RequestRefused(
            Problem(
                Code.REQUEST_INVALID,
                f"unknown member {', '.join(unknown)[:200]}: a request has {', '.join(sorted(_MEMBERS))}",
            )
        )
    path = body.get("path")
    if not isinstance(path, str) or not path.startswith("/") or len(path) > 512:
        raise RequestRefused(
            Problem(Code.REQUEST_INVALID, "path is missing or not a path: send text that starts with /")
        )
    sections: dict[str, Mapping[str, Any]] = {}
    for name in ("entities", "inputs", "metadata"):
        section = body.get(name)
        if section is None:
            section = {}
        if not isinstance(section, dict):
            raise RequestRefused(
                Problem(Code.REQUEST_INVALID, f"{name} is {type(section).__name__}: send an object of names to values")
            )
        sections[name] = section
    own_id = body.get("request_id")
    if own_id is not None and not isinstance(own_id, str):
        raise RequestRefused(Problem(Code.REQUEST_INVALID, "request_id is not text: send a string"))
    try:
        digest = digest_of(path, sections)
    except TypeError as error:
        raise RequestRefused(Problem(Code.REQUEST_INVALID, f"the body has no JSON form: {error}; nest less")) from error
    request_id = envelope.request_id or (checked_id(own_id) if own_id is not None else positional_id(record))
    return Request(
        request_id,
        path,
        sections["entities"],
        sections["inputs"],
        sections["metadata"],
        envelope.deadline_ms,
        envelope.traceparent,
        envelope.priority,
        envelope.content_type,
        digest,
        record.headers,
    )


def digest_of(path: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 of what was asked, whatever the encoding or the order of members.

    >>> digest_of("/a", {"inputs": {"x": 1, "y": 2}}) == digest_of("/a", {"inputs": {"y": 2, "x": 1}})
    True
    """
    canonical = orjson.dumps([path, sections], option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS, default=_other)
    return hashlib.sha256(canonical).hexdigest()


def _other(value: object) -> object:
    # Avro bodies can carry bytes, which JSON has no form for.
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    raise TypeError(f"{type(value).__name__} has no canonical form")


def digest_of_bytes(value: bytes | None) -> str:
    """SHA-256 of a body that cannot be read."""
    return hashlib.sha256(value or b"").hexdigest()


def is_finite(value: object) -> bool:
    """Whether a number is usable: JSON has no NaN, but Avro has.

    >>> is_finite(1.5), is_finite(float("nan"))
    (True, False)
    """
    return not isinstance(value, float) or math.isfinite(value)
