"""A registry that changes under load: each request sees one revision from start to end."""

import asyncio

import orjson

from tests.support.caller import Caller, request
from tests.support.cluster import Cluster
from tests.support.load import Load

RATE = 500
"""Requests a second."""
UNANSWERED_MAX = 2 * RATE
"""A machine that is so far behind is offered fewer: what waits beyond its deadline tells nothing of revisions."""


def versions_seen(body: dict[str, object]) -> set[str]:
    """Every place of a reply that tells the revision it was made under."""
    outputs, result, rule = body["outputs"], body["result"], body["rule"]
    assert isinstance(outputs, dict)
    assert isinstance(result, dict)
    return {str(rule).removeprefix("rule-"), result["rule_version"], *(task["version"] for task in outputs.values())}


async def test_no_request_sees_two_revisions(cluster: Cluster) -> None:
    """Four revisions are published under 500 requests/s; each reply's revision, rule, versions and result agree."""
    revisions: dict[str, str] = {}
    paths = ("/inline", "/mixed", "/queued")
    async with Load(cluster, total=8 * RATE, rate=RATE, paths=paths, unanswered_max=UNANSWERED_MAX) as load:
        for number in range(1, 5):
            version = str(number)
            revision = await asyncio.to_thread(cluster.publish, cluster.documents(version))
            revisions[revision] = version
            await load.replied(RATE * number)
        await load.answered()
    bodies = {reply.request_id: reply.body for reply in load.replies}
    assert {body["status"] for body in bodies.values()} == {"completed"}
    for body in bodies.values():
        assert versions_seen(body) == {revisions[body["revision"]]}, body
    assert {body["revision"] for body in bodies.values()} == set(revisions)


async def test_a_pending_join_ends_under_the_revision_it_began_with(cluster: Cluster) -> None:
    """Its task is out when the next revision comes; result and rule are still the old one's, even after a restart."""
    first = await asyncio.to_thread(cluster.publish, cluster.documents("11"))
    async with Caller(cluster) as caller:
        await until_decided_under(caller, first)
        cluster.close_gate()
        stays, moves = caller.spring(), caller.spring()
        await caller.send(request("/mixed", 201.0), stays)
        await caller.send(request("/queued", 202.0), moves)
        await caller.until_acknowledged()
        second = await asyncio.to_thread(cluster.publish, cluster.documents("12"))
        await until_decided_under(caller, second)
        await asyncio.to_thread(cluster["decide-0"].kill)
        cluster.open_gate()
        await asyncio.to_thread(cluster.start, "decide-0")
        replies = [await caller.reply(each) for each in (stays, moves)]
    for reply in replies:
        body = orjson.loads(reply.value)
        assert body["revision"] == first
        assert versions_seen(body) == {"11"}


async def until_decided_under(caller: Caller, revision: str) -> None:
    """Ask until the answer is made under ``revision``; a follower may be a second behind."""
    async with asyncio.timeout(30):
        while orjson.loads((await caller.ask(request("/soft", 1.0))).value)["revision"] != revision:
            pass
