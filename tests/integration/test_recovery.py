"""The joins table after its worker's death: what it held is found by the next one, from the changelog alone."""

import asyncio
import time
from typing import Any

import orjson

from tests.support.caller import Caller, request
from tests.support.cluster import Cluster
from tests.support.cluster_documents import HASTY_TIMEOUT_MS, expected


async def test_duplicates_are_answered_from_the_recovered_table(cluster: Cluster) -> None:
    """A worker of another name takes over; it repeats every reply byte for byte and calls no model."""
    paths = ("/inline", "/queued", "/mixed")
    bodies = [request(paths[number % 3], 300.0 + number, subject=f"subject-{number}") for number in range(30)]
    async with Caller(cluster) as caller:
        originals = await asyncio.gather(
            *(caller.send(body, caller.spring(body["request_id"][:16].encode())) for body in bodies)
        )
        replied = await caller.replies(30)
        await caller.until_acknowledged()
        assert len(originals) == len({reply.headers[1][1] for reply in replied}) == 30
        first = {dict(reply.headers)["request-id"].decode(): reply.value for reply in replied}
        calls = {body["request_id"]: cluster.models.calls(body["request_id"]) for body in bodies}
        await asyncio.to_thread(cluster["decide-0"].kill)
        await asyncio.to_thread(cluster.start, "decide-1")
        for body in bodies:
            again = await caller.ask(body)
            assert again.value == first[body["request_id"]]
    for number, body in enumerate(bodies):
        assert cluster.models.calls(body["request_id"]) == calls[body["request_id"]]
        assert cluster.pool_calls(300.0 + number) == (0 if body["path"] == "/inline" else 1)


async def test_a_pending_join_is_finished_by_another_worker(cluster: Cluster) -> None:
    """Its tasks are out and it is acknowledged when its worker dies; the result finds it in the table, once."""
    async with Caller(cluster) as caller:
        cluster.close_gate()
        asked = {path: caller.spring() for path in ("/queued", "/mixed")}
        ids = {}
        for number, (path, headers) in enumerate(asked.items()):
            body = request(path, 400.0 + number)
            ids[path] = body["request_id"]
            await caller.send(body, headers)
        await caller.until_acknowledged()
        await asyncio.to_thread(cluster["decide-0"].kill)
        await asyncio.to_thread(cluster.start, "decide-1")
        cluster.open_gate()
        for number, (path, headers) in enumerate(asked.items()):
            members = orjson.loads((await caller.reply(headers)).value)
            assert members["status"] == "completed"
            assert members["request_id"] == ids[path]
            assert members["result"]["y"] == expected(400.0 + number, "subject-7")
            assert cluster.pool_calls(400.0 + number) == 1
    assert cluster.models.calls(ids["/mixed"]) == 1


async def test_a_deadline_that_passes_while_no_worker_runs_is_kept(cluster: Cluster) -> None:
    """Three seconds pass, and for one request the late result comes, with no worker there: both are expired."""
    async with Caller(cluster) as caller:
        cluster.close_gate()
        in_pool, behind = caller.spring(), caller.spring()
        await caller.send(request("/brief", 500.0), in_pool)
        sent = await caller.send(request("/brief", 501.0), behind)
        await caller.until_acknowledged()
        await asyncio.to_thread(cluster["decide-0"].kill)
        overdue_in_s = sent.timestamp / 1000 + 3.0 - time.time()
        await asyncio.sleep(max(0.0, overdue_in_s) + 0.1)
        cluster.open_gate()
        await asyncio.to_thread(cluster.start, "decide-1")
        for headers in (in_pool, behind):
            reply = await caller.reply(headers)
            members = orjson.loads(reply.value)
            assert dict(reply.headers)["status"] == b"expired"
            assert [error["code"] for error in members["errors"]] == ["deadline_exceeded"]
            assert members["result"] == {}
        repeated = await caller.ask(request("/soft", 1.0))
        assert orjson.loads(repeated.value)["status"] == "completed"
        assert len(await caller.replies(3)) == 3


async def test_a_result_that_came_in_time_and_was_read_late_is_late(cluster: Cluster) -> None:
    """The result lies on its topic before the deadline; the worker that reads it comes after: expired as well."""
    async with Caller(cluster) as caller:
        cluster.close_gate()
        headers = caller.spring()
        sent = await caller.send(request("/brief", 502.0), headers)
        await caller.until_acknowledged()
        await asyncio.to_thread(cluster["decide-0"].kill)
        cluster.open_gate()
        await asyncio.to_thread(cluster["pool-0"].await_logged, "task")
        await asyncio.sleep(max(0.0, sent.timestamp / 1000 + 3.0 - time.time()) + 0.1)
        await asyncio.to_thread(cluster.start, "decide-1")
        members = orjson.loads((await caller.reply(headers)).value)
    assert members["status"] == "expired"
    assert [error["code"] for error in members["errors"]] == ["deadline_exceeded"]


async def test_a_silent_pool_is_given_up_long_before_the_deadline(cluster: Cluster) -> None:
    """Of 60 s it has one: then the version over HTTP answers, also where another worker found the join in the table."""
    async with Caller(cluster) as caller:
        await asyncio.to_thread(cluster["pool-0"].kill)
        body = request("/hasty", 600.0)
        members = orjson.loads((await caller.ask(body)).value)
        _answered_over_http(members, 600.0)
        assert HASTY_TIMEOUT_MS <= members["latency_ms"] < 10 * HASTY_TIMEOUT_MS
        orphaned = caller.spring()
        await caller.send(request("/hasty", 601.0), orphaned)
        await caller.until_acknowledged()
        await asyncio.to_thread(cluster["decide-0"].kill)
        await asyncio.to_thread(cluster.start, "decide-1")
        # Not sooner: what the pool says while nobody listens is its answer.
        _answered_over_http(orjson.loads((await caller.reply(orphaned)).value), 601.0)
        await asyncio.to_thread(cluster.start, "pool-0")
        await asyncio.to_thread(cluster["pool-0"].await_logged, "task")
        # Its late words are read and passed over.
        again = orjson.loads((await caller.ask(body)).value)
        assert again == members
        assert len(await caller.replies(3)) == 3


def _answered_over_http(members: dict[str, Any], x: float) -> None:
    assert members["status"] == "completed"
    assert members["outputs"]["first"]["version"] == "1-http"
    assert members["result"]["y"] == expected(x, "subject-7")
    assert members["errors"] == []
