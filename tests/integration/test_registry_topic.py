"""Publishing and following the registry on real Kafka: one winner, a switch within a second, nothing bad believed."""

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import orjson
import pytest
import zstandard
from confluent_kafka import Producer
from prometheus_client import REGISTRY

from app.adapters.registry_topic import (
    MESSAGE_LENGTH_MAX,
    POINTER_DELETED,
    POINTER_KEY,
    PUBLICATION_HEADER,
    PUBLICATIONS_KEPT,
    REVISIONS_KEPT,
    Pointer,
    Publication,
    RegistryFollower,
    find_revision,
    publish_next,
    publish_revision,
    read_head,
    read_history,
    read_published,
)
from app.adapters.topics import REGISTRY_TOPIC, TopicAdmin, read_documents, wanted_topics
from app.domain.errors import ConfigurationError, DocumentsRefused, HeadRefused, RevisionConflict, StoreUnavailable
from app.domain.registry import Revision, canonical, revision_id
from app.settings import Settings
from tests.support.registry_documents import changed, revision, sound
from tests.support.stack import ServiceStack

BOUND_S = 20.0


ID_A, ID_B = (f"sha256:{letter * 64}" for letter in "ab")


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


def publish(settings: Settings, number: int, expected: str | None, message: str | None = None) -> Revision:
    published = numbered(number)
    now_ms = time.time_ns() // 1_000_000
    publish_revision(settings, published, expected=expected, now_ms=now_ms, message=message)
    return published


def write(settings: Settings, *records: tuple[bytes, bytes | None], headers: Sequence[tuple[str, bytes]] = ()) -> None:
    """Put records on the topic by hand, past every check."""
    producer = Producer({"bootstrap.servers": settings.kafka_bootstrap})
    for key, value in records:
        named: list[tuple[str, str | bytes | None]] = list(headers)
        producer.produce(settings.topic(REGISTRY_TOPIC), key=key, value=value, partition=0, headers=named)
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


def revisions_reported() -> set[str]:
    """The revisions that this process says it is at."""
    return {
        sample.labels["revision"]
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "broker_registry_revision_info" and sample.value == 1
    }


async def test_what_is_published_is_followed_within_a_second(settings: Settings) -> None:
    """A follower starts without a revision, goes over to each as it is published, and says which one it is at."""
    elsewhere = revisions_reported()
    switched: list[str] = []
    async with following(settings, lambda each: switched.append(each.id)) as follower:
        assert (follower.current, follower.healthy) == (None, False)
        first = await asyncio.to_thread(publish, settings, 1, None)
        assert await until(lambda: follower.current is not None, "the first revision") < 1
        assert follower.healthy
        assert revisions_reported() - elsewhere == {first.id}
        second = await asyncio.to_thread(publish, settings, 2, first.id)
        assert await until(lambda: follower.current is not None and follower.current.id == second.id, "the second") < 1
        assert switched == [first.id, second.id]
        assert revisions_reported() - elsewhere == {second.id}
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
    for each in (numbered(number) for number in range(3, REVISIONS_KEPT + 2)):
        record = (each.id.encode(), zstandard.compress(canonical(each.documents)))
        headers = [(PUBLICATION_HEADER, pointer_to(each.id))]
        await asyncio.to_thread(write, settings, record, headers=headers)
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


def unsound(content: bytes = b'[{"kind":"Route"}]') -> list[tuple[bytes, bytes | None]]:
    """A revision that hashes to its id, and that `apply` would refuse; and the pointer to it."""
    identity = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return [(identity.encode(), zstandard.compress(content)), (POINTER_KEY, pointer_to(identity))]


def spoiled(path: str, value: object) -> list[tuple[bytes, bytes | None]]:
    """The canonical form of the sound documents, but for one field of their route."""
    documents = changed(orjson.loads(canonical(revision().documents)), "credit", path, value)
    return unsound(orjson.dumps(documents, option=orjson.OPT_SORT_KEYS))


STATUS = {"state": "progressing", "step": 0, "since": 1, "of": "0" * 16}


@pytest.mark.parametrize(
    ("records", "kind"),
    [
        ([(POINTER_KEY, b"{")], "pointer"),
        ([(POINTER_KEY, b"[]")], "pointer"),
        ([(POINTER_KEY, b'{"revision": "x", "previous": 1, "published_at": 1, "documents": 1}')], "pointer"),
        ([(POINTER_KEY, b'{"revision": "x", "previous": null, "published_at": "now", "documents": 1}')], "pointer"),
        ([(POINTER_KEY, None)], "pointer"),
        ([(POINTER_KEY, pointer_to("sha256:unheard-of"))], "revision"),
        ([(ID_A.encode(), b"not zstd"), (POINTER_KEY, pointer_to(ID_A))], "revision"),
        ([(ID_B.encode(), zstandard.compress(b"[]")), (POINTER_KEY, pointer_to(ID_B))], "revision"),
        (unsound(), "revision"),
        # An empty registry would reject every request.
        (unsound(b"[]"), "revision"),
        # These would be taken, but for the one field.
        (spoiled("status", {"rollouts": {"default/pd": STATUS}}), "revision"),
        (spoiled("status", {"rollouts": {"default/pd": {**STATUS, "state": "lost"}}}), "revision"),
        (spoiled("spec.rules.0.tasks.0.after", ["pd"]), "revision"),
        (spoiled("spec.rules.0.tasks.0.fallback", [{"alias": "best"}]), "revision"),
        (spoiled("spec.rules.0.reasons", [{"code": "R1", "when": "1 +"}]), "revision"),
        (spoiled("spec.path", "/credit/*/more"), "revision"),
        (
            [(POINTER_KEY, b'{"revision": "x", "previous": null, "published_at": 1, "documents": 1, "message": 1}')],
            "pointer",
        ),
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


@pytest.mark.parametrize("pointers", [[(POINTER_KEY, b"not json")], [], unsound()[1:], unsound()])
async def test_who_starts_where_only_a_bad_pointer_is_left_goes_by_the_newest_sound_revision(
    settings: Settings, pointers: list[tuple[bytes, bytes | None]]
) -> None:
    """Older pointers are compacted away, or the last was deleted: an alarm, and the revision that others have kept.

    One that was written by hand and that no pointer ever named was never in force.
    """
    old, last, never = numbered(1), numbered(2), numbered(9)
    for each in (old, last, never):
        content = (each.id.encode(), zstandard.compress(canonical(each.documents)))
        told = [(PUBLICATION_HEADER, pointer_to(each.id))] if each is not never else []
        await asyncio.to_thread(write, settings, content, headers=told)
    await asyncio.to_thread(write, settings, *pointers)
    before = refusals("pointer") + refusals("revision")
    async with following(settings) as follower:
        assert follower.current is not None
        assert follower.current.id == last.id
        assert (follower.healthy, follower.blank) == (True, False)
        await asyncio.wait_for(follower.usable(), BOUND_S)
        assert refusals("pointer") + refusals("revision") == before + 1
        head = await asyncio.to_thread(read_head, settings)
        assert head.last_good is not None
        assert head.last_good.id == last.id
        third = await asyncio.to_thread(publish, settings, 3, head.id)
        await until(lambda: follower.current is not None and follower.current.id == third.id, "the next good one")


async def test_commands_and_workers_agree_on_what_was_last_in_force(settings: Settings) -> None:
    """A pointer back that somebody wrote by hand counts as any other, also once a bad one stands after it."""
    first = await asyncio.to_thread(publish, settings, 1, None)
    await asyncio.to_thread(publish, settings, 2, first.id)
    await asyncio.to_thread(write, settings, (POINTER_KEY, pointer_to(first.id)), (POINTER_KEY, b"not json"))
    head = await asyncio.to_thread(read_head, settings)
    assert head.last_good is not None
    assert head.last_good.id == first.id
    async with following(settings) as follower:
        assert follower.current is not None
        assert follower.current.id == first.id


async def test_stray_records_push_no_revision_out(settings: Settings) -> None:
    """Neither those of a misdirected producer, which are told, nor revisions that nothing points at."""
    first = await asyncio.to_thread(publish, settings, 1, None)
    others = [numbered(number) for number in range(2, REVISIONS_KEPT + 3)]
    stray = [(f"stray-{number}".encode(), b"x") for number in range(REVISIONS_KEPT + 1)]
    unpublished = [(each.id.encode(), zstandard.compress(canonical(each.documents))) for each in others]
    await asyncio.to_thread(write, settings, *stray, *unpublished)
    before = refusals("stray")
    async with following(settings) as follower:
        assert follower.current is not None
        assert follower.current.id == first.id
    assert refusals("stray") == before + len(stray)
    head = await asyncio.to_thread(read_head, settings)
    assert head.published is not None
    assert head.published.revision.id == first.id


async def test_a_topic_without_a_sound_revision_is_not_blank(settings: Settings) -> None:
    """It is usable from the first sound one on; one on which nothing was published is so at once."""
    async with following(settings) as follower:
        await asyncio.wait_for(follower.usable(), BOUND_S)
        assert follower.blank
    await asyncio.to_thread(write, settings, *unsound())
    async with following(settings) as follower:
        assert (follower.current, follower.blank, follower.healthy) == (None, False, False)
        usable = asyncio.create_task(follower.usable())
        await asyncio.sleep(1)
        assert not usable.done()
        head = await asyncio.to_thread(read_head, settings)
        await asyncio.to_thread(publish, settings, 1, head.id)
        await asyncio.wait_for(usable, BOUND_S)
        assert follower.current is not None


async def test_a_use_that_nobody_approved_is_an_alarm(settings: Settings) -> None:
    """The revision is gone over to, its uses of such versions are counted, and the next one's are none."""

    def unapproved() -> float | None:
        return REGISTRY.get_sample_value("broker_registry_unapproved")

    first = await asyncio.to_thread(publish, settings, 1, None)
    async with following(settings) as follower:
        assert unapproved() == 0
        documents = changed(sound(), "credit-pd-1", "spec.governance", ...)
        content = canonical(revision(documents).documents)
        records = unsound(content)
        await asyncio.to_thread(write, settings, *records)
        await until(lambda: follower.current is not None and follower.current.id != first.id, "the switch")
        assert unapproved() == 1
        await asyncio.to_thread(publish, settings, 2, revision_id(content))
        await until(lambda: unapproved() == 0, "the next one")


def test_what_was_published_is_told_newest_first(settings: Settings) -> None:
    """When, what it replaced, how many documents, why; a revision that came back stands in both places."""
    assert read_history(settings).publications == ()
    first = publish(settings, 1, None, "the first")
    second = publish(settings, 2, first.id, "  two\nlines " + "x" * MESSAGE_LENGTH_MAX)
    publish(settings, 1, second.id)
    told = read_history(settings).publications
    assert [(each.revision, each.previous, each.current) for each in told] == [
        (first.id, second.id, True),
        (second.id, first.id, False),
        (first.id, None, False),
    ]
    assert [each.documents for each in told] == [5, 5, 5]
    assert told[0].message is None
    assert told[1].message is not None
    assert (told[1].message[:11], len(told[1].message)) == ("two lines x", MESSAGE_LENGTH_MAX)
    assert told[2].message == "the first"
    moments = [each.published_at for each in told]
    assert moments == sorted(moments, reverse=True)


def test_history_is_told_in_the_order_of_the_log(settings: Settings) -> None:
    """Whatever the clocks of those who published said; also where a revision carries its earlier publications."""
    one, two = numbered(1), numbered(2)
    for number, (each, before) in enumerate([(one, None), (two, one), (one, two), (two, one)]):
        expected = before.id if before is not None else None
        publish_revision(settings, each, expected=expected, now_ms=1_000 - number, message=f"number {number}")
    told = read_history(settings).publications
    assert [each.message for each in told] == ["number 3", "number 2", "number 1", "number 0"]
    assert [each.current for each in told] == [True, False, False, False]


def test_records_that_tell_nothing_are_told_by_their_time(settings: Settings) -> None:
    """Headers that are missing, unreadable, or of another revision are passed over."""
    first = publish(settings, 1, None)
    before_ms = time.time_ns() // 1_000_000
    headers = [(PUBLICATION_HEADER, b"{"), (PUBLICATION_HEADER, pointer_to(first.id)), ("other", b"1")]
    write(settings, (ID_A.encode(), b"not zstd"), headers=headers)
    newest, oldest = read_history(settings).publications
    assert newest.refused is not None
    assert "zstd" in newest.refused
    assert newest == Publication(ID_A, newest.published_at, None, None, None, refused=newest.refused)
    assert newest.published_at >= before_ms - 1_000
    assert (oldest.revision, oldest.current, oldest.refused) == (first.id, True, None)


def test_the_history_of_one_revision_is_bounded(settings: Settings) -> None:
    """A revision that two sides publish in turn, again and again, keeps a record that Kafka takes."""
    one, other = numbered(1), numbered(2)
    publications = [(PUBLICATION_HEADER, Pointer(one.id, None, at, 5).as_bytes()) for at in range(PUBLICATIONS_KEPT)]
    write(settings, (one.id.encode(), zstandard.compress(canonical(one.documents))), headers=publications)
    publish(settings, 2, None)
    publish_revision(settings, one, expected=other.id, now_ms=time.time_ns() // 1_000_000)
    told = [each for each in read_history(settings).publications if each.revision == one.id]
    assert len(told) == PUBLICATIONS_KEPT
    assert (told[0].current, told[-1].published_at) == (True, 1)
    assert [each.published_at for each in told] == sorted((each.published_at for each in told), reverse=True)


def test_any_revision_is_found_by_the_beginning_of_its_id(settings: Settings) -> None:
    """However many came after it; what is ambiguous, unknown or no id is said to be."""
    first = publish(settings, 1, None)
    revisions = [numbered(number) for number in range(2, REVISIONS_KEPT + 3)]
    write(settings, *((each.id.encode(), zstandard.compress(canonical(each.documents))) for each in revisions))
    for beginning in (first.id, first.id[:19], first.id.removeprefix("sha256:")[:12]):
        found = find_revision(settings, beginning)
        assert found.revision.id == first.id
        assert found.head.id == first.id
    write(settings, (f"{first.id[:20]}beef".ljust(len(first.id), "0").encode(), b"not zstd"))
    with pytest.raises(ConfigurationError, match="2 revisions begin so"):
        find_revision(settings, first.id[:19])
    with pytest.raises(ConfigurationError, match="model-broker history"):
        find_revision(settings, "0" * 12)
    for wrong in ("sha", "abc", "latest", "sha256:"):
        with pytest.raises(ConfigurationError, match="4 hexadecimal digits"):
            find_revision(settings, wrong)


def test_workers_go_by_the_last_good_revision_and_so_does_a_publisher(settings: Settings) -> None:
    """Where the head is refused, what is carried over comes from the one that workers still decide by."""
    assert read_head(settings).last_good is None
    first = publish(settings, 1, None)
    write(settings, *unsound())
    head = read_head(settings)
    assert head.published is None
    assert head.last_good is not None
    assert head.last_good.id == first.id


@pytest.mark.parametrize("records", [[(POINTER_KEY, b"not json")], [(POINTER_KEY, None)], unsound()])
def test_a_refused_end_is_compared_as_it_was_read(
    settings: Settings, records: list[tuple[bytes, bytes | None]]
) -> None:
    """Who saw one pointer that is refused does not publish over another, nor over a good one."""
    publish(settings, 1, None)
    write(settings, *records)
    seen = read_head(settings)
    write(settings, *records)
    with pytest.raises(RevisionConflict, match="nothing was published"):
        publish_revision(settings, numbered(2), expected=seen, now_ms=1)
    second = numbered(2)
    publish_revision(settings, second, expected=read_head(settings), now_ms=1)
    with pytest.raises(RevisionConflict, match=second.id):
        publish_revision(settings, numbered(3), expected=seen, now_ms=1)
    assert read_head(settings).id == second.id


@pytest.mark.parametrize("records", [[(POINTER_KEY, b"not json")], [(POINTER_KEY, None)], unsound()])
def test_over_a_refused_end_only_what_cannot_wait_is_published(
    settings: Settings, records: list[tuple[bytes, bytes | None]]
) -> None:
    """From the last good revision, by which workers go, and from no other."""
    first = publish(settings, 1, None)
    with pytest.raises(RevisionConflict, match=first.id):
        publish_next(settings, numbered(2), before="sha256:0", now_ms=1, message="a step", over_refused=True)
    write(settings, *records)
    for before, over_refused in ((first.id, False), ("sha256:0", True)):
        with pytest.raises(HeadRefused):
            publish_next(settings, numbered(2), before=before, now_ms=1, message="a step", over_refused=over_refused)
    second = numbered(2)
    publish_next(settings, second, before=first.id, now_ms=1, message="taken back", over_refused=True)
    assert read_head(settings).id == second.id
    third = numbered(3)
    publish_next(settings, third, before=second.id, now_ms=1, message="a step", over_refused=False)
    assert read_head(settings).id == third.id


def test_the_history_says_that_the_pointer_was_deleted(settings: Settings) -> None:
    """And marks the one by which workers go."""
    first = publish(settings, 1, None)
    write(settings, (POINTER_KEY, None))
    told = read_history(settings)
    assert [(each.revision, each.current) for each in told.publications] == [(first.id, True)]
    (fault,) = told.faults
    assert fault.message == POINTER_DELETED


def test_a_deleted_pointer_is_said_to_be(settings: Settings) -> None:
    """It is not as if nothing had been published: commands say what happened, and that publishing again mends it."""
    assert not read_head(settings).deleted
    first = publish(settings, 1, None)
    write(settings, (POINTER_KEY, None))
    head = read_head(settings)
    assert (head.deleted, head.id, head.published) == (True, None, None)
    assert head.last_good is not None
    assert head.last_good.id == first.id
    with pytest.raises(ConfigurationError, match="was deleted; workers keep the last good one; publish again"):
        read_published(settings)
    publish(settings, 1, head.id)
    assert read_published(settings) is not None


def test_a_head_that_is_refused_is_said_to_be(settings: Settings) -> None:
    """Commands that need the current revision name its faults."""
    write(settings, (POINTER_KEY, pointer_to("sha256:a")))
    with pytest.raises(DocumentsRefused, match="sha256:a"):
        read_published(settings)
    write(settings, (POINTER_KEY, b"garbage"))
    with pytest.raises(DocumentsRefused, match=r"cannot be read; workers keep .* publish again .* \(not JSON"):
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
    with pytest.raises(ConfigurationError, match="BROKER_KAFKA_BOOTSTRAP"):
        read_head(nowhere, timeout_s=2.0)
