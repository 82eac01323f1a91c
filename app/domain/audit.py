"""Audit: records of decisions in; objects written once, and one pointer a decision into them, out.

A batch of one partition's audit records becomes one object, named after the first record's offset, so that whoever
replays the log finds what was written before under the same name. An object that stands there already is evidence: it
is read, held against the log, pointed into as far as it goes, and the rest of the batch goes on after its end
(``reconcile``). What differs is never overwritten; it goes beside, under a name of its own, and somebody is told.

The object's format, ``model-broker-audit/1``, is a plain Zstandard file::

    skippable frame (magic 0x184D2A50)   JSON: format, topic, partition, start, end,
                                         records: [[log offset, frame length, SHA-256 of the record], ...]
    frame                                the first record's bytes, as they lay in the log
    frame                                the second's
    ...

A frame stands alone: a record is cut out by its byte range, decompressed, and compared with its SHA-256, which is over
the record's own bytes and not the compressed ones. ``zstd -d`` gives all records, one after the other. The index says
where each begins, so an object explains itself when nothing else is left. Source: RFC 8878, sections 3.1.1 and 3.1.2.
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import orjson
import zstandard

from app.domain.decisions import Kind
from app.domain.requests import InboundRecord

FORMAT: Final = "model-broker-audit/1"
KEY_PREFIX: Final = "audit/"
DECISION: Final = "DECISION"
RECORD_BYTES_MAX: Final = 16 * 1024 * 1024
"""What one frame may hold: far above Kafka's limit, and far below what a forged frame header could ask for."""

_SKIPPABLE: Final = struct.Struct("<II")
_SKIPPABLE_MAGIC: Final = 0x184D2A50
_AVRO_MAGIC: Final = b"\xc3\x01"
# DynamoDB takes sort keys of 1,024 bytes; a contested one also carries a SHA-256 and two words.
_ID_BYTES_MAX: Final = 512
_LEVEL: Final = 3


@dataclass(frozen=True, slots=True)
class Evidence:
    """One audit record, well-formed: whose decision it tells of, where it lies in the log, and its bytes."""

    request_id: str
    execution_id: str
    kind: Kind
    status: str
    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    value: bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class Place:
    """A record's byte range in its object, and the SHA-256 (hex) of the record's bytes."""

    start: int
    length: int
    sha256: str


@dataclass(frozen=True, slots=True)
class AuditObject:
    """An object: its name, bytes and metadata, and each record's place in it by log offset."""

    key: str
    body: bytes
    metadata: Mapping[str, str]
    places: Mapping[int, Place]


@dataclass(frozen=True, slots=True)
class ObjectIndex:
    """What a stored object says that it holds."""

    topic: str
    partition: int
    start: int
    end: int
    places: Mapping[int, Place]

    def covers(self, record: Evidence) -> bool:
        """Whether the record lies in the stretch of the log that the object holds."""
        return (self.topic, self.partition) == (record.topic, record.partition) and (
            self.start <= record.offset <= self.end
        )


@dataclass(frozen=True, slots=True)
class Pointer:
    """One record's place in the audit: ``sort_key`` under its request id, its object, range and SHA-256.

    ``source`` is the audit record's position in the log, ``topic/partition/offset``; ``recorded_ms`` is when it was
    appended there, epoch milliseconds.
    """

    request_id: str
    sort_key: str
    execution_id: str
    kind: str
    status: str
    recorded_ms: int
    source: str
    sha256: str
    bucket: str
    object_key: str
    object_version: str | None
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Resolution:
    """How a batch meets an object that stands already.

    ``covered`` are the records it holds; ``rest`` lie beyond its end; ``faults``, where there are any, say how it
    contradicts the log, and then nothing is covered.
    """

    covered: tuple[Evidence, ...]
    rest: tuple[Evidence, ...]
    faults: tuple[str, ...]


def read_evidence(record: InboundRecord) -> Evidence:
    """The audit record in a Kafka record: its identity from the headers, so that keeping it needs no schema.

    Raises:
        ValueError: a header is missing, repeated or unusable, or the value is not Avro in single-object encoding.
    """
    named = {name: _header(record, name) for name in ("request-id", "execution-id", "kind", "status")}
    try:
        kind = Kind(named["kind"])
    except ValueError:
        expected = ", ".join(Kind)
        raise ValueError(f"header kind is {named['kind']!r}: one of {expected} was expected") from None
    value = record.value
    if value is None or not value.startswith(_AVRO_MAGIC):
        found = "nothing" if not value else value[:2].hex()
        raise ValueError(f"the value is not Avro in single-object encoding: it starts with {found}")
    return Evidence(
        named["request-id"],
        named["execution-id"],
        kind,
        named["status"],
        record.topic,
        record.partition,
        record.offset,
        record.timestamp_ms,
        value,
        hashlib.sha256(value).hexdigest(),
    )


def _header(record: InboundRecord, name: str) -> str:
    values = [value for header, value in record.headers if header == name]
    if len(values) != 1:
        raise ValueError(f"header {name} is there {len(values)} times: it must be there once")
    if not 0 < len(values[0]) <= _ID_BYTES_MAX:
        raise ValueError(f"header {name} has {len(values[0])} bytes: 1 to {_ID_BYTES_MAX} are allowed")
    try:
        return values[0].decode()
    except UnicodeDecodeError:
        raise ValueError(f"header {name} is not UTF-8") from None


def object_key(topic: str, partition: int, start: int) -> str:
    """The name of the object whose first record lies at ``start``; names sort as offsets do.

    >>> object_key("inference.audit", 3, 120)
    'audit/inference.audit/partition=00003/00000000000000000120.avro.zst'
    """
    return f"{KEY_PREFIX}{topic}/partition={partition:05d}/{start:020d}.avro.zst"


def frame(batch: Sequence[Evidence]) -> AuditObject:
    """The object that holds ``batch``: records of one partition, at least one, offsets rising."""
    if not batch or any(one.offset >= other.offset for one, other in pairwise(batch)):
        raise ValueError("a batch is one partition's records with rising offsets, at least one")
    first, last = batch[0], batch[-1]
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    frames = [compressor.compress(record.value) for record in batch]
    index = orjson.dumps(
        {
            "format": FORMAT,
            "topic": first.topic,
            "partition": first.partition,
            "start": first.offset,
            "end": last.offset,
            "records": [
                [record.offset, len(compressed), record.sha256]
                for record, compressed in zip(batch, frames, strict=True)
            ],
        }
    )
    body = b"".join((_SKIPPABLE.pack(_SKIPPABLE_MAGIC, len(index)), index, *frames))
    metadata = {
        "format": FORMAT,
        "start-offset": str(first.offset),
        "end-offset": str(last.offset),
        "records": str(len(batch)),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    key = object_key(first.topic, first.partition, first.offset)
    places: dict[int, Place] = {}
    position = _SKIPPABLE.size + len(index)
    for record, compressed in zip(batch, frames, strict=True):
        places[record.offset] = Place(position, len(compressed), record.sha256)
        position += len(compressed)
    return AuditObject(key, body, metadata, places)


def beside(contested: AuditObject) -> AuditObject:
    """The same object under a name of its own, for when another stands under the first; the name follows the bytes."""
    digest = contested.metadata["sha256"]
    return replace(contested, key=contested.key.removesuffix(".avro.zst") + f".conflict-{digest}.avro.zst")


def read_index(body: bytes, metadata: Mapping[str, str]) -> ObjectIndex:
    """What a stored object holds.

    Raises:
        ValueError: it is not of this format, or its bytes are not those that were written.
    """
    if (digest := hashlib.sha256(body).hexdigest()) != metadata.get("sha256", digest):
        raise ValueError(f"its bytes have SHA-256 {digest} and its metadata says {metadata['sha256']}")
    if len(body) < _SKIPPABLE.size:
        raise ValueError(f"it has {len(body)} bytes and no index")
    magic, length = _SKIPPABLE.unpack_from(body)
    if magic != _SKIPPABLE_MAGIC or _SKIPPABLE.size + length > len(body):
        raise ValueError("it does not begin with an index")
    try:
        index: dict[str, Any] = orjson.loads(body[_SKIPPABLE.size : _SKIPPABLE.size + length])
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}, and {FORMAT} is known here")
        places: dict[int, Place] = {}
        position = _SKIPPABLE.size + length
        for offset, size, sha256 in index["records"]:
            places[offset] = Place(position, size, sha256)
            position += size
        found = ObjectIndex(index["topic"], index["partition"], index["start"], index["end"], places)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its index cannot be read: {error!r}") from error
    if position != len(body):
        raise ValueError(f"its index accounts for {position} bytes and it has {len(body)}")
    return found


def reconcile(held: Sequence[Evidence], index: ObjectIndex) -> Resolution:
    """Hold a batch against a stored object whose stretch of the log begins at or before the batch's first record."""
    covered = tuple(record for record in held if index.covers(record))
    rest = tuple(record for record in held if record.offset > index.end)
    faults = []
    if len(covered) + len(rest) != len(held) or not covered:
        faults.append(
            f"it holds {index.topic}/{index.partition}/{index.start} to {index.end}, not offset {held[0].offset}"
        )
    for record in covered:
        place = index.places.get(record.offset)
        if place is None:
            faults.append(f"offset {record.offset} lies in the log and not in the object")
        elif place.sha256 != record.sha256:
            faults.append(
                f"offset {record.offset} has SHA-256 {record.sha256} in the log and {place.sha256} in the object"
            )
    ours = {record.offset for record in covered}
    for offset in index.places:
        if held[0].offset <= offset <= held[-1].offset and offset not in ours:
            faults.append(f"offset {offset} lies in the object and not in the log")
    return Resolution((), (), tuple(faults)) if faults else Resolution(covered, rest, ())


def cut(compressed: bytes, sha256: str) -> bytes:
    """The record in a frame cut out of an object.

    Raises:
        ValueError: the frame is damaged, or the record is not the one that ``sha256`` was taken of.
    """
    try:
        size = zstandard.get_frame_parameters(compressed).content_size
        if size > RECORD_BYTES_MAX:
            raise ValueError(f"the frame claims {size} bytes: at most {RECORD_BYTES_MAX} are believed")
        value = zstandard.ZstdDecompressor().decompress(compressed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"the range is not one Zstandard frame: {error}") from error
    if (digest := hashlib.sha256(value).hexdigest()) != sha256:
        raise ValueError(f"the record has SHA-256 {digest} and its pointer says {sha256}")
    return value


def sort_key(kind: Kind, execution_id: str) -> str:
    """Under which sort key a record is pointed to: a request has one decision, and any number of the other kinds.

    >>> [sort_key(kind, "e") for kind in Kind]
    ['DECISION', 'REFUSAL#e', 'SHADOW#e', 'ROLLOUT#e']
    """
    return DECISION if kind is Kind.DECISION else f"{kind.upper()}#{execution_id}"


def point(record: Evidence, place: Place, bucket: str, key: str, version: str | None) -> Pointer:
    """The pointer to ``record`` at ``place``."""
    return Pointer(
        record.request_id,
        sort_key(record.kind, record.execution_id),
        record.execution_id,
        record.kind,
        record.status,
        record.timestamp_ms,
        f"{record.topic}/{record.partition}/{record.offset}",
        record.sha256,
        bucket,
        key,
        version,
        place.start,
        place.length,
    )


def yielding(pointer: Pointer) -> Pointer:
    """Where a pointer goes when a different one stands in its place; the second time, a place that only it can have.

    >>> from dataclasses import replace
    >>> one = Pointer("r", "DECISION", "e", "decision", "completed", 0, "t/0/0", "ab", "b", "k", None, 0, 1)
    >>> yielding(one).sort_key, yielding(yielding(one)).sort_key
    ('CONFLICT#e', 'CONFLICT#e#ab')
    >>> yielding(replace(one, sort_key="REFUSAL#e")).sort_key, yielding(replace(one, sort_key="SHADOW#e")).sort_key
    ('REFUSAL#e#ab', 'SHADOW#e#ab')
    """
    if pointer.sort_key == DECISION:
        return replace(pointer, sort_key=f"CONFLICT#{pointer.execution_id}")
    return replace(pointer, sort_key=f"{pointer.sort_key}#{pointer.sha256}")
