"""A decide worker is told to stop in mid-flow, as every deployment does: it finishes what it has begun, then leaves."""

import asyncio
from collections.abc import Callable

from tests.support.cluster import Cluster
from tests.support.load import Load, Verdict

SILENCE_MAX_S = 30.0


async def test_a_terminated_decide_worker_loses_nothing(cluster: Cluster, tell: Callable[[Verdict], None]) -> None:
    """SIGTERM of one of two: it ends in good order, and every request is decided once."""
    async with Load(cluster, total=600, rate=60) as load:
        await load.replied(150)
        await asyncio.to_thread(cluster["decide-0"].stop)
        verdict = await load.verdict()
    tell(verdict)
    assert verdict.statuses == {"completed": verdict.requests}
    assert verdict.wait_beyond_s < SILENCE_MAX_S


async def test_duplicates_that_wait_do_not_hold_up_the_end(cluster: Cluster, tell: Callable[[Verdict], None]) -> None:
    """While the pool's models stand still, duplicates wait in both workers; one of these is stopped and started."""
    async with Load(cluster, total=300, rate=60, paths=("/queued", "/mixed")) as load:
        await load.replied(50)
        cluster.close_gate()
        await load.sent(200)
        stop = asyncio.create_task(asyncio.to_thread(cluster["decide-0"].stop))
        await asyncio.to_thread(cluster["decide-0"].await_logged, "draining")
        cluster.open_gate()
        await stop
        await load.during(cluster.start, "decide-0")
        verdict = await load.verdict()
    tell(verdict)
    assert verdict.statuses == {"completed": verdict.requests}
    assert verdict.wait_beyond_s < SILENCE_MAX_S


async def test_what_was_fetched_and_not_begun_is_left_to_others(
    cluster: Cluster, tell: Callable[[Verdict], None]
) -> None:
    """A slow model takes every slot and much waits behind; what the leaving worker never began is not committed."""
    cluster.models.switch("inline", "slow")
    async with Load(cluster, total=1500, rate=1500, paths=("/inline",)) as load:
        await load.replied(100)
        await asyncio.to_thread(cluster["decide-0"].stop)
        cluster.models.switch("inline", "ok")
        verdict = await load.verdict()
    tell(verdict)
    assert verdict.statuses == {"completed": verdict.requests}
    assert verdict.wait_beyond_s < SILENCE_MAX_S
