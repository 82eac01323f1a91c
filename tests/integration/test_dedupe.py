"""One request id, one decision: repeated, in flight, and in conflict, on real Kafka."""

import asyncio

import orjson

from tests.support.caller import Caller, request
from tests.support.cluster import Cluster
from tests.support.cluster_documents import expected


async def test_a_repeated_request_gets_the_first_reply(cluster: Cluster) -> None:
    """Byte for byte, under its own correlation id and address, by either convention; no model is called again."""
    async with Caller(cluster) as first, Caller(cluster) as second:
        for path, x in (("/inline", 101.0), ("/queued", 102.0), ("/mixed", 103.0)):
            body = request(path, x)
            original = await first.ask(body)
            again = await first.ask(body)
            headers = (("correlation_id", f"again-{path}".encode()), ("reply_to", second.topic.encode()))
            # The members' order is not what a request asks for.
            elsewhere = await second.ask(dict(reversed(body.items())), headers)
            assert original.value == again.value == elsewhere.value
            assert orjson.loads(original.value)["status"] == "completed"
            assert elsewhere.headers[0] == ("correlation_id", f"again-{path}".encode())
            assert original.headers[1:] == again.headers[1:] == elsewhere.headers[1:]
            assert cluster.models.calls(body["request_id"]) == (0 if path == "/queued" else 1)
            assert cluster.pool_calls(x) == (0 if path == "/inline" else 1)


async def test_a_duplicate_of_one_in_flight_waits_for_it(cluster: Cluster) -> None:
    """Inline: the second asks while the model is busy with the first; one call answers both."""
    body, other = request("/inline", 104.0), request("/soft", 1.0)
    cluster.models.switch("inline", "hang")
    async with Caller(cluster) as caller:
        headers = [caller.spring() for _ in range(3)]
        for each in headers:
            await caller.send(body, each)
        # It lies behind them in their partition, so with its reply they have all been taken in.
        await caller.ask(other)
        assert len(await caller.replies(1)) == 1
        assert cluster.models.calls(body["request_id"]) == 1
        cluster.models.switch("inline", "ok")
        replies = [await caller.reply(each) for each in headers]
        assert len({reply.value for reply in replies}) == 1
        assert orjson.loads(replies[0].value)["status"] == "completed"
        assert cluster.models.calls(body["request_id"]) == 1
        assert len(await caller.replies(4)) == 4


async def test_a_duplicate_of_a_pending_join_waits_for_it(cluster: Cluster) -> None:
    """Queued: the first is acknowledged and waits in the table; its duplicates wait for the same answer."""
    async with Caller(cluster) as caller:
        for path, x in (("/queued", 105.0), ("/mixed", 106.0)):
            body = request(path, x)
            before = len(await caller.replies(0))
            cluster.close_gate()
            headers = [caller.spring() for _ in range(3)]
            await caller.send(body, headers[0])
            await caller.until_acknowledged()
            for each in headers[1:]:
                await caller.send(body, each)
            await caller.ask(request("/soft", 1.0))
            assert len(await caller.replies(before + 1)) == before + 1
            cluster.open_gate()
            replies = [await caller.reply(each) for each in headers]
            assert len({reply.value for reply in replies}) == 1
            assert orjson.loads(replies[0].value)["result"]["y"] == expected(x, "subject-7")
            assert cluster.pool_calls(x) == 1


async def test_the_same_id_for_another_question_is_turned_away(cluster: Cluster) -> None:
    """While the first is in flight and after it is decided; the first stands, and its duplicates get its reply."""
    body = request("/inline", 107.0)
    conflicting = {**body, "inputs": {"x": 108.0}}
    cluster.models.switch("inline", "hang")
    async with Caller(cluster) as caller:
        headers = caller.spring()
        await caller.send(body, headers)
        early = await caller.ask(conflicting)
        cluster.models.switch("inline", "ok")
        original = await caller.reply(headers)
        late = await caller.ask(conflicting)
        again = await caller.ask(body)
    for refusal in (early, late):
        members = orjson.loads(refusal.value)
        assert members["status"] == "rejected"
        assert members["request_id"] == body["request_id"]
        assert [error["code"] for error in members["errors"]] == ["request_id_conflict"]
    assert orjson.loads(original.value)["result"]["y"] == expected(107.0, "subject-7")
    assert again.value == original.value
    assert cluster.models.calls(body["request_id"]) == 1


async def test_many_duplicates_at_once_make_one_decision(cluster: Cluster) -> None:
    """Forty at the same moment, of a request that runs inline and in a pool."""
    body = request("/mixed", 109.0)
    async with Caller(cluster) as caller:
        headers = [caller.spring() for _ in range(40)]
        await asyncio.gather(*(caller.send(body, each) for each in headers))
        replies = await caller.replies(40)
    assert len({reply.value for reply in replies}) == 1
    assert {reply.headers[0][1] for reply in replies} == {each[1][1] for each in headers}
    assert cluster.models.calls(body["request_id"]) == 1
    assert cluster.pool_calls(109.0) == 1
