"""Replies on the wire, byte for byte, as callers of Spring for Apache Kafka and of FastStream expect them."""

import uuid

import orjson

from tests.support.caller import Caller, request
from tests.support.cluster import Cluster
from tests.support.cluster_documents import expected

TRACEPARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
REPLY_MEMBERS = [
    *("request_id", "execution_id", "status", "path", "route", "rule", "revision"),
    *("outputs", "result", "errors", "latency_ms"),
]


async def test_spring_gets_its_reply_where_and_as_it_asked(cluster: Cluster) -> None:
    """Sixteen raw bytes come back as they were sent, to the partition that four bytes name."""
    correlation = bytes([0x00, 0xFF, 0x0A, 0x80, *range(12)])
    body = request("/inline", 21.0)
    async with Caller(cluster) as caller:
        headers = (
            ("kafka_replyTopic", caller.topic.encode()),
            ("kafka_correlationId", correlation),
            ("kafka_replyPartition", b"\x00\x00\x00\x03"),
            ("contentType", b'"application/json"'),
            ("spring_json_header_types", b'{"contentType":"java.lang.String"}'),
        )
        reply = await caller.ask(body, headers, key=b"a key")
    members = orjson.loads(reply.value)
    assert (reply.partition, reply.key) == (3, b"a key")
    assert list(reply.headers) == [
        ("kafka_correlationId", correlation),
        ("request-id", body["request_id"].encode()),
        ("execution-id", members["execution_id"].encode()),
        ("status", b"completed"),
        ("content-type", b"application/json"),
    ]
    assert list(members) == REPLY_MEMBERS
    assert reply.value == orjson.dumps(members)
    assert uuid.UUID(members["execution_id"]).version == 4
    told = {name: members[name] for name in ("request_id", "status", "path", "route", "rule", "errors", "result")}
    assert told == {
        "request_id": body["request_id"],
        "status": "completed",
        "path": "/inline",
        "route": "inline",
        "rule": "rule-1",
        "errors": [],
        "result": {"y": expected(21.0, "subject-7"), "rule_version": "1"},
    }
    (output,) = members["outputs"].values()
    assert {name: output[name] for name in ("status", "model", "version", "output")} == {
        "status": "ok",
        "model": "inline",
        "version": "1",
        "output": {"y": expected(21.0, "subject-7")},
    }


async def test_spring_without_a_partition_and_with_text(cluster: Cluster) -> None:
    """By default there is no partition header, and with binary correlation off the id is text: both are echoed."""
    correlation = str(uuid.uuid4()).encode()
    async with Caller(cluster) as caller:
        reply = await caller.ask(request("/queued", 5.0), caller.spring(correlation))
    assert reply.headers[0] == ("kafka_correlationId", correlation)
    assert orjson.loads(reply.value)["result"]["y"] == expected(5.0, "subject-7")


async def test_faststream_gets_its_own_names_back(cluster: Cluster) -> None:
    """``correlation_id`` comes back under that name, to the topic in ``reply_to``, with its trace."""
    body = request("/mixed", 6.0)
    async with Caller(cluster) as caller:
        headers = (
            ("content-type", b"application/json"),
            ("correlation_id", b"b1946ac9-2492-d234-7c62-35b4d2611184"),
            ("reply_to", caller.topic.encode()),
            ("traceparent", TRACEPARENT),
        )
        reply = await caller.ask(body, headers)
    assert list(reply.headers) == [
        ("correlation_id", b"b1946ac9-2492-d234-7c62-35b4d2611184"),
        ("request-id", body["request_id"].encode()),
        ("execution-id", orjson.loads(reply.value)["execution_id"].encode()),
        ("status", b"completed"),
        ("content-type", b"application/json"),
        ("traceparent", TRACEPARENT),
    ]
    assert {task["output"]["y"] for task in orjson.loads(reply.value)["outputs"].values()} == {
        expected(6.0, "subject-7")
    }


async def test_a_body_that_cannot_be_read_is_answered_all_the_same(cluster: Cluster) -> None:
    """The address is read before the body: noise is rejected under the caller's correlation id."""
    async with Caller(cluster) as caller:
        headers = (*caller.spring(b"\x01" * 16), ("request-id", f"noise-{caller.topic}".encode()))
        reply = await caller.ask(b"\xff\xfenoise", headers)
    members = orjson.loads(reply.value)
    assert reply.headers[0] == ("kafka_correlationId", b"\x01" * 16)
    assert dict(reply.headers)["status"] == b"rejected"
    assert [error["code"] for error in members["errors"]] == ["request_malformed"]
    assert members["request_id"] == f"noise-{caller.topic}"


async def test_a_reply_topic_that_is_not_allowed_gets_nothing(cluster: Cluster) -> None:
    """Neither a forbidden topic nor one that does not exist is written to; the worker goes on."""
    async with Caller(cluster) as caller:
        for topic in (cluster.settings.topic("inference.audit"), f"{caller.topic}.no.such.replies"):
            await caller.send(request("/inline", 1.0), (("reply_to", topic.encode()), ("correlation_id", b"x")))
        reply = await caller.ask(request("/inline", 2.0))
        assert orjson.loads(reply.value)["status"] == "completed"
        await caller.until_acknowledged()
        assert len(await caller.replies(1)) == 1
