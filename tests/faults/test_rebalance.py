"""A decide worker joins a running group: partitions, their tables and what is under way move without a loss."""

import asyncio
from collections.abc import Callable

from tests.support.cluster import Cluster
from tests.support.load import Load, Verdict

SILENCE_MAX_S = 30.0


async def test_a_worker_that_joins_and_leaves_disturbs_nothing(
    cluster: Cluster, tell: Callable[[Verdict], None]
) -> None:
    """A second worker joins the one that does all the work, takes its share with the table's, and is stopped again."""
    await asyncio.to_thread(cluster["decide-1"].stop)
    async with Load(cluster, total=5000, rate=50) as load:
        await load.replied(100)
        await load.during(cluster.start, "decide-1")
        await asyncio.to_thread(cluster["decide-1"].await_logged, "partitions")
        await asyncio.to_thread(cluster["decide-1"].await_logged, "decided")
        await asyncio.to_thread(cluster["decide-1"].stop)
        await load.enough()
        verdict = await load.verdict()
    tell(verdict)
    assert verdict.statuses == {"completed": verdict.requests}
    assert verdict.wait_beyond_s < SILENCE_MAX_S
