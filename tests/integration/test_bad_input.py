"""Bad input on real services: each kind ends as promised, with this very reply and this record, and the worker goes on.

What is compared is the whole reply but ids, times and latencies, the audit record of it, the dead letter where one is
due, and a good request that the same worker decides afterwards.
"""

import asyncio
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from aiokafka import AIOKafkaConsumer, TopicPartition

from app.adapters.record_codec import decode_record
from app.domain.decisions import DecisionRecord
from app.domain.requests import Headers, InboundRecord, positional_id
from tests.support.caller import Caller, request
from tests.support.cluster import PARTITIONS, ROOT, Cluster
from tests.support.cluster_documents import HANGING_TIMEOUT_MS, expected
from tests.support.cluster_models import Mode

FOUND_WITHIN_S = 30.0
NOTHING: dict[str, Any] = {"route": None, "rule": None, "outputs": {}, "result": {}}


async def find(cluster: Cluster, topic: str, wanted: Callable[[Any], bool]) -> Any:
    """The first record of a topic that is wanted; it comes in time."""
    partitions = [TopicPartition(cluster.settings.topic(topic), number) for number in range(PARTITIONS)]
    async with AIOKafkaConsumer(
        bootstrap_servers=cluster.settings.kafka_bootstrap,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=2**22,
    ) as consumer:
        consumer.assign(partitions)
        async with asyncio.timeout(FOUND_WITHIN_S):
            while True:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    for record in records:
                        if wanted(record):
                            return record


async def audited(cluster: Cluster, sent: Any) -> DecisionRecord:
    """The audit record of the request that lies where ``sent`` says."""

    def is_it(record: Any) -> bool:
        source = decode_record(record.value).source
        return (source.partition, source.offset) == (sent.partition, sent.offset)

    record = await find(cluster, "inference.audit", is_it)
    assert record.partition == sent.partition
    return decode_record(record.value)


async def goes_on(caller: Caller, key: bytes = b"subject-7") -> None:
    """A good request in the same partition is decided."""
    reply = await caller.ask(request("/inline", 4.0), key=key)
    members = orjson.loads(reply.value)
    assert (members["status"], members["result"]["y"]) == ("completed", expected(4.0, "subject-7"))
    await caller.until_acknowledged()


def told(reply: Any) -> dict[str, Any]:
    """A reply's members but what differs from run to run."""
    members: dict[str, Any] = orjson.loads(reply.value)
    assert uuid.UUID(members.pop("execution_id")).version == 4
    assert members.pop("latency_ms") >= 0
    for output in members["outputs"].values():
        assert output.pop("latency_ms") >= 0
    return members


def revision_of(cluster: Cluster) -> str:
    """The revision that the cluster decides under."""
    return cluster.publish(cluster.documents())


def rejected(request_id: str, code: str, message: str, **members: Any) -> dict[str, Any]:
    """A reply that rejects."""
    errors = [{"code": code, **members.pop("named", {}), "message": message}]
    whole = {"request_id": request_id, "status": "rejected", "path": None, "revision": None, **NOTHING}
    return {**whole, "errors": errors, **members}


# --- what is no request -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "the body is empty: send a request as JSON or Avro"),
        (b"[1]", "the body is a JSON list: send an object"),
        (b"\xff\xfe", "the body is not JSON: str is not valid UTF-8: surrogates not allowed: line 1 column 1 (char 0)"),
        (
            b"\x00\x00\x00\x00\x07x",
            "the body is in Confluent's wire format, and this broker knows no schema registry: "
            "set BROKER_SCHEMA_REGISTRY_URL, or send single-object encoding",
        ),
    ],
)
async def test_malformed_bytes(cluster: Cluster, value: bytes, message: str) -> None:
    """Rejected under the position's id, recorded with the very bytes, and kept in the dead-letter topic."""
    async with Caller(cluster) as caller:
        headers = caller.spring()
        sent = await caller.send(value, headers)
        reply = await caller.reply(headers)
        at = InboundRecord(sent.topic, sent.partition, sent.offset, 0, None, None, ())
        assert told(reply) == rejected(positional_id(at), "request_malformed", message)
        record = await audited(cluster, sent)
        assert (record.source.value, record.reply, record.status) == (value, reply.value, "rejected")
        dead = await find(
            cluster,
            "inference.requests-dlt",
            lambda each: (
                dict(each.headers)["kafka_dlt-original-offset"] == sent.offset.to_bytes(8, "big")
                and each.partition == sent.partition
            ),
        )
        named = dict(dead.headers)
        assert (dead.value, dead.key) == (value, b"subject-7")
        assert named["kafka_dlt-original-topic"] == sent.topic.encode()
        assert named["kafka_dlt-exception-fqcn"] == b"request_malformed"
        assert named["kafka_dlt-exception-message"] == message.encode()
        assert named["kafka_correlationId"] == dict(headers)["kafka_correlationId"]
        await goes_on(caller)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (
            {"colour": 1},
            "request_invalid",
            "unknown member colour: a request has entities, inputs, metadata, path, request_id",
        ),
        ({"path": 7}, "request_invalid", "path is missing or not a path: send text that starts with /"),
        ({"inputs": [1]}, "request_invalid", "inputs is list: send an object of names to values"),
        (
            {"inputs": {"x": orjson.loads("[" * 300 + "]" * 300)}},
            "request_invalid",
            "the body has no JSON form: Recursion limit reached; nest less",
        ),
    ],
)
async def test_a_body_that_is_no_request(cluster: Cluster, change: dict[str, Any], code: str, message: str) -> None:
    """Rejected under the id that the body names; no dead letter, for it could be read."""
    async with Caller(cluster) as caller:
        headers = caller.spring()
        body = {**request("/inline", 1.0), **change}
        text = "{" + ",".join(f'"{name}":{nested(value)}' for name, value in body.items()) + "}"
        sent = await caller.send(text.encode(), headers)
        reply = await caller.reply(headers)
        assert told(reply) == rejected(body["request_id"], code, message)
        assert (await audited(cluster, sent)).reply == reply.value
        await goes_on(caller)


def nested(value: Any) -> str:
    """JSON of any depth."""
    if isinstance(value, dict):
        return "{" + ",".join(f'"{name}":{nested(each)}' for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(nested, value)) + "]"
    return orjson.dumps(value).decode()


async def test_an_oversized_request(cluster: Cluster) -> None:
    """Past this broker's bound, up to what Kafka takes at all: rejected, and the worker goes on."""
    async with Caller(cluster) as caller:
        for size in (cluster.settings.request_bytes_max + 1, 1_020_000):
            headers = (*caller.spring(), ("request-id", f"large-{size}".encode()))
            sent = await caller.send(b"x" * size, headers)
            reply = await caller.reply(headers)
            message = f"the request has {size} bytes; {cluster.settings.request_bytes_max} are allowed"
            assert told(reply) == rejected(f"large-{size}", "request_too_large", message)
            record = await audited(cluster, sent)
            assert record.reply == reply.value
            assert record.source.value == (b"x" * size if size < 1_000_000 else None)
            await goes_on(caller)


# --- requests that cannot be decided ----------------------------------------------------------------------------------


async def refused(
    cluster: Cluster, body: dict[str, Any], headers: Headers = ()
) -> tuple[dict[str, Any], DecisionRecord]:
    """What is told of a request, and its record; the worker goes on."""
    async with Caller(cluster) as caller:
        all_headers = (*caller.spring(), *headers)
        sent = await caller.send(body, all_headers)
        reply = await caller.reply(all_headers)
        record = await audited(cluster, sent)
        assert record.reply == reply.value
        assert dict(reply.headers)["status"].decode() == record.status
        await goes_on(caller)
        return told(reply), record


async def test_an_unknown_path(cluster: Cluster) -> None:
    """Rejected, with the path in the message."""
    body = request("/no/such/path", 1.0)
    members, record = await refused(cluster, body)
    message = "no route has the path /no/such/path; see `get routes`"
    assert members == rejected(
        body["request_id"], "path_unknown", message, path="/no/such/path", revision=revision_of(cluster)
    )
    assert record.tasks == ()


def of_route(cluster: Cluster, body: dict[str, Any], **members: Any) -> dict[str, Any]:
    """A reply about a request that found its route."""
    route = body["path"].strip("/")
    whole = {"request_id": body["request_id"], "path": body["path"], "route": route, "rule": "rule-1"}
    return {**whole, "revision": revision_of(cluster), "outputs": {}, "result": {}, **members}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            {"inputs": {}},
            {
                "code": "feature_missing",
                "task": "first",
                "feature": "inputs.x",
                "message": "required feature inputs.x is missing",
            },
        ),
        (
            {"inputs": {"x": "much"}},
            {
                "code": "feature_invalid",
                "task": "first",
                "feature": "inputs.x",
                "message": "required feature inputs.x 'much' (str) is not DOUBLE",
            },
        ),
        (
            {"entities": {"subject_id": "subject-9999"}},
            {
                "code": "feature_missing",
                "task": "first",
                "feature": "subject.score",
                "message": "required feature subject.score is missing",
            },
        ),
        (
            {"entities": {"subject_id": 7}},
            {"code": "entity_invalid", "message": "entities.subject_id: '7' (int) is not STRING; send STRING"},
        ),
        ({"entities": {}}, {"code": "entity_missing", "message": "entities.subject_id is missing: send it as STRING"}),
    ],
)
async def test_features_and_entities(cluster: Cluster, change: dict[str, Any], error: dict[str, str]) -> None:
    """A required feature that is missing, and entities that name nobody: rejected before any model is called."""
    body = {**request("/inline", 1.0), **change}
    members, record = await refused(cluster, body)
    assert members == of_route(cluster, body, status="rejected", errors=[error])
    assert cluster.models.calls(body["request_id"]) == 0
    assert [problem.as_json() for problem in record.problems] == [error]


async def test_expired_on_arrival(cluster: Cluster) -> None:
    """A deadline in the past: no model is called."""
    body = request("/inline", 1.0)
    past = str(time.time_ns() // 1_000_000 - 1).encode()
    members, _ = await refused(cluster, body, (("deadline-ms", past),))
    message = "the deadline had passed when the request arrived: send it earlier, or give it longer"
    errors = [{"code": "deadline_exceeded", "message": message}]
    assert members == of_route(cluster, body, rule=None, status="expired", errors=errors)
    assert cluster.models.calls(body["request_id"]) == 0


@pytest.mark.parametrize("allowed", [True, False])
async def test_reply_topics_that_may_not_be_written_to(cluster: Cluster, allowed: bool) -> None:
    """Not allowed, or not there: nothing is written to it; the record says why there is no reply."""
    topic = cluster.settings.topic("no.such.replies" if allowed else "broker.registry")
    body = request("/inline", 1.0)
    async with Caller(cluster) as caller:
        sent = await caller.send(body, (("kafka_replyTopic", topic.encode()), ("kafka_correlationId", b"x")))
        record = await audited(cluster, sent)
        said = (
            f"reply topic {topic} does not exist: create it, or name one that does"
            if allowed
            else f"reply topic {topic} is not allowed: BROKER_REPLY_TOPICS_ALLOWED names those that are"
        )
        assert [problem.as_json() for problem in record.problems] == [
            {"code": "reply_topic_not_allowed", "message": said}
        ]
        assert (record.status, record.tasks) == ("rejected", ())
        assert cluster.models.calls(body["request_id"]) == 0
        await goes_on(caller)


# --- models that misbehave --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "code", "message", "calls"),
    [
        (
            "garbage",
            "model_output_invalid",
            "inline 1 answered unsoundly: not JSON: unexpected end of data: line 1 column 14 (char 13)",
            1,
        ),
        ("error", "model_error", "inline 1 answered 500: the model is out of order", 2),
    ],
)
async def test_a_model_that_answers_nonsense(cluster: Cluster, mode: Mode, code: str, message: str, calls: int) -> None:
    """Its task has an error, the decision has failed, and the record holds each attempt."""
    cluster.models.switch("inline", mode)
    body = request("/inline", 1.0)
    async with Caller(cluster) as caller:
        headers = caller.spring()
        sent = await caller.send(body, headers)
        reply = await caller.reply(headers)
        record = await audited(cluster, sent)
        cluster.models.heal()
        await goes_on(caller)
    outputs = {"first": {"status": "error", "model": "inline", "version": "1"}}
    errors = [{"code": code, "task": "first", "message": message}]
    assert told(reply) == of_route(cluster, body, status="failed", outputs=outputs, errors=errors)
    (task,) = record.tasks
    assert task.result is not None
    assert len(task.result.attempts) == cluster.models.calls(body["request_id"]) == calls


async def test_a_model_that_never_answers(cluster: Cluster) -> None:
    """An optional one costs its timeout, the others' answers are used; a required one costs the request's deadline."""
    cluster.models.switch("hanging", "hang")
    body = request("/hanging", 1.0)
    members, _ = await refused(cluster, body)
    assert members == of_route(
        cluster,
        body,
        status="partial",
        outputs={
            "first": {"status": "ok", "model": "inline", "version": "1", "output": {"y": expected(1.0, "subject-7")}},
            "hanging": {"status": "timeout", "model": "hanging", "version": "1"},
        },
        result={"y": expected(1.0, "subject-7"), "rule_version": "1"},
        errors=[
            {
                "code": "model_timeout",
                "task": "hanging",
                "message": f"hanging 1 did not answer within its {HANGING_TIMEOUT_MS} ms",
            }
        ],
    )
    cluster.models.switch("inline", "hang")
    body = request("/inline", 1.0)
    async with Caller(cluster) as caller:
        deadline = str(time.time_ns() // 1_000_000 + 2_000).encode()
        headers = (*caller.spring(), ("deadline-ms", deadline))
        began = time.monotonic()
        sent = await caller.send(body, headers)
        reply = await caller.reply(headers)
        took = time.monotonic() - began
        record = await audited(cluster, sent)
        cluster.models.heal()
        await goes_on(caller)
    assert took < 10
    assert record.reply == reply.value
    outputs = {"first": {"status": "timeout", "model": "inline", "version": "1"}}
    members = told(reply)
    # Whether the call or the join notices first is a matter of microseconds.
    said = members["errors"][0].pop("message")
    assert re.fullmatch(r"inline 1 had not answered by the deadline, after \d+ ms|no answer before .* deadline", said)
    errors = [{"code": "deadline_exceeded", "task": "first"}]
    assert members == of_route(cluster, body, status="expired", outputs=outputs, errors=errors)


# --- the registry -----------------------------------------------------------------------------------------------------


async def test_an_unknown_registry_field(cluster: Cluster, tmp_path: Path) -> None:
    """``apply`` refuses the whole revision and names file, document and field; the last good one stays."""
    documents = [dict(document) for document in cluster.documents("2")]
    route = next(document for document in documents if document["kind"] == "Route")
    route["spec"] = {**route["spec"], "colour": "red"}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(documents))
    command = [sys.executable, "-m", "app.cli", "apply", "-f", str(tmp_path), "--yes"]
    ended = await asyncio.to_thread(
        subprocess.run,
        command,
        cwd=ROOT,
        env=dict(cluster.env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode != 0
    said = " ".join((ended.stdout + ended.stderr).split())
    assert f"Route {route['metadata']['name']}: spec.colour" in said
    async with Caller(cluster) as caller:
        reply = await caller.ask(request("/inline", 4.0))
    assert orjson.loads(reply.value)["revision"] == revision_of(cluster)
    assert orjson.loads(reply.value)["rule"] == "rule-1"
