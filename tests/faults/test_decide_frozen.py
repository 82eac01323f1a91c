"""A decide worker stands still for longer than its session, and comes back: it has been expelled, and must notice."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from tests.support.cluster import Cluster
from tests.support.load import Load, Verdict

FROZEN_S = 12.0
"""Twice the session timeout: the other worker has its partitions by then, and decides."""
SILENCE_MAX_S = 40.0


@pytest.mark.parametrize("paths", [("/inline",), ("/queued", "/mixed")])
async def test_a_frozen_worker_decides_nothing_twice(
    cluster: Cluster, tell: Callable[[Verdict], None], paths: Sequence[str]
) -> None:
    """SIGSTOP with calls and pending joins in flight: the other one has what it had begun, and it finds that out."""
    cluster.models.switch("inline", "slow")
    cluster.close_gate()
    async with Load(cluster, total=450, rate=30, paths=paths) as load:
        await load.sent(90)
        cluster["decide-0"].pause()
        await asyncio.sleep(1)
        cluster.models.heal()
        cluster.open_gate()
        await asyncio.sleep(FROZEN_S - 1)
        cluster["decide-0"].resume()
        verdict = await load.verdict()
    tell(verdict)
    assert verdict.statuses == {"completed": verdict.requests}
    assert verdict.wait_beyond_s < SILENCE_MAX_S
    # It is a member again, and works.
    await asyncio.to_thread(cluster["decide-0"].await_ready)


def test_a_name_is_held_by_one_process(cluster: Cluster) -> None:
    """A second process of the same instance name on this host says so and ends; the first works on."""
    twin = cluster.twin("decide-0")
    twin.spawn()
    assert twin.child.wait(60.0)
    assert "instance decide-0 runs already" in twin.tail()
    assert not cluster["decide-0"].faults()
