"""Routing on real processes: a rule on a header and a subject's arm are the same over HTTP, over Kafka, everywhere."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import orjson

from app.domain.assignment import assign
from app.domain.requests import Headers
from tests.support.caller import Caller, request
from tests.support.cluster import Cluster
from tests.support.cluster_documents import Document, document

EXPERIMENT = "inline-ab"
WEIGHTS = {"1": 60, "2": 40}
SUBJECTS = 8


def documents(cluster: Cluster) -> Sequence[Document]:
    """The cluster's registry, a second version of model `inline`, and a route by header and by subject."""
    first = list(cluster.documents("1"))
    second = next(each for each in cluster.documents("2") if each["metadata"]["name"] == "inline-2")
    split = [{"version": version, "weight": weight} for version, weight in WEIGHTS.items()]
    sticky = {"split": split, "stickyBy": "subject_id", "experiment": EXPERIMENT}
    rules = [
        {
            "name": "partner",
            "when": '"x-channel" in metadata.headers && metadata.headers["x-channel"] == "partner"',
            "tasks": [{"name": "first", "model": "inline", "select": {"version": "2"}}],
        },
        {"name": "others", "tasks": [{"name": "first", "model": "inline", "select": sticky}]},
    ]
    return [*first, second, document("Route", "chosen", {"path": "/chosen/*", "deadline": "60s", "rules": rules})]


async def test_http_and_kafka_decide_alike(cluster: Cluster) -> None:
    """Neither the header's rule nor the subject's arm depends on the way that was taken, nor on the worker."""
    await asyncio.to_thread(cluster.start, "gateway-0", "decide-1")
    revision = await asyncio.to_thread(cluster.publish, documents(cluster))
    url = cluster["gateway-0"].url
    async with Caller(cluster) as caller, httpx.AsyncClient(base_url=url, timeout=60) as http:

        async def over_http(body: Mapping[str, Any], *headers: tuple[str, str]) -> Any:
            answer = await http.post("/v1/decisions", json=body, headers=list(headers))
            assert answer.status_code == 200, answer.text
            return answer.json()

        async def over_kafka(body: Mapping[str, Any], headers: Headers = (), *, key: bytes = b"k") -> Any:
            return orjson.loads((await caller.ask(body, (*caller.spring(), *headers), key=key)).value)

        # Keys of every partition, so that both workers are asked.
        async with asyncio.timeout(60):
            for number in range(8):
                while True:
                    told = await over_kafka(request("/inline", 1.0), key=b"key-%d" % number)
                    if told["revision"] == revision:
                        break
        for channel, rule in (("partner", "partner"), ("web", "others")):
            told = [
                await over_http(request("/chosen/a/b", 1.0), ("X-Channel", channel), ("Authorization", "secret")),
                await over_kafka(request("/chosen/a/b", 1.0), (("x-channel", channel.encode()),)),
            ]
            assert [each["rule"] for each in told] == [rule, rule]
        for number in range(SUBJECTS):
            subject = f"subject-{number}"
            body = [request("/chosen/any", 1.0, subject=subject) for _ in range(3)]
            told = [
                await over_http(body[0]),
                await over_kafka(body[1], key=b"key-%d" % number),
                await over_kafka(body[2], key=b"other-%d" % number),
            ]
            outputs = [each["outputs"]["first"] for each in told]
            arm = assign(EXPERIMENT, WEIGHTS.items(), subject)
            assert [each["version"] for each in outputs] == [arm] * 3
            assert [each["experiment"] for each in outputs] == [EXPERIMENT] * 3
