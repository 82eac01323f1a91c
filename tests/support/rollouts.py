"""Documents of a cluster with a rollout: route ``/scored``, whose model ``inline`` goes from version 1 to version 2."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from app.domain.documents import Document, Route
from app.domain.registry import Source, content_of, parse, rollout_digest
from app.domain.rollouts import RolloutName
from app.domain.route_documents import RolloutStatus, RouteStatus
from tests.support.cluster_documents import document, registry_documents

SCORED: Final = RolloutName("scored", "default", "first")
EVERY_MS: Final = 1_000
STEPS: Final = (10, 50, 100)


def rollout_documents(
    url: str,
    *,
    prefix: str,
    bad_url: str | None = None,
    min_decisions: int = 5,
    shadow: Sequence[Mapping[str, Any]] = (),
    **rollout: Any,
) -> Sequence[Mapping[str, Any]]:
    """The cluster's documents, a second version of a model (at ``bad_url`` if given), and a route that rolls it out."""
    base = list(registry_documents(url, prefix=prefix))
    (one,) = (each for each in base if each["metadata"]["name"] == "inline-1")
    two = {
        **one,
        "metadata": {"name": "inline-2"},
        "spec": {
            **one["spec"],
            "version": "2",
            "digest": "sha256:" + "2".rjust(64, "0"),
            "backend": {"type": "http", "endpoints": [bad_url or url]},
        },
    }
    task = {
        "name": "first",
        "model": "inline",
        "select": {"version": "1"},
        "rollout": {
            "to": "2",
            "steps": list(STEPS),
            "every": f"{EVERY_MS}ms",
            "abortOn": {"errorRate": 0.2},
            "minDecisions": min_decisions,
            **rollout,
        },
        "fallback": [{"version": "1"}],
        "shadow": list(shadow),
    }
    rule = {"name": "default", "tasks": [task], "result": {"y": "outputs.first.y"}}
    route = document("Route", SCORED.route, {"path": "/scored", "deadline": "60s", "rules": [rule]})
    return [*base, two, route]


def begun(
    contents: Sequence[Mapping[str, Any]], *, state: Any = "progressing", step: int = 0, since: int = 1_000_000
) -> tuple[Document, ...]:
    """The documents, read, with the rollout begun as ``apply`` begins it."""
    result: list[Document] = []
    for each in parse(Source("test", content) for content in contents):
        if isinstance(each, Route) and each.metadata.name == SCORED.route:
            task = each.spec.rules[0].tasks[0]
            status = RolloutStatus(state=state, step=step, since=since, of=rollout_digest("default", task))
            result.append(each.model_copy(update={"status": RouteStatus(rollouts={SCORED.key: status})}))
        else:
            result.append(each)
    return tuple(result)


def documents(*, state: Any = "progressing", step: int = 0, min_decisions: int = 5) -> tuple[Document, ...]:
    """A registry whose rollout is in ``state``; nobody answers at its endpoints."""
    contents = rollout_documents("http://127.0.0.1:1", prefix="", min_decisions=min_decisions)
    everything = begun(contents, state=state, step=step)
    kept = ("inline", "inline-1", "inline-2", "subject", SCORED.route)
    return tuple(each for each in everything if each.metadata.name in kept)


def with_rollout(begun_documents: Sequence[Document]) -> Sequence[Mapping[str, Any]]:
    """The documents' contents, status and all, as a cluster publishes them."""
    return [content_of(each) for each in begun_documents]
