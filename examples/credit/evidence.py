"""What Kafka and the audit's stores hold once the demo's requests are answered: every reply, every decision, proven.

Callers see the first reply to each request and no more. So the reply and audit topics are read whole, to find a second
reply or a second decision if there is one, and each record in the audit's stores is held against its checksum.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from app.adapters.audit_reader import AuditReader, AuditReport
from app.adapters.avro import AvroCodec
from app.adapters.dynamodb import DynamoPointerTable
from app.adapters.s3 import S3ObjectStore
from app.adapters.topics import TopicAdmin
from app.settings import Settings

AUDITED_WITHIN_S = 60.0  # the audit worker writes an object a second; a slow machine takes a few
READ_WITHIN_S = 60.0
POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Evidence:
    """Request ids with more than one reply or decision, and what the audit's stores hold."""

    duplicated: frozenset[str]
    audit: AuditReport


async def gather_evidence(settings: Settings, request_ids: Collection[str]) -> Evidence:
    """Wait until the audit of ``request_ids`` is written, at most a minute, then prove and count."""
    async with S3ObjectStore(settings.audit_bucket) as objects, DynamoPointerTable(settings.audit_table) as pointers:
        reader = AuditReader(objects, pointers)
        end = asyncio.get_running_loop().time() + AUDITED_WITHIN_S
        while len(await pointers.decisions(list(request_ids))) < len(request_ids):
            if asyncio.get_running_loop().time() > end:
                break
            await asyncio.sleep(POLL_S)
        report = await reader.verify(request_ids)
    return Evidence(await _duplicated(settings, frozenset(request_ids)), report)


async def _duplicated(settings: Settings, request_ids: frozenset[str]) -> frozenset[str]:
    replies: Counter[str] = Counter()
    decisions: defaultdict[str, set[str]] = defaultdict(set)
    codec = AvroCodec("AuditRecord")
    partitions = await asyncio.to_thread(TopicAdmin(settings).partition_counts)
    async with asyncio.timeout(READ_WITHIN_S):
        async for record in _whole(settings, "inference.replies", partitions[settings.topic("inference.replies")]):
            replies[dict(record.headers)["request-id"].decode()] += 1
        async for record in _whole(settings, "inference.audit", partitions[settings.topic("inference.audit")]):
            told = codec.decode(record.value)
            if told["kind"] == "decision":  # the same decision may be told twice, after a crash
                decisions[told["request_id"]].add(told["execution_id"])
    twice = {name for name, count in replies.items() if count > 1}
    twice |= {name for name, executions in decisions.items() if len(executions) > 1}
    return request_ids & twice


async def _whole(settings: Settings, name: str, partitions: int) -> AsyncIterator[Any]:
    """Every record of a topic, up to its end as it is now."""
    topic = settings.topic(name)
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.kafka_bootstrap, group_id=None, enable_auto_commit=False)
    await consumer.start()
    try:
        parts = [TopicPartition(topic, number) for number in range(partitions)]
        consumer.assign(parts)
        ends = await consumer.end_offsets(parts)
        await consumer.seek_to_beginning(*parts)
        while any([await consumer.position(part) < ends[part] for part in parts]):
            for records in (await consumer.getmany(timeout_ms=500)).values():
                for record in records:
                    yield record
    finally:
        await consumer.stop()
