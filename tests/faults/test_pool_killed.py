"""A pool worker is killed with tasks in its hands: their joins wait in the table, and its successor answers them."""

from collections.abc import Callable

from tests.support.cluster import Cluster
from tests.support.load import Load, Verdict

SILENCE_MAX_S = 40.0
"""As long as the pool has no worker, and its start."""


async def test_a_killed_pool_worker_loses_nothing(cluster: Cluster, tell: Callable[[Verdict], None]) -> None:
    """kill -9 of the only one, in the middle of a call, while requests keep coming; another takes over."""
    async with Load(cluster, total=500, rate=60, paths=("/queued", "/mixed")) as load:
        await load.replied(120)
        cluster.close_gate()
        await load.sent(250)
        await load.during(cluster["pool-0"].kill)
        cluster.open_gate()
        await load.during(cluster.start, "pool-1")
        verdict = await load.verdict()
    tell(verdict)
    assert verdict.statuses == {"completed": verdict.requests}
    assert verdict.wait_beyond_s < SILENCE_MAX_S
