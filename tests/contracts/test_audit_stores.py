"""What the audit's stores promise: one suite, on the stores in memory and on S3 and DynamoDB."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from app.adapters.dynamodb import DynamoPointerTable
from app.adapters.s3 import S3ObjectStore
from app.domain.audit import Pointer
from app.domain.errors import StoreUnavailable
from app.ports.record_sink import ObjectStore, PointerTable
from tests.support.memory_audit import MemoryObjectStore, MemoryPointerTable

POINTER = Pointer(
    request_id="r-0",
    sort_key="DECISION",
    execution_id="e-0",
    kind="decision",
    status="completed",
    recorded_ms=1_700_000_000_000,
    source="inference.audit/0/0",
    sha256="ab" * 32,
    bucket="bucket",
    object_key="audit/key",
    object_version=None,
    start=17,
    length=230,
)


def pointer(
    number: int, *, execution_id: str | None = None, sha256: str = POINTER.sha256, sort_key: str = "DECISION"
) -> Pointer:
    return replace(
        POINTER,
        request_id=f"r-{number}",
        execution_id=execution_id or f"e-{number}",
        sha256=sha256,
        sort_key=sort_key,
    )


@pytest.fixture(params=["memory", "real"])
async def objects(request: pytest.FixtureRequest) -> AsyncIterator[ObjectStore]:
    """An object store with an empty bucket."""
    if request.param == "memory":
        yield MemoryObjectStore()
        return
    request.getfixturevalue("aws_env")
    async with S3ObjectStore(request.getfixturevalue("bucket_name")) as store:
        assert await store.ensure_bucket()
        yield store


@pytest.fixture(params=["memory", "transactions", "single-puts"])
async def table(request: pytest.FixtureRequest) -> AsyncIterator[PointerTable]:
    """An empty pointer table."""
    if request.param == "memory":
        yield MemoryPointerTable()
        return
    request.getfixturevalue("aws_env")
    name = request.getfixturevalue("table_name")
    async with DynamoPointerTable(name, transactions=request.param == "transactions") as store:
        assert await store.ensure_table()
        yield store


async def test_an_object_is_written_once(objects: ObjectStore) -> None:
    """The second writer of a key is told so, and changes nothing."""
    first = await objects.put_if_absent("audit/a", b"first", {"end-offset": "5"})
    assert first is not None
    assert await objects.put_if_absent("audit/a", b"second", {"end-offset": "9"}) is None
    assert await objects.read("audit/a") == b"first"
    assert await objects.head("audit/a") == first
    assert first.metadata == {"end-offset": "5"}


async def test_of_writers_at_once_one_wins(objects: ObjectStore) -> None:
    """Eight writers of one key: one is told that it wrote, and its bytes stand."""

    async def write(number: int) -> bool:
        for _ in range(20):
            try:
                return await objects.put_if_absent("audit/a", b"%d" % number, {}) is not None
            except StoreUnavailable:  # S3 may say that a conditional write conflicts with another that is going on
                continue
        raise AssertionError("the store never answered")

    wrote = await asyncio.gather(*(write(number) for number in range(8)))
    assert wrote.count(True) == 1
    assert await objects.read("audit/a") == b"%d" % wrote.index(True)


async def test_ranges_are_exact(objects: ObjectStore) -> None:
    """A range is given whole or refused."""
    stored = await objects.put_if_absent("audit/a", b"0123456789", {})
    assert stored is not None
    assert await objects.read("audit/a", stored.version, 0, 3) == b"012"
    assert await objects.read("audit/a", stored.version, 7, 3) == b"789"
    assert await objects.read("audit/a", None, 4) == b"456789"
    for start, length in ((8, 3), (10, 1), (50, 1)):
        with pytest.raises(LookupError):
            await objects.read("audit/a", None, start, length)


async def test_what_is_not_there_is_not_found(objects: ObjectStore) -> None:
    """A missing object is None to a head and a LookupError to a read."""
    assert await objects.head("audit/none") is None
    with pytest.raises(LookupError):
        await objects.read("audit/none")


async def test_keys_are_listed_sorted(objects: ObjectStore) -> None:
    """Keys under a prefix, in order."""
    for name in ("audit/b", "audit/a", "other/c"):
        await objects.put_if_absent(name, b"x", {})
    assert list(await objects.keys("audit/")) == ["audit/a", "audit/b"]
    await objects.ping()


async def test_a_pointer_is_written_once(table: PointerTable) -> None:
    """What stands is told, whether it is the same or another, and stays."""
    one, other = pointer(1), pointer(1, execution_id="another", sha256="cd" * 32)
    assert await table.put_if_absent([one]) == [None]
    assert await table.put_if_absent([one]) == [one]
    assert await table.put_if_absent([other]) == [one]
    assert await table.get("r-1") == [one]


async def test_many_pointers_some_of_which_stand(table: PointerTable) -> None:
    """Of 250 pointers those that stand are told one by one and the others are written."""
    many = [pointer(number) for number in range(250)]
    standing = {7, 99, 100, 101, 249}
    assert await table.put_if_absent([many[number] for number in sorted(standing)]) == [None] * 5
    answers = await table.put_if_absent(many)
    assert [number for number, answer in enumerate(answers) if answer is not None] == sorted(standing)
    assert dict(await table.decisions([one.request_id for one in many])) == {one.request_id: one for one in many}
    assert {one.request_id async for one in table.all()} == {one.request_id for one in many}


async def test_the_same_key_twice_in_one_call(table: PointerTable) -> None:
    """The first of a call wins; the second is told of it."""
    one, other = pointer(1), pointer(1, execution_id="another", sha256="cd" * 32)
    assert await table.put_if_absent([one, other, one, pointer(2)]) == [None, one, one, None]


async def test_writers_at_once_agree(table: PointerTable) -> None:
    """Four writers of the same hundred keys: every key has one writer, and the others are told which."""

    async def write(name: str) -> list[Pointer | None]:
        mine = [pointer(number, execution_id=name) for number in range(100)]
        for _ in range(50):
            try:
                return list(await table.put_if_absent(mine))
            except StoreUnavailable:  # transactions on the same keys at once cancel each other
                await asyncio.sleep(0.02)
        raise AssertionError("the store never answered")

    told = await asyncio.gather(*(write(f"writer-{number}") for number in range(4)))
    stand = await table.decisions([f"r-{number}" for number in range(100)])
    for number in range(100):
        name = stand[f"r-{number}"].execution_id
        others = [told[writer][number] for writer in range(4) if f"writer-{writer}" != name]
        assert [other.execution_id if other else None for other in others] == [name] * 3


async def test_a_request_has_all_its_pointers(table: PointerTable) -> None:
    """The decision comes first; another request's are not among them; versions come back as they were."""
    decision = replace(pointer(1), object_version="v7")
    conflict, refusal = pointer(1, sort_key="CONFLICT#e-9"), pointer(1, sort_key="REFUSAL#e-8")
    await table.put_if_absent([refusal, conflict, decision, pointer(11)])
    assert await table.get("r-1") == [decision, conflict, refusal]
    assert await table.get("r-none") == []
    assert await table.decisions(["r-none"]) == {}
    assert await table.decisions([]) == {}
    await table.ping()


async def test_slow_transactions_give_way_to_single_puts(
    aws_env: dict[str, str], table_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that does not get through a transaction in time still gets every pointer, then and from then on."""
    async with DynamoPointerTable(table_name) as table:
        await table.ensure_table()
        monkeypatch.setattr("app.adapters.dynamodb.TRANSACTION_TIMEOUT_S", 0.0)
        many = [pointer(number) for number in range(30)]
        # The transaction that was given up may have gone through: then the pointers meet themselves.
        for told, sent in zip(await table.put_if_absent(many[:20]), many, strict=False):
            assert told in (None, sent)
        assert await table.put_if_absent(many) == [*many[:20], *[None] * 10]


async def test_nothing_to_write_is_nothing(table: PointerTable) -> None:
    """An empty call is answered without one."""
    assert await table.put_if_absent([]) == []


async def test_making_the_stores_again_changes_nothing(
    aws_env: dict[str, str], bucket_name: str, table_name: str
) -> None:
    """Bucket and table are created once; a second time says so."""
    async with S3ObjectStore(bucket_name) as objects, DynamoPointerTable(table_name) as table:
        assert [await objects.ensure_bucket(), await objects.ensure_bucket()] == [True, False]
        assert [await table.ensure_table(), await table.ensure_table()] == [True, False]


async def test_a_store_that_is_away_says_so(aws_env: dict[str, str], bucket_name: str, table_name: str) -> None:
    """No bucket, no table, no server: each is StoreUnavailable with the name in it, never a driver's exception."""
    async with S3ObjectStore(bucket_name) as objects, DynamoPointerTable(table_name) as table:
        with pytest.raises(StoreUnavailable, match=bucket_name):
            await objects.ping()
        with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
            await objects.put_if_absent("audit/a", b"x", {})
        with pytest.raises(StoreUnavailable, match=table_name):
            await table.ping()
        with pytest.raises(StoreUnavailable, match="ResourceNotFound"):
            await table.put_if_absent([POINTER])


async def test_a_dead_address_is_told_within_its_bound(
    aws_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens: the call ends soon, as StoreUnavailable."""
    async with AsyncExitStack() as resources:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_ENDPOINT_URL_DYNAMODB", "http://127.0.0.1:9")
        objects = await resources.enter_async_context(S3ObjectStore("bucket"))
        table = await resources.enter_async_context(DynamoPointerTable("table"))
        async with asyncio.timeout(20):
            with pytest.raises(StoreUnavailable, match="does not answer"):
                await objects.put_if_absent("audit/a", b"x", {})
            with pytest.raises(StoreUnavailable, match="does not answer"):
                await table.put_if_absent([POINTER])
