"""A decide worker is killed in mid-flow: the other one, and later its successor, finish what it had begun."""

from collections.abc import Callable

from tests.support.cluster import Cluster
from tests.support.load import Load, Verdict

SILENCE_MAX_S = 30.0
"""The session timeout (6 s), a rebalance and a recovery, on a machine that is busy with all of the test at once."""


async def test_a_killed_decide_worker_loses_nothing(cluster: Cluster, tell: Callable[[Verdict], None]) -> None:
    """kill -9 of one of two: every request is decided once, its duplicates alike, within a bounded silence."""
    async with Load(cluster, total=600, rate=60) as load:
        await load.replied(150)
        await load.during(cluster["decide-0"].kill)
        verdict = await load.verdict()
    tell(verdict)
    assert verdict.statuses == {"completed": verdict.requests}
    assert verdict.wait_beyond_s < SILENCE_MAX_S


async def test_one_that_comes_back_at_once_loses_nothing(cluster: Cluster, tell: Callable[[Verdict], None]) -> None:
    """Both killed at once and started again under their names, as a supervisor does."""
    async with Load(cluster, total=600, rate=60) as load:
        await load.replied(150)
        for name in ("decide-0", "decide-1"):
            await load.during(cluster[name].kill)
        await load.during(cluster.start, "decide-0", "decide-1")
        verdict = await load.verdict()
    tell(verdict)
    assert verdict.statuses == {"completed": verdict.requests}
    assert verdict.wait_beyond_s < SILENCE_MAX_S
