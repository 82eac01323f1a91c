"""Feature servers as sources: Feast's format as its own server speaks it, faults, and what is kept in Redis."""

import asyncio
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis as redis_client
from aiohttp import web
from prometheus_client import REGISTRY

from app.adapters.clock import SystemClock
from app.adapters.feast_codec import row_key
from app.adapters.feature_sources import FeatureSources, rows_of
from app.adapters.http_feast import FeastServers, read_answer, request_body
from app.adapters.redis_feast import RedisFeatureStore
from app.domain.document_parts import ValueType
from app.domain.errors import RowsRefused, ServerFailed, StoreUnavailable
from app.domain.feature_updates import FeatureRow
from app.domain.features import UNAVAILABLE, EntityKey, FeatureStatus, Fetched, FetchedFeatures, ViewNeed, is_away
from app.domain.view_documents import HttpSource
from tests.support.feature_server import (
    DATA,
    EXCHANGES,
    NO_FEAST,
    FeatureServer,
    feast_python,
    feast_server,
    feature_server,
)
from tests.support.memory_feature_store import MemoryFeatureStore

PRESENT, NULL, MISSING, ERROR = FeatureStatus.PRESENT, FeatureStatus.NULL, FeatureStatus.MISSING, FeatureStatus.ERROR
TYPES: Mapping[str, ValueType] = EXCHANGES["types"]
RECORDED_MS = 1_795_395_723_000
"""The event time of the recorded answers."""
TIME_MS = time.time_ns() // 10**9 * 1_000 + 250
"""Of now, for Redis forgets by its own clock; with milliseconds, which answers have."""
HOUR_MS = 3_600_000
TIMEOUT_MS = 20_000
UNSOUND = "its feature server's answer is not of the format"

needs_feast = pytest.mark.skipif(feast_python() is None, reason=NO_FEAST)


def source(url: str, **changes: Any) -> HttpSource:
    """A server's document."""
    return HttpSource.model_validate({"type": "http", "endpoints": (url,), "timeout": "20s"} | changes)


def need_of(
    where: HttpSource | None,
    *features: str,
    key: Any = 17,
    view: str = "applicant",
    project: str = "",
    types: Mapping[str, ValueType] = TYPES,
    max_age_ms: int | None = None,
    ttl_ms: int | None = None,
) -> ViewNeed:
    """Features of one applicant."""
    return ViewNeed(
        view,
        EntityKey(project, ("applicant_id",), (key,), ("INT64",)),
        features,
        tuple(types[name] for name in features),
        where,
        tuple(name for name in types if name not in features) if where is not None else (),
        max_age_ms,
        ttl_ms,
    )


def told(answer: FetchedFeatures) -> dict[str, tuple[FeatureStatus, Any]]:
    """Status and value by feature."""
    return {feature: (found.status, found.value) for (_, feature), found in answer.items()}


def expected() -> dict[str, tuple[FeatureStatus, Any]]:
    """What the exchanges' server has of applicant 17."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in EXCHANGES["values"].items()}
    return {name: (NULL if value is None else PRESENT, value) for name, value in values.items()}


# --- the format, as the real server speaks it -------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", EXCHANGES["exchanges"], ids=range(len(EXCHANGES["exchanges"])))
def test_what_feasts_server_answers_is_read(exchange: dict[str, Any]) -> None:
    """Each recorded request is the one that is sent here, and each recorded answer is read as what Feast was given."""
    (key,) = exchange["request"]["entities"].get("applicant_id", [None])
    features = tuple(feature.partition(":")[2] for feature in exchange["request"]["features"])
    where = source("http://127.0.0.1:1")
    if exchange["status"] != 200:
        with pytest.raises(ValueError, match=r"Error"):
            read_answer(orjson.dumps(exchange["response"]), need_of(where, "text"), where)
        return
    need = need_of(where, *features, key=key)
    assert orjson.loads(request_body(need, where)) == exchange["request"]
    answer = read_answer(orjson.dumps(exchange["response"]), need, where)
    if key == 17:
        assert told(answer) == expected()
        assert {found.event_time_ms for found in answer.values()} == {RECORDED_MS}
    elif key == 18:
        assert told(answer) == {"text": (PRESENT, "ż"), "nothing": (NULL, None)}
        assert answer["applicant", "text"].event_time_ms == 1_735_689_600_000
    else:
        assert set(told(answer).values()) == {(MISSING, None)}
    assert {found.source for found in answer.values()} == {"http"}


def test_statuses_of_other_servers_are_read() -> None:
    """A list a level deeper, statuses that Feast's Python server does not send, and values that are of no such type."""
    where = source("http://127.0.0.1:1", view="theirs")
    columns: list[tuple[Any, str]] = [(1, "OUTSIDE_MAX_AGE"), (None, "OUTSIDE_MAX_AGE"), ("x", "PRESENT"), (1, "ODD")]
    body = {
        "metadata": {"feature_names": {"val": [f"theirs__f{number}" for number in range(4)]}},
        "results": [
            {"values": [value], "statuses": [status], "event_timestamps": ["2026-11-23T01:02:03.250Z"]}
            for value, status in columns
        ],
    }
    types: dict[str, ValueType] = {f"f{number}": "INT64" for number in range(4)}
    answer = read_answer(orjson.dumps(body), need_of(where, *types, types=types), where)
    assert told(answer) == {
        "f0": (FeatureStatus.STALE, 1),
        "f1": (MISSING, None),
        "f2": (ERROR, None),
        "f3": (ERROR, None),
    }
    assert [bool(found.reason) for found in answer.values()] == [True, False, True, True]


@needs_feast
async def test_the_real_server_answers_as_recorded() -> None:
    """Feast's own server, in its own process: present, null, and an entity that it does not know."""
    async with feast_server(str(feast_python())) as url:
        servers = FeastServers()
        where = source(url)
        assert told(await servers.ask(need_of(where, *TYPES), where, TIMEOUT_MS)) == expected()
        stranger = need_of(where, "text", "large", key=99)
        assert set(told(await servers.ask(stranger, where, TIMEOUT_MS)).values()) == {(MISSING, None)}
        with pytest.raises(StoreUnavailable, match="404"):
            await servers.ask(need_of(where, "text", view="other"), where, TIMEOUT_MS)
        await servers.close()


@needs_feast
def test_the_real_sdk_still_writes_the_golden_rows(redis_url: str, tmp_path: Path) -> None:
    """What the SDK that is installed stores is byte for byte what the codec is held against."""
    target = tmp_path / "rows.json"
    address = redis_url.partition("://")[2].partition("/")[0]
    script = [str(feast_python()), str(DATA / "make_feast_rows.py"), address, str(target)]
    subprocess.run(script, check=True, timeout=120)
    golden = orjson.loads((DATA / "feast_rows.json").read_bytes())
    assert orjson.loads(target.read_bytes())["rows"] == golden["rows"]


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def server() -> AsyncIterator[FeatureServer]:
    """A server in Feast's format."""
    async with feature_server() as made:
        yield made


@pytest.fixture
async def servers() -> AsyncIterator[FeastServers]:
    """The client under test."""
    made = FeastServers(response_bytes_max=2_000)
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("broken", "said", "why"),
    [
        (web.Response(status=500, body=b'"no such\\n feature"'), "answered 500", "answered with HTTP status 500"),
        (web.Response(status=404, body=b"{}"), "answered 404", "answered with HTTP status 404"),
        (web.Response(body=b"<html>"), "answered unsoundly", UNSOUND),
        (web.Response(body=b"{}"), "answered unsoundly: KeyError", UNSOUND),
        (web.Response(body=b"[]"), "answered unsoundly", UNSOUND),
        (web.Response(body=b'{"metadata": {"feature_names": ["a"]}, "results": []}'), "answered unsoundly", UNSOUND),
        (web.Response(body=b'{"metadata": 1, "results": [1]}'), "answered unsoundly", UNSOUND),
        (web.Response(body=b" " * 2_001), "more than 2000 bytes", "answered more than 2000 bytes"),
    ],
)
async def test_unsound_answers_say_nothing_of_any_value(
    server: FeatureServer, servers: FeastServers, broken: web.Response, said: str, why: str
) -> None:
    """Each is ServerFailed, with what was wrong, asked once; its features are unavailable, and say truly why."""
    server.broken = broken
    where = source(server.url)
    with pytest.raises(ServerFailed, match=said) as caught:
        await servers.ask(need_of(where, "text"), where, TIMEOUT_MS)
    assert len(server.asked) == 1
    assert why in caught.value.why
    store = MemoryFeatureStore()
    made = FeatureSources(store, store, servers, FixedClock(TIME_MS))
    [found] = (await made.fetch([need_of(where, "text")], TIMEOUT_MS)).values()
    assert (found.status, is_away(found.reason), why in str(found.reason)) == (ERROR, True, True)


@pytest.mark.parametrize("answered", [[99], ["x"], [None], [True], [17, 99], []])
async def test_an_answer_of_another_entity_is_not_believed(
    server: FeatureServer, servers: FeastServers, answered: list[Any]
) -> None:
    """Its features are unavailable, and nothing of it is kept for the entity that was asked about."""
    server.put("applicant", 1, TIME_MS, text="a")
    sound = orjson.loads(server.table(1, ["applicant:text"]))
    sound["results"][0]["values"] = answered
    server.broken = web.Response(body=orjson.dumps(sound))
    store = MemoryFeatureStore()
    made = FeatureSources(store, store, servers, FixedClock(TIME_MS))
    need = need_of(kept(server.url, "p"), "text", key=1, project="p")
    [found] = (await made.fetch([need], TIMEOUT_MS)).values()
    assert (found.status, found.value, is_away(found.reason)) == (ERROR, None, True)
    if len(answered) == 1:
        assert found.reason == "could not be fetched: its feature server answered for another entity"
    await asyncio.sleep(0.01)
    assert told(await store.fetch([need], TIMEOUT_MS)) == {"text": (MISSING, None)}


@pytest.mark.parametrize(("key", "answered"), [(17, 17), (17, "17"), ("ż", "ż"), (2**62, str(2**62))])
def test_an_entity_is_the_same_as_number_and_as_text(key: Any, answered: Any) -> None:
    """Servers that write the protobuf message as it is have an int64 as text; some do not tell the entity at all."""
    where = source("http://127.0.0.1:1")
    column = {"values": ["a"], "statuses": ["PRESENT"], "event_timestamps": ["2026-11-23T01:02:03Z"]}
    for names, results in (
        (["applicant_id", "applicant__text"], [column | {"values": [answered]}, column]),
        (["applicant__text"], [column]),
    ):
        body = orjson.dumps({"metadata": {"feature_names": names}, "results": results})
        assert told(read_answer(body, need_of(where, "text", key=key), where)) == {"text": (PRESENT, "a")}


@pytest.mark.parametrize(("status", "expected"), [("NOT_FOUND", MISSING), ("NULL_VALUE", NULL)])
def test_a_value_that_its_status_denies_is_none(status: str, expected: FeatureStatus) -> None:
    """What was not found is MISSING, and what is null is NULL, whatever value stands there."""
    where = source("http://127.0.0.1:1")
    column = {"values": ["a"], "statuses": [status], "event_timestamps": ["2026-11-23T01:02:03Z"]}
    body = orjson.dumps({"metadata": {"feature_names": ["applicant__text"]}, "results": [column]})
    assert told(read_answer(body, need_of(where, "text"), where)) == {"text": (expected, None)}


async def test_a_slow_server_is_left_at_its_timeout(server: FeatureServer, servers: FeastServers) -> None:
    """The source's own timeout, or the fetch's where that is nearer."""
    server.delay_s = 5.0
    where = source(server.url, timeout="40ms")
    with pytest.raises(StoreUnavailable, match="within 40 ms"):
        await servers.ask(need_of(where, "text"), where, TIMEOUT_MS)
    with pytest.raises(StoreUnavailable, match="within 7 ms"):
        await servers.ask(need_of(where, "text"), where, 7)


async def test_another_endpoint_is_asked_where_one_is_away(server: FeatureServer, servers: FeastServers) -> None:
    """They are taken in turn; one that refuses connections costs nothing but an attempt."""
    server.put("applicant", 17, TIME_MS, text="a")
    where = source("http://127.0.0.1:9", endpoints=("http://127.0.0.1:9", f"{server.url}/"))
    for _ in range(3):
        answer = await servers.ask(need_of(where, "text"), where, TIMEOUT_MS)
        assert answer == {("applicant", "text"): Fetched(PRESENT, "a", TIME_MS, None, "http")}
    await servers.close()
    with pytest.raises(StoreUnavailable, match="could not be reached"):
        await servers.ask(need_of(where, "text"), where, TIMEOUT_MS)


# --- beside Redis, and kept there -------------------------------------------------------------------------------------


class FixedClock(SystemClock):
    """A clock that stands, but for steady time."""

    def __init__(self, now_ms: int) -> None:
        self.wall_ms = now_ms

    def now_ms(self) -> int:
        """See ``Clock``."""
        return self.wall_ms


@pytest.fixture(params=["memory", "redis"])
async def redis(request: pytest.FixtureRequest) -> AsyncIterator[MemoryFeatureStore | RedisFeatureStore]:
    """What stands for Redis, and Redis."""
    made = (
        MemoryFeatureStore() if request.param == "memory" else RedisFeatureStore(request.getfixturevalue("redis_url"))
    )
    yield made
    await made.close()


@pytest.fixture
async def sources(
    redis: MemoryFeatureStore | RedisFeatureStore, servers: FeastServers
) -> AsyncIterator[FeatureSources]:
    """Both, a second after the rows of these tests were true."""
    made = FeatureSources(redis, redis, servers, FixedClock(TIME_MS + 1_000))
    yield made
    await made.close()


@pytest.fixture
def project() -> str:
    """A project that no other test knows."""
    return f"p{uuid.uuid4().hex}"


def kept(url: str, project: str, **changes: Any) -> HttpSource:
    """A server whose answers are kept for an hour."""
    return source(url, writeBack={"project": project, "maxAge": "1h"}, **changes)


async def until_written(redis: MemoryFeatureStore | RedisFeatureStore, need: ViewNeed) -> FetchedFeatures:
    """What Redis has, once it has all of it."""
    async with asyncio.timeout(20):
        while True:
            found = await redis.fetch([need], TIMEOUT_MS)
            if all(each.status is not MISSING for each in found.values()):
                return found
            await asyncio.sleep(0.005)


async def test_all_sources_are_asked_at_once(
    server: FeatureServer, sources: FeatureSources, redis: MemoryFeatureStore | RedisFeatureStore, project: str
) -> None:
    """One fetch: each feature from its own view's source, and one request a view of a server."""
    key = EntityKey(project, ("applicant_id",), (17,), ("INT64",))
    await redis.write([FeatureRow("bureau", key, ("large",), (5,), ("INT64",), TIME_MS)])
    server.put("applicant", 17, TIME_MS, text="a", wide=0.5)
    server.put("scores", 17, TIME_MS, wide=0.7)
    where = source(server.url)
    needs = [
        need_of(None, "large", view="bureau", project=project),
        need_of(where, "text", "wide"),
        need_of(where, "wide", view="scores"),
    ]
    assert await sources.fetch(needs, TIMEOUT_MS) == {
        ("bureau", "large"): Fetched(PRESENT, 5, TIME_MS, None, "redis"),
        ("applicant", "text"): Fetched(PRESENT, "a", TIME_MS, None, "http"),
        ("applicant", "wide"): Fetched(PRESENT, 0.5, TIME_MS, None, "http"),
        ("scores", "wide"): Fetched(PRESENT, 0.7, TIME_MS, None, "http"),
    }
    assert sorted(server.asked) == [["applicant:text", "applicant:wide"], ["scores:wide"]]
    await sources.ping()


async def test_a_source_that_fails_fails_alone(
    server: FeatureServer, sources: FeatureSources, redis: MemoryFeatureStore | RedisFeatureStore, project: str
) -> None:
    """A server's fault is an ERROR of its own view's features; one of Redis leaves the server's alone."""
    server.broken = web.Response(status=503, body=b"")
    needs = [need_of(None, "large", view="bureau", project=project), need_of(source(server.url), "text")]
    found = await sources.fetch(needs, TIMEOUT_MS)
    assert found["bureau", "large"].status is MISSING
    reason = "could not be fetched: its feature server answered with HTTP status 503"
    assert found["applicant", "text"] == Fetched(ERROR, reason=reason, source="http")
    server.broken = None
    server.put("applicant", 17, TIME_MS, text="a")
    if isinstance(redis, MemoryFeatureStore):
        redis.available = False
        found = await sources.fetch(needs, TIMEOUT_MS)
        assert found["bureau", "large"] == Fetched(ERROR, reason=UNAVAILABLE)
        assert found["applicant", "text"].value == "a"
        with pytest.raises(StoreUnavailable):
            await sources.fetch(needs[:1], TIMEOUT_MS)


async def test_what_a_server_says_is_kept(
    server: FeatureServer, sources: FeatureSources, redis: MemoryFeatureStore | RedisFeatureStore, project: str
) -> None:
    """Asked once, in Redis from then on, with types and event times, whoever wrote it; nulls are kept as well."""
    server.put("applicant", 17, TIME_MS, text="ż", wide=0.5, wides=[0.5, 1.5], nothing=None)
    server.put("applicant", 17, TIME_MS - 5_000, large=2**62)
    need = need_of(kept(server.url, project), "text", "wide", "wides", "nothing", "large", project=project)
    first = await sources.fetch([need], TIMEOUT_MS)
    assert {found.source for found in first.values()} == {"http"}
    stored = await until_written(redis, need)
    assert told(stored) == told(first)
    assert [found.event_time_ms for found in stored.values()] == [TIME_MS] * 4 + [TIME_MS - 5_000]
    again = await sources.fetch([need], TIMEOUT_MS)
    assert again == stored
    assert {found.source for found in again.values()} == {"redis"}
    assert len(server.asked) == 1


@pytest.mark.parametrize(("age_ms", "max_age_ms"), [(2 * HOUR_MS, None), (HOUR_MS // 2, 60_000)])
async def test_the_server_is_asked_for_what_is_old_or_not_there(
    server: FeatureServer,
    sources: FeatureSources,
    redis: MemoryFeatureStore | RedisFeatureStore,
    project: str,
    age_ms: int,
    max_age_ms: int | None,
) -> None:
    """Only for that: by the document's maxAge, or the strictest contract's. Where it fails, what is old is given."""
    where = kept(server.url, project)
    need = need_of(where, "text", "wide", "large", project=project, max_age_ms=max_age_ms)
    old_ms = TIME_MS - age_ms
    rows = [
        FeatureRow("applicant", need.key, ("wide",), (0.1,), ("DOUBLE",), old_ms, ("text",)),
        FeatureRow("applicant", need.key, ("text",), ("fresh",), ("STRING",), TIME_MS, ("wide",)),
    ]
    assert await redis.write(rows) == 2
    server.broken = web.Response(status=500, body=b"")
    found = await sources.fetch([need], TIMEOUT_MS)
    assert told(found) == {"text": (PRESENT, "fresh"), "wide": (PRESENT, 0.1), "large": (ERROR, None)}
    assert found["applicant", "wide"].event_time_ms == old_ms
    server.broken = None
    server.put("applicant", 17, TIME_MS + 1, wide=0.9, large=3)
    found = await sources.fetch([need], TIMEOUT_MS)
    assert told(found) == {"text": (PRESENT, "fresh"), "wide": (PRESENT, 0.9), "large": (PRESENT, 3)}
    assert server.asked[-1] == ["applicant:wide", "applicant:large"]
    stored = await until_written(redis, need)
    assert stored["applicant", "text"].event_time_ms == TIME_MS


async def test_what_cannot_be_kept_is_not(redis: MemoryFeatureStore | RedisFeatureStore, servers: FeastServers) -> None:
    """Without an event time, or with one that has not come: nobody could tell its age. Nor errors, nor absences."""
    where = kept("http://127.0.0.1:9", "p")
    need = need_of(where, "text", "wide", "large", "flag", "small")
    answer = {
        ("applicant", "text"): Fetched(PRESENT, "a", None),
        ("applicant", "wide"): Fetched(PRESENT, 0.5, TIME_MS + 10**9),
        ("applicant", "large"): Fetched(ERROR, None, TIME_MS, "?"),
        ("applicant", "flag"): Fetched(MISSING),
        ("applicant", "small"): Fetched(PRESENT, 1, TIME_MS),
    }
    assert where.write_back is not None
    (row,) = rows_of(need, where.write_back, answer, TIME_MS)
    assert (row.names, row.values, row.event_time_ms) == (("small",), (1,), TIME_MS)
    assert set(row.kept) == TYPES.keys() - {"small"}


async def test_what_is_kept_expires(server: FeatureServer, servers: FeastServers, redis_url: str, project: str) -> None:
    """By its view's ttl, or a week past maxAge from when it is written, however old it is by then; a view that shares
    the row keeps its own end, or keeps the row for good."""
    store, week_ms = RedisFeatureStore(redis_url), 7 * 24 * HOUR_MS
    sources = FeatureSources(store, store, servers, FixedClock(TIME_MS))
    where = kept(server.url, project)
    bounded, unbounded, old, shared, for_good = (
        need_of(where, "text", project=project, key=key, ttl_ms=ttl_ms)
        for key, ttl_ms in ((1, 24 * HOUR_MS), (2, None), (3, None), (4, None), (5, None))
    )
    for key in range(1, 6):
        server.put("applicant", key, TIME_MS - (1_000 * HOUR_MS if key == 3 else HOUR_MS), text="a")
    for each, ttl_ms in ((shared, 30 * week_ms), (for_good, None)):
        await store.write([FeatureRow("bureau", each.key, ("x",), (1,), ("INT64",), TIME_MS, ttl_ms=ttl_ms)])
    left: list[int] = []
    with redis_client.Redis.from_url(redis_url) as client:
        for each in (bounded, unbounded, old, shared, for_good):
            await sources.fetch([each], TIMEOUT_MS)
            await until_written(store, each)
            left.append(int(client.pttl(row_key(each.key))))
    expected = (23 * HOUR_MS, HOUR_MS + week_ms, HOUR_MS + week_ms, 30 * week_ms)
    assert [round(given / HOUR_MS) for given in left[:4]] == [each // HOUR_MS for each in expected]
    assert left[4] == -1
    await sources.close()


async def test_writing_back_survives_failures(server: FeatureServer, servers: FeastServers) -> None:
    """A store that is away, or a value that cannot be kept, costs the rows that it concerns, and no request waits."""

    class Choking(MemoryFeatureStore):
        """A store that was away once, and in which something else stands in the place of applicant 18's row."""

        away = True

        async def write(self, rows: Sequence[FeatureRow]) -> int:
            """See ``FeatureWriter``."""
            await asyncio.sleep(0)
            if self.away:
                self.away = False
                raise StoreUnavailable("away")
            refused = {place: "no row" for place, row in enumerate(rows) if row.key.values == (18,)}
            written = await super().write([row for place, row in enumerate(rows) if place not in refused])
            if refused:
                raise RowsRefused(refused, written)
            return written

    store = Choking()
    sources = FeatureSources(store, store, servers, FixedClock(TIME_MS))
    for key in (17, 18):
        server.put("applicant", key, TIME_MS, narrow=0.5)
    where = kept(server.url, "p")
    sound, unsound = (need_of(where, "narrow", project="p", key=key) for key in (17, 18))
    assert (await sources.fetch([sound], TIMEOUT_MS))["applicant", "narrow"].value == 0.5
    await asyncio.sleep(0.01)
    assert (await sources.fetch([unsound], TIMEOUT_MS))["applicant", "narrow"].value == 0.5
    assert (await sources.fetch([sound], TIMEOUT_MS))["applicant", "narrow"].value == 0.5
    assert (await until_written(store, sound))["applicant", "narrow"].value == 0.5
    assert (await store.fetch([unsound], TIMEOUT_MS))["applicant", "narrow"].status is MISSING
    await sources.close()


async def test_what_is_too_long_to_be_kept_is_used_and_dropped(
    server: FeatureServer, servers: FeastServers, redis_url: str, project: str
) -> None:
    """Its row is not tried again, and others are kept; how many were dropped is counted."""

    def refused() -> float:
        return REGISTRY.get_sample_value("broker_feature_write_backs_total", {"fate": "refused"}) or 0.0

    store, before = RedisFeatureStore(redis_url, value_bytes_max=100), refused()
    sources = FeatureSources(store, store, servers, FixedClock(TIME_MS))
    for key, text in ((17, "a" * 200), (18, "short")):
        server.put("applicant", key, TIME_MS, text=text)
    long, short = (need_of(kept(server.url, project), "text", project=project, key=key) for key in (17, 18))
    assert (await sources.fetch([long], TIMEOUT_MS))["applicant", "text"].value == "a" * 200
    assert (await sources.fetch([short], TIMEOUT_MS))["applicant", "text"].value == "short"
    assert (await until_written(store, short))["applicant", "text"].value == "short"
    assert (await store.fetch([long], TIMEOUT_MS))["applicant", "text"].status is MISSING
    assert refused() == before + 1
    await sources.close()


async def test_what_waits_to_be_written_is_bounded(server: FeatureServer, servers: FeastServers) -> None:
    """While Redis takes its time, rows beyond the bound are shed; requests go on."""

    class Slow(MemoryFeatureStore):
        """A store that takes no row before it is told to."""

        def __init__(self) -> None:
            super().__init__()
            self.open = asyncio.Event()
            self.all = asyncio.Event()
            self.taken = 0

        async def write(self, rows: Sequence[FeatureRow]) -> int:
            """See ``FeatureWriter``."""
            await self.open.wait()
            self.taken += len(rows)
            if self.taken >= 4:
                self.all.set()
            return await super().write(rows)

    store = Slow()
    sources = FeatureSources(store, store, servers, FixedClock(TIME_MS), rows_waiting_max=3)
    needs = [need_of(kept(server.url, "p"), "text", project="p", key=key) for key in range(8)]
    for key, need in enumerate(needs):
        server.put("applicant", key, TIME_MS, text="a")
        await sources.fetch([need], TIMEOUT_MS)
    store.open.set()
    await asyncio.wait_for(store.all.wait(), 20)
    await asyncio.sleep(0.01)
    assert store.taken == 4  # one that was being written, and the three that might wait
    await sources.close()
