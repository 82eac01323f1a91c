"""Features on real processes: computed of Redis, a feature server and the request; without them, a person decides."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from app.adapters.redis_feast import RedisFeatureStore
from app.domain.features import EntityKey, FeatureStatus, ViewNeed
from tests.support.caller import Caller, request
from tests.support.cluster import Cluster
from tests.support.cluster_documents import Document, document, project_of
from tests.support.feature_server import FeatureServer, feature_server

SUBJECT = "subject-7"
"""Its score is 7, by the cluster's own features."""
BONUS = 0.5


def documents(cluster: Cluster, server: FeatureServer, project: str) -> Sequence[Document]:
    """The cluster's registry, a view of the server, one that is computed, and a route whose version needs it."""
    whole = list(cluster.documents("1"))
    inline = next(each for each in whole if each["metadata"]["name"] == "inline-1")
    source = {
        "type": "http",
        "endpoints": [server.url],
        "timeout": "5s",
        "writeBack": {"project": project, "maxAge": "1d"},
    }
    spec: dict[str, Any] = {
        **inline["spec"],
        "version": "computed",
        "features": [
            {"ref": "made.x", "name": "x", "required": True, "maxAge": "1h", "onViolation": "refer"},
            {"ref": "subject.score", "default": 0.0},
        ],
    }
    select = {"version": "computed"}
    rule = {
        "name": "default",
        "tasks": [{"name": "first", "model": "inline", "select": select}],
        "result": {"y": "outputs.first.y"},
        "referResult": {"y": None},
    }
    return [
        *whole,
        document(
            "FeatureView",
            "served",
            {
                "entities": [{"name": "subject_id", "type": "STRING"}],
                "features": [{"name": "bonus", "type": "DOUBLE"}],
                "source": source,
            },
        ),
        document(
            "FeatureView",
            "made",
            {
                "features": [{"name": "x", "type": "DOUBLE"}],
                "onDemand": {"x": "subject.score * 10.0 + double(inputs.x) + served.bonus"},
            },
        ),
        document("ModelVersion", "inline-computed", spec),
        document("Route", "made", {"path": "/made", "deadline": "60s", "rules": [rule]}),
    ]


async def test_a_route_of_computed_features(cluster: Cluster) -> None:
    """Redis and the server are asked, what the server said is kept in Redis; without it, a person decides."""
    await asyncio.to_thread(cluster.start, "decide-1")
    project = f"{project_of(cluster.settings.topic_prefix)}_served"
    redis = RedisFeatureStore(cluster.settings.redis_url)
    key = EntityKey(project, ("subject_id",), (SUBJECT,), ("STRING",))
    async with feature_server() as server, Caller(cluster) as caller:
        server.put("served", SUBJECT, time.time_ns() // 1_000_000, bonus=BONUS)
        revision = await asyncio.to_thread(cluster.publish, documents(cluster, server, project))

        async def ask(subject: str) -> Mapping[str, Any]:
            async with asyncio.timeout(60):
                while True:
                    body = request("/made", 3.0, subject=subject)
                    told: Mapping[str, Any] = orjson.loads((await caller.ask(body, caller.spring())).value)
                    if told["revision"] == revision:
                        return told

        expected = 2 * (70.0 + 3.0 + BONUS) + 7.0
        first = await ask(SUBJECT)
        assert (first["status"], first["result"]) == ("completed", {"y": expected})
        need = ViewNeed("served", key, ("bonus",), ("DOUBLE",))
        async with asyncio.timeout(20):
            while True:
                stored = await redis.fetch([need], 5_000)
                if stored["served", "bonus"].status is FeatureStatus.PRESENT:
                    break
                await asyncio.sleep(0.01)
        asked = len(server.asked)
        assert (await ask(SUBJECT))["result"] == {"y": expected}
        assert len(server.asked) == asked

        stranger = await ask("subject-8")
        assert (stranger["status"], stranger["result"]) == ("partial", {"y": None})
        assert stranger["outputs"]["first"]["status"] == "skipped"
        assert [(error["code"], error["feature"]) for error in stranger["errors"]] == [
            ("feature_missing", "made.x"),
            ("referred", "made.x"),
        ]
        assert "its ingredient served.bonus is missing" in stranger["errors"][0]["message"]
        await asyncio.to_thread(cluster.publish, cluster.documents("1"))
    await redis.close()
