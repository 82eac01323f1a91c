"""The skew guard on real processes: what a decide worker tells of inputs like those of training, and of others."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import httpx
import orjson
from prometheus_client.parser import text_string_to_metric_families

from app.domain.skew import baseline_of, written
from tests.support.caller import Caller, request
from tests.support.cluster import Cluster
from tests.support.cluster_documents import SUBJECTS, score_of
from tests.support.registry_documents import changed

REQUESTS = 700
"""Enough for an index to be told, and to be sure of it."""
MODELS = ("inline", "pooled")
SUBJECT_NAMES = [f"subject-{number}" for number in range(SUBJECTS)]


def documents(cluster: Cluster) -> Sequence[Any]:
    """The cluster's registry, its inline and its pooled model trained on x between 0 and 1, and on any subject."""
    whole = [dict(each) for each in cluster.documents("1")]
    rng = random.Random(7)
    rows = [{"x": rng.random(), "score": score_of(rng.choice(SUBJECT_NAMES))} for _ in range(2_000)]
    for model in MODELS:
        baseline = orjson.loads(written(baseline_of(rows, model=model, version="1")))
        whole = changed(whole, f"{model}-1", "spec.baseline", baseline)
    return whole


def samples(cluster: Cluster, name: str) -> dict[tuple[str, ...], float]:
    """A metric's samples of the decide worker, by model, feature and, where there is one, bin."""
    text = httpx.get(f"{cluster['decide-0'].url}/metrics", timeout=10).text
    return {
        tuple(sample.labels[label] for label in ("model", "feature", "bin") if label in sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


async def ask(caller: Caller, values: Sequence[float], rng: random.Random, seen: int) -> None:
    """Send a request a value, each of some subject, to the inline and the pooled model; wait for the replies."""
    for value in values:
        body = request("/mixed", value, subject=rng.choice(SUBJECT_NAMES))
        await caller.send(body, caller.spring(), key=body["request_id"].encode())
    replies = await caller.replies(seen + len(values))
    assert {orjson.loads(reply.value)["status"] for reply in replies[seen:]} == {"completed"}


async def test_a_shift_of_the_inputs_shows(cluster: Cluster) -> None:
    """Like training: each feature's index is below 0.1. Then x is another: above 0.25, and x alone. Then none is told.

    Of inline and queued tasks alike; every row is in one bin; a version that leaves the registry leaves the metrics.
    """
    revision = await asyncio.to_thread(cluster.publish, documents(cluster))
    rng = random.Random(11)
    async with Caller(cluster) as caller:
        asked = 0
        async with asyncio.timeout(30):
            while orjson.loads((await caller.ask(request("/soft", 1.0))).value)["revision"] != revision:
                asked += 1
        asked += 1
        await ask(caller, [rng.random() for _ in range(REQUESTS)], rng, asked)
        stable = await asyncio.to_thread(samples, cluster, "broker_feature_psi")
        assert set(stable) == {(model, feature) for model in MODELS for feature in ("x", "score")}
        assert max(stable.values()) < 0.1, stable
        await ask(caller, [1.5 + rng.random() for _ in range(REQUESTS)], rng, asked + REQUESTS)
        moved = await asyncio.to_thread(samples, cluster, "broker_feature_psi")
        for model in MODELS:
            assert moved[model, "x"] > 0.25, moved
            assert moved[model, "score"] < 0.1, moved
        given = await asyncio.to_thread(samples, cluster, "broker_feature_bin_total")
        above = {key[2]: count for key, count in given.items() if key[:2] == ("inline", "x") and key[2][0] == ">"}
        assert list(above.values()) == [REQUESTS]
        for model in MODELS:
            assert sum(count for key, count in given.items() if key[:2] == (model, "x")) == 2 * REQUESTS
        latest = await asyncio.to_thread(cluster.publish, cluster.documents("2"))
        async with asyncio.timeout(30):
            while orjson.loads((await caller.ask(request("/soft", 1.0))).value)["revision"] != latest:
                pass
    assert await asyncio.to_thread(samples, cluster, "broker_feature_bin_total") == {}
    assert await asyncio.to_thread(samples, cluster, "broker_feature_psi") == {}
