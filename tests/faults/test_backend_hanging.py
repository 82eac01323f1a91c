"""A model hangs, then fails in other ways: whoever does not need it does not notice, and nobody waits beyond a bound."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.cluster import Cluster
from tests.support.cluster_documents import HANGING_TIMEOUT_MS
from tests.support.cluster_models import Mode
from tests.support.load import Load, Verdict

WAIT_MAX_S = 10.0
"""Two attempts of 300 ms; the rest is what a busy machine may add."""
CODES: dict[Mode, str] = {"hang": "model_timeout", "error": "model_error", "garbage": "model_output_invalid"}


def code_of(body: Any) -> str | None:
    """The code of a reply's only error."""
    codes = [error["code"] for error in body["errors"]]
    assert len(codes) <= 1, body
    return codes[0] if codes else None


@pytest.mark.parametrize("mode", ["hang", "error", "garbage"])
async def test_a_model_that_fails_fails_alone(cluster: Cluster, mode: Mode, tell: Callable[[Verdict], None]) -> None:
    """Requests that can do without the model are partial, the others complete; when it answers again, so do all."""
    async with Load(cluster, total=400, rate=60, paths=("/hanging", "/inline", "/mixed", "/soft")) as load:
        await load.replied(60)
        cluster.models.switch("hanging", mode)
        await load.replied(260)
        cluster.models.switch("hanging", "ok")
        verdict = await load.verdict()
        last = [asked.request_id for asked in load.asked[-40:]]
    tell(verdict)
    assert verdict.longest_wait_s < WAIT_MAX_S
    hanging = verdict.by_path["/hanging"]
    assert hanging.keys() == {"completed", "partial"}
    assert hanging["partial"] > 20
    assert verdict.statuses["partial"] == hanging["partial"]
    assert verdict.statuses["completed"] == verdict.requests - hanging["partial"]
    for body in verdict.bodies.values():
        assert code_of(body) == (CODES[mode] if body["status"] == "partial" else None)
        if body["status"] == "partial" and mode == "hang":
            assert body["outputs"]["hanging"]["status"] == "timeout"
            assert body["outputs"]["hanging"]["latency_ms"] >= HANGING_TIMEOUT_MS
    assert all(verdict.bodies[request_id]["status"] == "completed" for request_id in last)
