"""Publishing and following the registry on real Kafka: one winner, a switch within a second, nothing bad believed."""

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import zstandard
from confluent_kafka import Producer
from prometheus_client import REGISTRY

from app.adapters.registry_topic import (
    POINTER_KEY,
    REVISIONS_KEPT,
    Pointer,
    RegistryFollower,
    publish_revision,
    read_head,
    read_published,
)
from app.adapters.topics import REGISTRY_TOPIC, TopicAdmin, read_documents, wanted_topics
from app.domain.errors import ConfigurationError, DocumentsRefused, RevisionConflict, StoreUnavailable
from app.domain.registry import Revision, canonical
from app.settings import Settings
from tests.support.registry_documents import changed, revision, sound
from tests.support.stack import ServiceStack

BOUND_S = 20.0


@pytest.fixture
def settings(kafka_bootstrap: str, topic_prefix: str) -> Settings:
    """Settings whose topics exist, and are this test's alone."""
    settings = Settings(kafka_bootstrap=kafka_bootstrap, topic_prefix=topic_prefix)
    registry = settings.topic(REGISTRY_TOPIC)
    TopicAdmin(settings).apply(
        [each for each in wanted_topics(read_documents(), settings, []) if each.name == registry]
    )
    return settings


def numbered(number: int) -> Revision:
    """A revision unlike those of other numbers."""
    return revision(changed(sound(), "credit-pd", "spec.owner", f"team {number}"))


def publish(settings: Settings, number: int, expected: str | None) -> Revision:
    published = numbered(number)
    publish_revision(settings, published, expected=expected, now_ms=time.time_ns() // 1_000_000)
    return published


def write(settings: Settings, *records: tuple[bytes, bytes | None]) -> None:
    """Put records on the topic by hand, past every check."""
    producer = Producer({"bootstrap.servers": settings.kafka_bootstrap})
    for key, value in records:
        producer.produce(settings.topic(REGISTRY_TOPIC), key=key, value=value, partition=0)
    assert producer.flush(BOUND_S) == 0


def pointer_to(identity: str) -> bytes:
    return Pointer(identity, None, 1, 1).as_bytes()


@asynccontextmanager
async def following(settings: Settings, *callbacks: Callable[[Revision], None]) -> AsyncIterator[RegistryFollower]:
    follower = RegistryFollower(settings, on_switch=callbacks)
    await follower.start()
    try:
        yield follower
    finally:
        await follower.stop()


async def until(condition: Callable[[], bool], what: str) -> float:
    """Seconds that it took for the condition to hold."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < BOUND_S, f"not within {BOUND_S:.0f} s: {what}"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


def refusals(record: str) -> float:
    return REGISTRY.get_sample_value("broker_registry_refused_total", {"record": record}) or 0.0


async def test_what_is_published_is_followed_within_a_second(settings: Settings) -> None:
    """A follower starts without a revision, goes over to each as it is published, and says so."""
    switched: list[str] = []
    async with following(settings, lambda each: switched.append(each.id)) as follower:
        assert (follower.current, follower.healthy) == (None, False)
        first = await asyncio.to_thread(publish, settings, 1, None)
        assert await until(lambda: follower.current is not None, "the first revision") < 1
        assert follower.healthy
        second = await asyncio.to_thread(publish, settings, 2, first.id)
        assert await until(lambda: follower.current is not None and follower.current.id == second.id, "the second") < 1
        assert switched == [first.id, second.id]
        old = follower.get(first.id)
        assert old is not None
        assert old.models["credit-pd"].owner == "team 1"
        assert follower.get(second.id) is follower.current
        assert follower.get("sha256:0") is None
    assert not follower.healthy
    published = read_published(settings)
    assert published is not None
    assert published.revision.documents == tuple(sorted(second.documents, key=lambda d: (d.kind, d.metadata.name)))
    assert (published.pointer.previous, published.pointer.documents) == (first.id, len(second.documents))


async def test_a_follower_that_starts_late_has_the_last_revision_at_once(settings: Settings) -> None:
    """``start`` returns with the current revision, though a transaction's marker ends the topic."""
    first = await asyncio.to_thread(publish, settings, 1, None)
    second = await asyncio.to_thread(publish, settings, 2, first.id)
    async with following(settings) as follower:
        assert follower.current is not None
        assert follower.current.id == second.id
        assert follower.healthy


async def test_old_revisions_are_kept_up_to_a_bound(settings: Settings) -> None:
    """Pending joins find theirs among the last; memory does not grow with the registry's history."""
    identities = [numbered(number).id for number in range(REVISIONS_KEPT + 2)]
    previous = None
    for number, identity in enumerate(identities[:3]):
        await asyncio.to_thread(publish, settings, number, previous)
        previous = identity
    records = [
        (each.id.encode(), zstandard.compress(canonical(each.documents)))
        for each in (numbered(number) for number in range(3, REVISIONS_KEPT + 2))
    ]
    await asyncio.to_thread(write, settings, *records)
    async with following(settings) as follower:
        # The oldest two gave way; the current one is held though newer records came after it.
        assert follower.get(identities[0]) is None
        assert follower.get(identities[1]) is None
        assert all(follower.get(identity) is not None for identity in identities[2:])
        assert follower.current is not None
        assert follower.current.id == identities[2]


def test_of_two_concurrent_publishers_one_wins_and_the_other_is_told(settings: Settings) -> None:
    """Both saw the same head; exactly one revision is written, and the loser's is not on the topic at all."""
    first = publish(settings, 1, None)
    outcomes: dict[int, object] = {}
    barrier = threading.Barrier(2)

    def contend(number: int) -> None:
        barrier.wait(BOUND_S)
        try:
            outcomes[number] = publish(settings, number, first.id).id
        except RevisionConflict as error:
            outcomes[number] = error

    threads = [threading.Thread(target=contend, args=(number,)) for number in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (won,) = [outcome for outcome in outcomes.values() if isinstance(outcome, str)]
    (lost,) = [outcome for outcome in outcomes.values() if isinstance(outcome, RevisionConflict)]
    assert "nothing was published" in str(lost)
    assert read_head(settings).id == won


def test_a_publisher_that_saw_an_older_head_is_refused(settings: Settings) -> None:
    """The message names what is current, so that the difference can be looked at again."""
    first = publish(settings, 1, None)
    second = publish(settings, 2, first.id)
    with pytest.raises(RevisionConflict, match=second.id):
        publish(settings, 3, first.id)
    with pytest.raises(RevisionConflict, match=second.id):
        publish(settings, 3, None)
    assert read_head(settings).id == second.id


def _unsound() -> tuple[str, bytes]:
    """A revision that hashes to its id, and that `apply` would refuse."""
    content = b'[{"kind":"Route"}]'
    return f"sha256:{hashlib.sha256(content).hexdigest()}", zstandard.compress(content)


@pytest.mark.parametrize(
    ("records", "kind"),
    [
        ([(POINTER_KEY, b"{")], "pointer"),
        ([(POINTER_KEY, b"[]")], "pointer"),
        ([(POINTER_KEY, b'{"revision": "x", "previous": 1, "published_at": 1, "documents": 1}')], "pointer"),
        ([(POINTER_KEY, b'{"revision": "x", "previous": null, "published_at": "now", "documents": 1}')], "pointer"),
        ([(POINTER_KEY, None)], "pointer"),
        ([(POINTER_KEY, pointer_to("sha256:unheard-of"))], "revision"),
        ([(b"sha256:a", b"not zstd"), (POINTER_KEY, pointer_to("sha256:a"))], "revision"),
        ([(b"sha256:b", zstandard.compress(b"[]")), (POINTER_KEY, pointer_to("sha256:b"))], "revision"),
        ([(_unsound()[0].encode(), _unsound()[1]), (POINTER_KEY, pointer_to(_unsound()[0]))], "revision"),
        ([(b"sha256:c", zstandard.compress(bytes(17 << 20))), (POINTER_KEY, pointer_to("sha256:c"))], "revision"),
    ],
)
async def test_what_is_wrong_on_the_topic_is_refused_and_the_last_good_stays(
    settings: Settings, records: list[tuple[bytes, bytes | None]], kind: str
) -> None:
    """Records written by hand are counted and not believed; the next good revision is gone over to."""
    first = await asyncio.to_thread(publish, settings, 1, None)
    async with following(settings) as follower:
        before = refusals(kind)
        await asyncio.to_thread(write, settings, *records)
        await until(lambda: refusals(kind) == before + 1, "the refusal")
        assert follower.current is not None
        assert follower.current.id == first.id
        assert follower.healthy
        async with following(settings) as late:
            assert late.current is not None
            assert late.current.id == first.id
        head = await asyncio.to_thread(read_head, settings)
        assert head.published is None
        assert bool(head.faults) == (records[-1][1] is not None)
        second = await asyncio.to_thread(publish, settings, 2, head.id)
        await until(lambda: follower.current is not None and follower.current.id == second.id, "the next good one")


def test_a_head_that_is_refused_is_said_to_be(settings: Settings) -> None:
    """Commands that need the current revision name its faults."""
    write(settings, (POINTER_KEY, pointer_to("sha256:a")))
    with pytest.raises(DocumentsRefused, match="sha256:a"):
        read_published(settings)


async def test_a_follower_that_fails_is_not_healthy(settings: Settings) -> None:
    """A process whose follower ended keeps its revision, and says that it would not notice the next."""

    def fail(_: Revision) -> None:
        raise RuntimeError("the callback is broken")

    async with following(settings, fail) as follower:
        first = await asyncio.to_thread(publish, settings, 1, None)
        await until(lambda: follower.current is not None and not follower.healthy, "the failure")
        assert follower.current is not None
        assert follower.current.id == first.id


async def test_a_broker_restart_is_survived(settings: Settings, stack: ServiceStack) -> None:
    """The last revision serves while Kafka is away; what is published afterwards comes."""
    first = await asyncio.to_thread(publish, settings, 1, None)
    async with following(settings) as follower:
        await asyncio.to_thread(stack.kafka.stop)
        try:
            with pytest.raises(StoreUnavailable):
                await asyncio.to_thread(read_head, settings, timeout_s=2.0)
            assert follower.current is not None
            assert follower.current.id == first.id
        finally:
            await asyncio.to_thread(stack.kafka.start)
        second = await asyncio.to_thread(publish, settings, 2, first.id)
        await until(lambda: follower.current is not None and follower.current.id == second.id, "after the restart")
        assert follower.healthy


async def test_no_topic_and_no_broker_are_told_apart(kafka_bootstrap: str, topic_prefix: str) -> None:
    """Each names what to do."""
    settings = Settings(kafka_bootstrap=kafka_bootstrap, topic_prefix=topic_prefix)
    with pytest.raises(ConfigurationError, match="topics apply"):
        await RegistryFollower(settings).start()
    with pytest.raises(ConfigurationError, match="topics apply"):
        read_head(settings)
    nowhere = Settings(kafka_bootstrap="127.0.0.1:1")
    with pytest.raises(ConfigurationError, match="BROKER_KAFKA_BOOTSTRAP"):
        await RegistryFollower(nowhere).start(timeout_s=2.0)
    with pytest.raises(StoreUnavailable, match="BROKER_KAFKA_BOOTSTRAP"):
        read_head(nowhere, timeout_s=2.0)
