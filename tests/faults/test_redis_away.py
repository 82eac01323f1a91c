"""Redis freezes, then goes away, and comes back: no request waits for it longer than one fetch may take."""

from collections.abc import Callable
from typing import Final

from tests.support.cluster import Cluster
from tests.support.cluster_documents import expected_by_default
from tests.support.load import Load, Verdict
from tests.support.stack import ServiceStack

RATE: Final = 60
UNANSWERED_MAX: Final = 5 * RATE
"""Five seconds of it, more than a fetch may take: a slow machine's growing queue is not what is measured."""
WAIT_MAX_S: Final = 10.0
"""A fetch may take 3 s here; the rest is what a busy machine may add."""


async def test_requests_end_as_their_features_contracts_say(
    cluster: Cluster, stack: ServiceStack, tell: Callable[[Verdict], None]
) -> None:
    """Meanwhile required features fail requests as unavailable, others get defaults; afterwards all is as before."""
    paths = ("/inline", "/soft", "/mixed")
    async with Load(cluster, total=60_000, rate=RATE, paths=paths, unanswered_max=UNANSWERED_MAX) as load:
        await load.replied(100)
        await load.during(stack.redis.pause)
        try:
            await load.replied(220)
        finally:
            await load.during(stack.redis.resume)
        await load.replied(300)
        await load.during(stack.redis.stop)
        try:
            await load.replied(450)
        finally:
            await load.during(stack.redis.start)
        await load.go_on(250)
        verdict = await load.verdict()
        last = load.last(60)
        soft = {asked.request_id: asked for asked in load.asked if asked.path == "/soft"}
    tell(verdict)
    assert verdict.wait_beyond_s < WAIT_MAX_S
    assert verdict.by_path["/soft"] == {"completed": len(soft)}
    defaulted = [
        request_id
        for request_id, asked in soft.items()
        if verdict.bodies[request_id]["result"]["y"] == expected_by_default(asked.x)
    ]
    assert len(defaulted) > 20
    for path in ("/inline", "/mixed"):
        assert verdict.by_path[path].keys() == {"completed", "failed"}
        assert verdict.by_path[path]["failed"] > 20
    failures = [body for body in verdict.bodies.values() if body["status"] == "failed"]
    for body in failures:
        assert {error["code"] for error in body["errors"]} == {"features_unavailable"}
        assert all(error["feature"] == "subject.score" for error in body["errors"])
    assert all(verdict.bodies[request_id]["status"] == "completed" for request_id in last)
    assert not last & set(defaulted)
