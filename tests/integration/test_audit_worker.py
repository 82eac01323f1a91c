"""The audit worker on real Kafka, S3 and DynamoDB: killed, and its stores taken away, it loses and doubles nothing."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from typer.testing import CliRunner

from app.adapters.audit_reader import AuditReader
from app.adapters.dynamodb import DynamoPointerTable
from app.adapters.s3 import S3ObjectStore
from app.commands.decision import decision_app
from app.domain.audit import KEY_PREFIX
from tests.support.audit_records import CODEC, audit_record, audit_value
from tests.support.stack import ServiceStack

WITHIN_S = 150.0
PARTITIONS = 2


@dataclass(slots=True)
class Audit:
    """An empty audit: topics, bucket and table, and the environment in which a worker finds them."""

    env: dict[str, str]
    topic: str
    reader: AuditReader
    objects: S3ObjectStore
    producer: AIOKafkaProducer
    admin: AIOKafkaAdminClient
    log: Path

    async def send(self, numbers: Sequence[int], *, execution_id: str | None = None) -> list[str]:
        """Produce a decision a number; the request ids."""
        ids = []
        for number in numbers:
            record = audit_record(number, f"request-{number}", execution_id)
            ids.append(f"request-{number}")
            await self.producer.send(
                self.topic,
                record.value,
                key=record.key,
                partition=number % PARTITIONS,
                headers=list(record.headers),
            )
        await self.producer.flush()
        return ids

    async def until_found(self, request_ids: Sequence[str]) -> None:
        """Wait until each has a pointer; the caller bounds it."""
        while (await self.reader.verify(request_ids)).missing:  # noqa: ASYNC110 - DynamoDB has no event to wait for
            await asyncio.sleep(0.1)

    async def turn_away(self, request_id: str) -> None:
        """A refusal of the request, as a decide worker sends it."""
        fields = CODEC.decode(audit_value(request_id, "refused", kind="refusal"))
        said = (
            "reply topic inference.audit is not allowed: the broker keeps its own records there; name one of your own"
        )
        fields["problems"] = orjson.dumps([{"code": "reply_topic_not_allowed", "message": said}])
        record = audit_record(0, request_id, "refused", kind="refusal")
        await self.producer.send_and_wait(
            self.topic, CODEC.encode(fields), key=record.key, partition=0, headers=list(record.headers)
        )

    async def until_logged(self, words: str) -> None:
        """Wait until a line of the worker's log has all of ``words``; the caller bounds it."""
        while not any(all(word in line for word in words.split()) for line in self.log.read_text().splitlines()):  # noqa: ASYNC110 - a file has no event to wait for
            await asyncio.sleep(0.05)

    async def committed(self) -> int:
        """How many records the group has committed."""
        offsets = await self.admin.list_consumer_group_offsets(f"{self.env['BROKER_TOPIC_PREFIX']}audit")
        return sum(offset.offset for offset in offsets.values())

    @asynccontextmanager
    async def worker(self, instance: str = "audit-1") -> AsyncIterator[asyncio.subprocess.Process]:
        """A worker process; ended by SIGTERM, and killed if that does not end it."""
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.support.audit_process", instance, env=self.env, stderr=log, stdout=log
            )
        try:
            yield process
            if process.returncode is None:
                process.terminate()
                assert await asyncio.wait_for(process.wait(), WITHIN_S) == 0, self.log.read_text()[-3_000:]
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.fixture
async def audit(
    stack: ServiceStack,
    aws_env: dict[str, str],
    kafka_bootstrap: str,
    topic_prefix: str,
    bucket_name: str,
    table_name: str,
    tmp_path: Path,
) -> AsyncIterator[Audit]:
    """An audit of this test alone."""
    settings = {
        "BROKER_KAFKA_BOOTSTRAP": kafka_bootstrap,
        "BROKER_TOPIC_PREFIX": topic_prefix,
        "BROKER_AUDIT_BUCKET": bucket_name,
        "BROKER_AUDIT_TABLE": table_name,
        "BROKER_AUDIT_BATCH_WAIT": "100ms",
        "BROKER_AUDIT_BATCH_RECORDS": "50",
        "BROKER_DATA_DIR": str(tmp_path / "data"),
    }
    topic = f"{topic_prefix}inference.audit"
    async with AsyncExitStack() as resources:
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka_bootstrap)
        await admin.start()
        resources.push_async_callback(admin.close)
        await admin.create_topics([NewTopic(name, PARTITIONS, 1) for name in (topic, f"{topic}-dlt")])
        producer = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap, acks="all")
        await producer.start()
        resources.push_async_callback(producer.stop)
        objects = await resources.enter_async_context(S3ObjectStore(bucket_name))
        pointers = await resources.enter_async_context(DynamoPointerTable(table_name))
        await objects.ensure_bucket()
        await pointers.ensure_table()
        reader = AuditReader(objects, pointers)
        env = {**os.environ, **aws_env, **settings}
        yield Audit(env, topic, reader, objects, producer, admin, tmp_path / "worker.log")


async def test_records_become_evidence_and_malformed_ones_dead_letters(
    audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each decision is found by its id, proven and shown; what names no decision is buried; offsets are committed."""
    async with asyncio.timeout(WITHIN_S):
        async with audit.worker():
            ids = await audit.send(range(120))
            await audit.producer.send_and_wait(audit.topic, b"no record", key=b"bad", partition=1)
            await audit.turn_away("turned-away")
            ids += await audit.send(range(120, 160))
            await audit.until_found(ids)
        assert await audit.committed() == 162
    report = await audit.reader.verify()
    assert report.sound
    assert report.items == 161
    assert report.objects == len(await audit.objects.keys(KEY_PREFIX))
    async with AIOKafkaConsumer(
        f"{audit.topic}-dlt", bootstrap_servers=audit.env["BROKER_KAFKA_BOOTSTRAP"], auto_offset_reset="earliest"
    ) as letters:
        letter = await asyncio.wait_for(letters.getone(), WITHIN_S)
    assert (letter.key, letter.value, letter.partition) == (b"bad", b"no record", 1)
    for name, value in audit.env.items():
        if name.startswith("BROKER_"):
            monkeypatch.setenv(name, value)
    shown = await asyncio.to_thread(CliRunner().invoke, decision_app, ["show", "request-7"])
    assert shown.exit_code == 0, shown.output
    for word in ("request-7", "credit-decision", "credit-pd 3", "applicant.age_years", "PRESENT", "DECISION"):
        assert word in shown.output
    as_json = await asyncio.to_thread(CliRunner().invoke, decision_app, ["show", "request-7", "--json"])
    assert orjson.loads(as_json.output)["record"]["reply"]["request_id"] == "request-7"
    refused = await asyncio.to_thread(CliRunner().invoke, decision_app, ["show", "turned-away"])
    assert refused.exit_code == 0, refused.output
    for word in ("reply_topic_not_allowed", "name one of your own", "REFUSAL#", "under the same id"):
        assert word in refused.output
    as_json = await asyncio.to_thread(CliRunner().invoke, decision_app, ["show", "turned-away", "--json"])
    document = orjson.loads(as_json.output)
    assert document["record"] is None
    assert [each["problems"][0]["code"] for each in document["refusals"]] == ["reply_topic_not_allowed"]
    unknown = await asyncio.to_thread(CliRunner().invoke, decision_app, ["show", "nobody"])
    assert unknown.exit_code == 1
    assert "no decision of request nobody" in unknown.output


async def test_a_killed_worker_loses_and_doubles_nothing(audit: Audit) -> None:
    """kill -9 in mid-flow, three times over: every decision has one pointer, to sound bytes, and no alarm is raised."""
    async with asyncio.timeout(WITHIN_S):
        ids = await audit.send(range(100))
        for life in range(3):
            async with audit.worker() as process:
                await audit.until_found(ids[: 20 + 80 * life])
                ids += await audit.send(range(100 * (life + 1), 100 * (life + 2)))
                process.send_signal(signal.SIGKILL)
                await process.wait()
        async with audit.worker():
            await audit.until_found(ids)
        assert await audit.committed() == len(ids)
    report = await audit.reader.verify()
    assert report.sound
    assert report.items == len(ids) == 400
    assert b"conflict" not in audit.log.read_bytes()


async def test_stores_that_die_are_waited_for(audit: Audit, stack: ServiceStack) -> None:
    """S3 and then DynamoDB are killed under way: offsets stay where they are until both are back, then all is there."""
    async with asyncio.timeout(WITHIN_S):
        async with audit.worker():
            ids = await audit.send(range(40))
            await audit.until_found(ids)
            for number, (name, service) in enumerate((("s3", stack.s3), ("dynamodb", stack.dynamodb)), start=1):
                await asyncio.to_thread(service.kill)
                try:
                    ids += await audit.send(range(40 * number, 40 * (number + 1)))
                    await audit.until_logged(f"audit_batch_waits {name}")
                finally:
                    await asyncio.to_thread(service.start)
                await audit.until_found(ids)
        assert await audit.committed() == len(ids) == 120
    report = await audit.reader.verify()
    assert report.sound
    assert report.items == 120


async def test_another_decision_of_a_request_is_kept_and_shouted_about(audit: Audit) -> None:
    """The first stands, the second is an item beside it, and the log holds an error with the request's id."""
    async with asyncio.timeout(WITHIN_S):
        async with audit.worker():
            ids = await audit.send(range(10))
            await audit.until_found(ids)
            await audit.send([4], execution_id="another")
            await audit.until_found(await audit.send([10, 11, 12, 14]))
            await audit.until_logged("audit_decision_conflict")
    assert [pointer.sort_key for pointer in await audit.reader.pointers("request-4")] == [
        "DECISION",
        "CONFLICT#another",
    ]
    assert (await audit.reader.verify()).sound
