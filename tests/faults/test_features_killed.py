"""The features worker is killed in mid-flow, twice: aggregates end as if it had never happened."""

import asyncio
import random
import time
from typing import Any

import orjson
from confluent_kafka import Producer

from app.adapters.redis_feast import RedisFeatureStore
from app.adapters.topics import AGGREGATED
from app.domain.features import EntityKey, FeatureStatus, ViewNeed
from app.domain.view_documents import FeatureViewSpec
from tests.support.cluster import Cluster
from tests.support.features_world import feature_view

ENTITIES = 40
EVENTS_A_SECOND = 400
KILLED_AFTER_S = (2.0, 3.0)
STORED_WITHIN_S = 90.0
WINDOWS = ["1h", "24h", "30d"]
SPEC = {
    "aggregate": [
        {"of": "amount", "op": op, "windows": WINDOWS} for op in ("sum", "count", "mean", "min", "max", "distinct")
    ]
}


class Payments:
    """Events that are sent, some twice under one id; and what all of them come to."""

    def __init__(self, cluster: Cluster, project: str) -> None:
        self._topic = cluster.settings.topic(AGGREGATED[0])
        self._producer = Producer(
            {
                "bootstrap.servers": cluster.settings.kafka_bootstrap,
                "enable.idempotence": True,
                "partitioner": "murmur2",
            }
        )
        self._project = project
        self._random = random.Random(11)
        self.amounts: dict[int, list[int]] = {entity: [] for entity in range(ENTITIES)}
        self.stop = asyncio.Event()

    async def run(self) -> None:
        """Send until told to stop."""
        number = 0
        while not self.stop.is_set():
            for _ in range(EVENTS_A_SECOND // 20):
                self._send(number)
                number += 1
            self._producer.poll(0)
            await asyncio.sleep(0.05)
        assert await asyncio.to_thread(self._producer.flush, 60.0) == 0

    def _send(self, number: int) -> None:
        entity, amount = self._random.randrange(ENTITIES), self._random.randrange(1, 200)
        body = {
            "project": self._project,
            "view": "payments",
            "entities": {"applicant_id": entity},
            "values": {"amount": amount},
            # Out of order by up to a minute.
            "event_time": time.time_ns() // 1_000_000 - self._random.randrange(60_000),
        }
        for _ in range(1 + (number % 5 == 0)):
            self._producer.produce(
                self._topic, orjson.dumps(body), b"applicant_id=%d" % entity, headers=[("update-id", b"%d" % number)]
            )
        self.amounts[entity].append(amount)

    def expected(self, entity: int) -> dict[str, float]:
        """The aggregates of an entity, from all that was sent."""
        given = self.amounts[entity]
        one = {
            "sum": float(sum(given)),
            "count": len(given),
            "mean": sum(given) / len(given),
            "min": min(given),
            "max": max(given),
            "distinct": len(set(given)),
        }
        return {f"amount_{op}_{window}": value for op, value in one.items() for window in WINDOWS}


async def test_a_killed_features_worker_neither_loses_nor_doubles_an_event(cluster: Cluster) -> None:
    """kill -9, twice, under load with duplicates and disorder: every aggregate of every entity is exact."""
    project = cluster.settings.topic_prefix.rstrip(".")
    document = feature_view("payments", project, {"amount": "INT64"}, **SPEC)
    await asyncio.to_thread(cluster.publish, [*cluster.documents(), document])
    await asyncio.to_thread(cluster.start, "features-0")
    payments = Payments(cluster, project)
    load = asyncio.create_task(payments.run())
    for after_s in KILLED_AFTER_S:
        await asyncio.sleep(after_s)
        await asyncio.to_thread(cluster["features-0"].kill)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(cluster.start, "features-0")
    await asyncio.sleep(1.0)
    payments.stop.set()
    await load
    types = FeatureViewSpec.model_validate_json(orjson.dumps(document["spec"])).types
    store = RedisFeatureStore(cluster.settings.redis_url)
    try:
        end = time.monotonic() + STORED_WITHIN_S
        left = set(range(ENTITIES))
        while left:
            for entity in sorted(left):
                key = EntityKey(project, ("applicant_id",), (entity,), ("INT64",))
                fetched = await store.fetch([ViewNeed("payments", key, tuple(types), tuple(types.values()))], 5_000)
                expected = payments.expected(entity)
                found: dict[str, Any] = {name: fetched["payments", name].value for name in expected}
                if found == expected:
                    assert fetched["payments", "amount"].status is FeatureStatus.PRESENT
                    left.discard(entity)
                    continue
                assert found["amount_count_24h"] is None or found["amount_count_24h"] <= expected["amount_count_24h"]
                assert time.monotonic() < end, f"entity {entity}: {found} and not {expected}\n{cluster.tails()}"
            await asyncio.sleep(0.2)
    finally:
        await store.close()
    assert sum(map(len, payments.amounts.values())) > 1_000
    await asyncio.to_thread(cluster["features-0"].stop)
    await asyncio.to_thread(cluster.publish, cluster.documents())
