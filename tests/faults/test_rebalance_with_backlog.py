"""A rebalance while more is fetched than may be in flight: what waits inside a worker is neither lost nor skipped."""

import asyncio
from collections.abc import Callable

from tests.support.cluster import Cluster
from tests.support.load import Load, Verdict

SILENCE_MAX_S = 40.0


async def test_what_waits_in_a_worker_survives(cluster: Cluster, tell: Callable[[Verdict], None]) -> None:
    """Every slot is taken by a slow model when a third worker joins, takes its share, and is killed with it."""
    cluster.models.switch("inline", "slow")
    async with Load(cluster, total=2000, rate=1000, paths=("/inline",)) as load:
        await load.replied(100)
        await load.during(cluster.start, "decide-2")
        await asyncio.to_thread(cluster["decide-2"].await_logged, "partitions")
        await asyncio.to_thread(cluster["decide-2"].kill)
        cluster.models.switch("inline", "ok")
        verdict = await load.verdict()
    tell(verdict)
    assert verdict.statuses == {"completed": verdict.requests}
    assert verdict.wait_beyond_s < SILENCE_MAX_S
