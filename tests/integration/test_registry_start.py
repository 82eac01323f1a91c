"""A decide worker that starts on a registry without a sound revision: it waits for one, and answers nothing before."""

import asyncio
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Producer

from app.adapters.registry_topic import POINTER_KEY
from app.adapters.topics import REGISTRY_TOPIC
from tests.support.caller import Caller, request
from tests.support.cluster import Cluster
from tests.support.stack import ServiceStack


class Spoiled(Cluster):
    """Its registry begins with a pointer that cannot be read, written by hand."""

    _spoiled = False

    def publish(self, documents: Sequence[Mapping[str, Any]]) -> str:
        """As a cluster does, but for the first time."""
        if self._spoiled:
            return super().publish(documents)
        producer = Producer({"bootstrap.servers": self.settings.kafka_bootstrap})
        producer.produce(self.settings.topic(REGISTRY_TOPIC), key=POINTER_KEY, value=b"not json", partition=0)
        assert producer.flush(20) == 0
        self._spoiled = True
        return ""


@pytest.fixture
def spoiled(stack: ServiceStack, aws_env: dict[str, str], tmp_path: Path) -> Iterator[Cluster]:
    """The cluster, prepared, and nothing of it running yet."""
    with Spoiled(stack, tmp_path, prefix=f"i{uuid.uuid4().hex[:10]}.") as cluster:
        yield cluster


async def test_requests_wait_where_no_revision_is_sound(spoiled: Cluster) -> None:
    """The worker is not ready and says why, ends in good order, and decides what waited once there is a revision."""
    decide = spoiled["decide-0"]
    async with Caller(spoiled) as caller:
        headers = caller.spring()
        await caller.send(request("/soft", 1.0), headers)
        for _ in range(2):
            decide.spawn()
            await asyncio.to_thread(decide.await_logged, "registry_without_revision")
            await asyncio.to_thread(decide.await_logged, "starting")
            await asyncio.sleep(5)
            assert "no published revision is sound" in await asyncio.to_thread(decide.faults)
            with pytest.raises(AssertionError, match="0 replies"):
                await caller.replies(1, within_s=1.0)
            await asyncio.to_thread(decide.stop)
        decide.spawn()
        await asyncio.to_thread(decide.await_logged, "starting")
        revision = await asyncio.to_thread(spoiled.publish, spoiled.documents())
        await asyncio.to_thread(decide.await_ready)
        answer = orjson.loads((await caller.ask(request("/soft", 1.0))).value)
        assert (answer["status"], answer["revision"]) == ("completed", revision)
        # It waited longer than it may: that is what its caller is told, and not that there is no such path.
        waited = orjson.loads((await caller.reply(headers)).value)
        assert waited["status"] in ("completed", "expired")
