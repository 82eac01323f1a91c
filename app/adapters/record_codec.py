"""Decision records as Avro (``schemas/AuditRecord.avsc``), and entries of the joins table around them.

An entry begins with a fixed header (version, state, a time, the body's digest), so that a worker that takes over a
partition rebuilds its timers, and a duplicate is told from a conflict, without decoding what lies behind it: the
record, compressed, for the table keeps each one for the whole dedupe window.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import orjson
import zstandard

from app.adapters.avro import AvroCodec
from app.domain.decisions import DecisionRecord, Kind, TaskRecord
from app.domain.dispatch import Attempt, TaskResult, TaskStatus
from app.domain.errors import Code, Problem
from app.domain.features import FeatureStatus, FeatureValue
from app.domain.join import Status
from app.domain.requests import InboundRecord, RequestId

_CODEC: Final = AvroCodec("AuditRecord")
_HEADER: Final = struct.Struct(">BBq32s")
_VERSION: Final = 1
_RECORD_BYTES_MAX: Final = 8 * 1024 * 1024
_COMPRESS: Final = zstandard.ZstdCompressor(level=1)
_DECOMPRESS: Final = zstandard.ZstdDecompressor()


class EntryState(IntEnum):
    """Where an entry stands."""

    PENDING = 1
    """Tasks are out; the time is when to look at it: a pool counts as silent then, or its deadline has come."""
    DECIDED = 2
    """The decision is made; its audit record and reply are perhaps not out. The time is the decision's."""
    COMPLETED = 3
    """The same, and whoever redelivers the request gets them again."""


@dataclass(frozen=True, slots=True)
class EntryHeader:
    """What an entry says without being decoded."""

    state: EntryState
    time_ms: int
    body: str


def encode_record(record: DecisionRecord) -> bytes:
    """The AuditRecord's bytes, in single-object encoding."""
    source = record.source
    return _CODEC.encode(
        {
            "kind": str(record.kind),
            "request_id": record.request_id,
            "execution_id": record.execution_id,
            "status": None if record.status is None else str(record.status),
            "source": {
                "topic": source.topic,
                "partition": source.partition,
                "offset": source.offset,
                "timestamp_ms": source.timestamp_ms,
                "key": source.key,
                "value": source.value,
                "headers": [{"key": key, "value": value} for key, value in source.headers],
            },
            "content_type": record.content_type,
            "body": record.body,
            "received_ms": record.received_ms,
            "deadline_ms": record.deadline_ms,
            "decided_ms": record.decided_ms,
            "instance": record.instance,
            "path": record.path,
            "route": record.route,
            "rule": record.rule,
            "revision": record.revision,
            "tasks": [_task(task) for task in record.tasks],
            "problems": orjson.dumps([problem.as_json() for problem in record.problems]),
            "reply": record.reply,
            "decision": record.decision,
            "evidence": record.evidence,
        }
    )


def _task(task: TaskRecord) -> dict[str, Any]:
    result = task.result
    return {
        "name": task.name,
        "model": task.model,
        "version": task.version,
        "digest": task.digest,
        "backend": task.backend,
        "selected_by": task.selected_by,
        "need": task.need,
        "governance": None if task.governance is None else orjson.dumps(task.governance),
        "features": orjson.dumps(
            [
                [feature.ref, feature.status, feature.value, feature.event_time_ms, feature.source, feature.reason]
                for feature in task.features
            ],
            default=_as_hex,
        ),
        "result": None
        if result is None
        else (
            # Named, so that the writer need not hold the members against each branch of the union.
            "dev.modelbroker.v1.TaskResult",
            {
                "status": str(result.status),
                "output": None if result.output is None else orjson.dumps(result.output),
                "problem": None if result.problem is None else orjson.dumps(result.problem.as_json()),
                "latency_ms": result.latency_ms,
                "sent": result.sent,
                "attempts": [
                    {
                        "endpoint": attempt.endpoint,
                        "started_ms": attempt.started_ms,
                        "latency_ms": attempt.latency_ms,
                        "outcome": attempt.outcome,
                        "rows": attempt.rows,
                    }
                    for attempt in result.attempts
                ],
                "reason": result.reason,
            },
        ),
        "experiment": task.experiment,
        "earlier": [_task(each) for each in task.earlier],
    }


def _as_hex(value: object) -> object:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    raise TypeError(f"{type(value).__name__} is not a feature's value")


def decode_record(data: bytes) -> DecisionRecord:
    """The record in ``data``; ValueError where it is damaged."""
    fields = _CODEC.decode(data)
    source = fields["source"]
    try:
        return DecisionRecord(
            Kind(fields["kind"]),
            RequestId(fields["request_id"]),
            fields["execution_id"],
            InboundRecord(
                source["topic"],
                source["partition"],
                source["offset"],
                source["timestamp_ms"],
                source["key"],
                source["value"],
                tuple((header["key"], header["value"]) for header in source["headers"]),
            ),
            fields["content_type"],
            fields["body"],
            fields["received_ms"],
            fields["deadline_ms"],
            fields["instance"],
            fields["path"],
            fields["route"],
            fields["rule"],
            fields["revision"],
            tuple(_read_task(task) for task in fields["tasks"]),
            None if fields["status"] is None else Status(fields["status"]),
            fields["decided_ms"],
            tuple(_read_problem(problem) for problem in orjson.loads(fields["problems"])),
            fields["reply"],
            fields["decision"],
            fields["evidence"],
        )
    except (KeyError, TypeError, orjson.JSONDecodeError) as error:
        raise ValueError(f"damaged AuditRecord: {error!r}") from error


def _read_task(fields: Mapping[str, Any]) -> TaskRecord:
    result = fields["result"]
    return TaskRecord(
        fields["name"],
        fields["model"],
        fields["version"],
        fields["digest"],
        fields["backend"],
        fields["selected_by"],
        fields["need"],
        None if fields["governance"] is None else orjson.loads(fields["governance"]),
        tuple(
            FeatureValue(ref, FeatureStatus(status), _read_value(value), event_time_ms, source, reason)
            for ref, status, value, event_time_ms, source, reason in orjson.loads(fields["features"])
        ),
        None
        if result is None
        else TaskResult(
            fields["name"],
            TaskStatus(result["status"]),
            None if result["output"] is None else orjson.loads(result["output"]),
            None if result["problem"] is None else _read_problem(orjson.loads(result["problem"])),
            result["latency_ms"],
            tuple(Attempt(**attempt) for attempt in result["attempts"]),
            result["sent"],
            result["reason"],
        ),
        fields["experiment"],
        tuple(_read_task(each) for each in fields["earlier"]),
    )


def _read_value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_read_value(each) for each in value)
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value


def _read_problem(members: Mapping[str, str]) -> Problem:
    return Problem(Code(members["code"]), members["message"], members.get("task"), members.get("feature"))


def encode_entry(state: EntryState, record: DecisionRecord, encoded: bytes, look_ms: int | None = None) -> bytes:
    """The table's entry of a record; ``encoded`` is what ``encode_record`` made of it.

    ``look_ms``: when a pending one is to be looked at, by default at its deadline.
    """
    time_ms = record.decided_ms
    if time_ms is None:
        time_ms = record.deadline_ms if look_ms is None else look_ms
    return _HEADER.pack(_VERSION, state, time_ms, bytes.fromhex(record.body)) + _COMPRESS.compress(encoded)


def read_entry_header(entry: bytes) -> EntryHeader:
    """An entry's header; ValueError for an entry of another version."""
    try:
        version, state, time_ms, body = _HEADER.unpack_from(entry)
    except struct.error as error:
        raise ValueError(f"damaged joins entry: {error}") from error
    if version != _VERSION:
        raise ValueError(f"a joins entry of version {version}; this worker reads {_VERSION}")
    return EntryHeader(EntryState(state), time_ms, body.hex())


def entry_yields(held: bytes, entry: bytes) -> bool:
    """Whether ``held`` yields to a later entry of its id: a decision yields only to itself in a later state.

    Another one, or a join that pends again, can only have been written by a process that was expelled and did not know.
    """
    before, after = read_entry_header(held), read_entry_header(entry)
    if before.state is EntryState.PENDING:
        return True
    return after.state is not EntryState.PENDING and after.time_ms == before.time_ms


def entry_record(entry: bytes) -> bytes:
    """The encoded record that an entry holds; ValueError where it is damaged."""
    try:
        return _DECOMPRESS.decompress(entry[_HEADER.size :], max_output_size=_RECORD_BYTES_MAX)
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged joins entry: {error}") from error
