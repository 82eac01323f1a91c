"""Audit records for tests: real Avro, as a decide worker writes it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from app.adapters.avro import AvroCodec
from app.domain.requests import InboundRecord

TOPIC = "inference.audit"
CODEC = AvroCodec("AuditRecord")


def audit_value(
    request_id: str,
    execution_id: str,
    *,
    kind: str = "decision",
    note: str = "",
    tasks: int = 1,
    evidence: Mapping[str, Any] | None = None,
) -> bytes:
    """The bytes of an AuditRecord with one feature and one answer a task."""
    task: dict[str, Any] = {
        "name": "pd",
        "model": "credit-pd",
        "version": "3",
        "digest": "sha256:" + "0" * 64,
        "backend": "http",
        "selected_by": "split",
        "need": "required",
        "governance": None,
        "features": orjson.dumps([["applicant.age_years", "PRESENT", 35, 1_700_000_000_000, "redis", None]]),
        "result": {
            "status": "ok",
            "output": b'{"probability":0.12}',
            "problem": None,
            "latency_ms": 8.1,
            "sent": b'{"inputs":[]}',
            "attempts": [
                {
                    "endpoint": "http://127.0.0.1:9001",
                    "started_ms": 1_700_000_000_002,
                    "latency_ms": 7.5,
                    "outcome": "ok",
                }
            ],
        },
        "experiment": None,
        "earlier": [],
    }
    reply = {"request_id": request_id, "execution_id": execution_id, "status": "completed", "note": note}
    return CODEC.encode(
        {
            "kind": kind,
            "request_id": request_id,
            "execution_id": execution_id,
            "status": "completed",
            "source": {
                "topic": "inference.requests",
                "partition": 0,
                "offset": 7,
                "timestamp_ms": 1_700_000_000_000,
                "key": b"17",
                "value": b'{"path":"/credit/decision"}',
                "headers": [{"key": "kafka_correlationId", "value": b"\x00\xff"}],
            },
            "content_type": "application/json",
            "body": "ab" * 32,
            "received_ms": 1_700_000_100_000,
            "deadline_ms": 1_700_000_101_000,
            "decided_ms": 1_700_000_100_012,
            "instance": "decide-1",
            "path": "/credit/decision",
            "route": "credit-decision",
            "rule": "default",
            "revision": "sha256:" + "1" * 64,
            "tasks": [task] * tasks,
            "problems": b"[]",
            "reply": orjson.dumps(reply),
            "decision": f"decision-of-{execution_id}" if kind == "shadow" else None,
            "evidence": None if evidence is None else orjson.dumps(evidence),
        }
    )


def audit_record(
    offset: int,
    request_id: str | None = None,
    execution_id: str | None = None,
    *,
    kind: str = "decision",
    note: str = "",
    partition: int = 0,
    topic: str = TOPIC,
    evidence: Mapping[str, Any] | None = None,
) -> InboundRecord:
    """A record of the audit topic; ids follow the offset unless given."""
    request_id = request_id or f"request-{partition}-{offset}"
    execution_id = execution_id or f"execution-{request_id}"
    return InboundRecord(
        topic,
        partition,
        offset,
        1_700_000_200_000 + offset,
        request_id.encode(),
        audit_value(request_id, execution_id, kind=kind, note=note, evidence=evidence),
        (
            ("request-id", request_id.encode()),
            ("execution-id", execution_id.encode()),
            ("kind", kind.encode()),
            ("status", b"completed"),
        ),
    )


def malformed(record: InboundRecord) -> InboundRecord:
    """The record without what names its decision."""
    return replace(record, headers=())
