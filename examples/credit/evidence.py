"""What Kafka and the audit's stores hold once the demo's requests are answered: every reply, every decision, proven.

Callers see the first reply to each request and no more. So the reply and audit topics are read whole, to find a second
reply or a second decision if there is one. What the audit's log tells, decisions, shadows and the steps of rollouts,
must be in the audit's stores, each record with its checksum.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from app.adapters.audit_reader import AuditReader, AuditReport
from app.adapters.avro import AvroCodec
from app.adapters.dynamodb import DynamoPointerTable
from app.adapters.s3 import S3ObjectStore
from app.adapters.topic_reader import read_topic
from app.domain.audit import sort_key
from app.domain.comparison_stats import Comparison
from app.domain.decisions import Kind
from app.domain.rollouts import RolloutName, request_id_of
from app.settings import Settings

AUDITED_WITHIN_S = 60.0  # the audit worker writes an object a second; a slow machine takes a few
POLL_S = 0.25
ROLLOUT_SETTLES_WITHIN_S = 5.0
"""What its last step has seen is judged a second or two after the last decision."""

ROLLOUT = RolloutName("credit", "consumer", "anomaly")
SHADOWED = ("credit", "pd")
"""Route and task of the example's shadow."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Request ids with more than one reply or decision, what the audit's stores hold, and what it tells of releases.

    ``audit`` counts decisions; its ``missing`` and ``faults`` are of any record. ``steps`` are what the records of the
    rollout tell, in order. ``given`` counts what the models of these decisions were given, by status and source.
    """

    duplicated: frozenset[str]
    audit: AuditReport
    shadows: Comparison
    steps: Sequence[Mapping[str, Any]]
    given: Mapping[tuple[str, str], int]


@dataclass(slots=True)
class _Told:
    """What the logs tell, or leave ``untold``; ``beside`` are other records than decisions: request id, sort key."""

    duplicated: frozenset[str] = frozenset()
    untold: frozenset[str] = frozenset()
    shadows: Comparison = field(default_factory=Comparison)
    beside: set[tuple[str, str]] = field(default_factory=set)
    given: Counter[tuple[str, str]] = field(default_factory=Counter)


async def gather_evidence(settings: Settings, request_ids: Collection[str]) -> Evidence:
    """Wait until the audit of ``request_ids`` is written, at most a minute, then prove and count."""
    wanted = frozenset(request_ids)
    async with S3ObjectStore(settings.audit_bucket) as objects, DynamoPointerTable(settings.audit_table) as pointers:
        reader = AuditReader(objects, pointers)
        clock = asyncio.get_running_loop().time
        end = clock() + AUDITED_WITHIN_S
        while len(await pointers.decisions(list(wanted))) < len(wanted):
            if clock() > end:
                break
            await asyncio.sleep(POLL_S)
        steps = await _steps(reader)
        settles = min(end, clock() + ROLLOUT_SETTLES_WITHIN_S)
        while not (steps and steps[-1]["state"] != "progressing") and clock() < settles:
            await asyncio.sleep(POLL_S)
            steps = await _steps(reader)
        told = await asyncio.to_thread(_told, settings, wanted)
        while absent := told.beside - await _kept(pointers):
            if clock() > end:
                break
            await asyncio.sleep(POLL_S)
        report = await reader.verify()
        decided = await pointers.decisions(list(wanted))
    missing = (*sorted((wanted - decided.keys()) | told.untold), *(f"{name} {key}" for name, key in sorted(absent)))
    return Evidence(
        told.duplicated, replace(report, items=len(decided), missing=missing), told.shadows, steps, told.given
    )


def _given(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Status and source of each input of a decision's models."""
    for task in content["tasks"]:
        for _, status, _, _, source, *_ in orjson.loads(task["features"]):
            yield status, source


async def _steps(reader: AuditReader) -> Sequence[Mapping[str, Any]]:
    records = [await reader.read(pointer) for pointer in await reader.pointers(request_id_of(ROLLOUT))]
    return sorted((orjson.loads(record["evidence"]) for record in records), key=lambda step: int(step["since"]))


async def _kept(pointers: DynamoPointerTable) -> set[tuple[str, str]]:
    return {(pointer.request_id, pointer.sort_key) async for pointer in pointers.all()}


def _told(settings: Settings, request_ids: frozenset[str]) -> _Told:
    replies: Counter[str] = Counter()
    decisions: defaultdict[str, set[str]] = defaultdict(set)
    told = _Told()
    codec = AvroCodec("AuditRecord")
    for record in read_topic(settings, settings.topic("inference.replies")):
        replies[dict(record.headers)["request-id"].decode()] += 1
    for record in read_topic(settings, settings.topic("inference.audit")):
        content = codec.decode(record.value or b"")
        kind, request_id, execution_id = Kind(content["kind"]), content["request_id"], content["execution_id"]
        if kind is Kind.DECISION:
            if request_id in request_ids and execution_id not in decisions[request_id]:
                told.given.update(_given(content))
            decisions[request_id].add(execution_id)
        elif kind in (Kind.SHADOW, Kind.ROLLOUT):
            name = (request_id, sort_key(kind, execution_id))
            known = name in told.beside  # any record may be told twice, after a crash
            told.beside.add(name)
            if kind is Kind.SHADOW and request_id in request_ids and not known:
                told.shadows.feed(orjson.loads(content["evidence"]))
    twice = {name for name, count in replies.items() if count > 1}
    twice |= {name for name, executions in decisions.items() if len(executions) > 1}
    told.duplicated = request_ids & twice
    told.untold = request_ids - decisions.keys()
    return told
