"""The only Kafka broker goes away and comes back: all of it waits, and goes on where it was."""

import time
from collections.abc import Callable

import pytest

from tests.faults.conftest import DRAIN_TIMEOUT_S
from tests.support.cluster import Cluster
from tests.support.load import Load, Verdict
from tests.support.stack import ServiceStack

SILENCE_MAX_S = 50.0
"""Kafka's own restart, up to 12 s in which a killed broker refuses sends, then a rebalance."""

STOP_MAX_S = DRAIN_TIMEOUT_S + 12.0
"""What is in flight cannot end; then there are a commit that nobody takes, and clients to close."""


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_broker_that_comes_back_has_lost_nothing(
    cluster: Cluster, stack: ServiceStack, how: str, tell: Callable[[Verdict], None]
) -> None:
    """Stopped in good order, or killed: each process lives through it, or stops; every request is decided once."""
    members = ("decide-0", "decide-1", "pool-0", "audit-0")
    async with Load(cluster, total=500, rate=50) as load:
        await load.replied(100)
        await load.during(stack.kafka.stop if how == "stop" else stack.kafka.kill)
        try:
            if how == "stop":
                # A worker that is told to stop meanwhile has nothing to wait for, and what it began is another's.
                began = time.monotonic()
                await load.during(cluster["decide-1"].stop)
                took_s = time.monotonic() - began
        finally:
            await load.during(stack.kafka.start)
        if how == "stop":
            await load.during(cluster.start, "decide-1")
        verdict = await load.verdict()
    tell(verdict)
    if how == "stop":
        assert took_s < STOP_MAX_S
    assert verdict.statuses == {"completed": verdict.requests}
    assert verdict.wait_beyond_s < SILENCE_MAX_S
    assert all(cluster[name].runs for name in members), cluster.tails()
