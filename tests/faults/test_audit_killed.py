"""The audit worker is killed in mid-flow, again and again: decisions go on, and each is recorded once."""

from collections.abc import Callable

from tests.support.cluster import Cluster
from tests.support.load import Load, Verdict

WAIT_MAX_S = 10.0
"""No decision waits for the audit worker; this is what a busy machine may add."""


async def test_a_killed_audit_worker_loses_and_doubles_nothing(
    cluster: Cluster, tell: Callable[[Verdict], None]
) -> None:
    """kill -9, twice, each time while it writes; the load does not notice, and the stores end complete."""
    async with Load(cluster, total=480, rate=80) as load:
        for replied in (100, 250):
            await load.replied(replied)
            await load.during(cluster["audit-0"].kill)
            await load.during(cluster.start, "audit-0")
        verdict = await load.verdict()
    tell(verdict)
    assert verdict.statuses == {"completed": verdict.requests}
    assert verdict.wait_beyond_s < WAIT_MAX_S
