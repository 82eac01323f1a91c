"""A model hangs, then fails in other ways: who does not need it does not notice, and nobody waits beyond a bound."""

from collections import Counter
from collections.abc import Callable
from typing import Final

from tests.support.cluster import Cluster
from tests.support.cluster_documents import HANGING_TIMEOUT_MS
from tests.support.cluster_models import Mode
from tests.support.load import Load, Verdict

WAIT_MAX_S: Final = 10.0
"""Two attempts of 500 ms; the rest is what a busy machine may add."""
RATE: Final = 80
UNANSWERED_MAX: Final = 2 * RATE
"""Two seconds of it, several times what hangs at once: a slow machine's growing queue is not what is measured."""
PHASES: Final[dict[Mode, str]] = {"hang": "model_timeout", "error": "model_error", "garbage": "model_output_invalid"}


async def test_a_model_that_fails_fails_alone(cluster: Cluster, tell: Callable[[Verdict], None]) -> None:
    """Requests that can do without the model are partial, the others complete; when it answers again, so do all."""
    paths = ("/hanging", "/inline", "/mixed", "/soft")
    async with Load(cluster, total=60_000, rate=RATE, paths=paths, unanswered_max=UNANSWERED_MAX) as load:
        await load.replied(100)
        for mode, code in PHASES.items():
            cluster.models.switch("hanging", mode)
            await load.told(code, 20)
        cluster.models.switch("hanging", "ok")
        await load.go_on(200)
        verdict = await load.verdict()
        last = load.last(120)
    tell(verdict)
    assert verdict.wait_beyond_s < WAIT_MAX_S
    hanging = verdict.by_path["/hanging"]
    assert hanging.keys() == {"completed", "partial"}
    assert verdict.statuses == {
        "completed": verdict.requests - hanging["partial"],
        "partial": hanging["partial"],
    }
    codes = Counter(error["code"] for body in verdict.bodies.values() for error in body["errors"])
    assert codes.keys() == set(PHASES.values())
    assert min(codes.values()) > 10
    assert codes.total() == hanging["partial"]
    for body in verdict.bodies.values():
        if any(error["code"] == "model_timeout" for error in body["errors"]):
            assert body["outputs"]["hanging"]["status"] == "timeout"
            assert body["outputs"]["hanging"]["latency_ms"] >= HANGING_TIMEOUT_MS
    assert all(verdict.bodies[request_id]["status"] == "completed" for request_id in last)
    assert len(last) > 100
