"""What features cost a worker: fetches against one raw ``HMGET``, and the materializer against a bare pipeline.

A fetch is what a decide worker does for a request, through the near cache: cold (views without ``cache``) and cached.
Beside it redis-py's asyncio client with hiredis asks the same server for the same fields. The three take turns of a few
calls, and a round's figure is the ratio of its medians, of the shape where it is worst.

The materializer is all of a batch, from JSON as it lies in Kafka to the acknowledged rows: decoded, checked against its
view, encoded, and written only where it is later. The bare writer does none of this: its rows are encoded before the
clock runs, and it sends the same hashes, ``HSET`` after ``HSET`` in redis-py's pipeline without a transaction, a batch
at a time. It takes its turns between the materializer's, batch by batch. The collector is set as a worker sets it.
"""

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

import orjson
import structlog
import uvloop
from redis.asyncio import Redis

from app.adapters.clock import SystemClock
from app.adapters.feast_codec import encode_time, encode_value, feature_field, row_key, time_field
from app.adapters.near_cache import CachedFeatureStore
from app.adapters.redis_feast import RedisFeatureStore
from app.agents.features import FeatureUpdates
from app.domain.document_parts import ValueType
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureStatus, ViewNeed
from app.domain.requests import InboundRecord
from app.domain.view_documents import FeatureViewSpec

ROUNDS: Final = 9
CALLS: Final = 300
BLOCK: Final = 20
"""Calls of a kind before the next kind's: few, so that the machine is the same to all; some, as in a busy worker."""
ENTITIES: Final = 100
BATCH: Final = 500
BATCHES: Final = 6
TIMEOUT_MS: Final = 5_000
SHAPES: Final = ((1, 1), (10, 1), (50, 1), (10, 5), (50, 5))
"""Features in all, and views that they come from."""
PROJECT: Final = "bench_features"
EVENT_TIME_MS: Final = 1_700_000_000_000


_Named = TypeVar("_Named", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one call: the median time and the process's CPU on average, in microseconds."""

    p50_us: float
    cpu_us: float


def view_name(features: int, views: int, number: int) -> str:
    return f"customer{features}_{number}_of{views}"


def view_of(features: int, cache: bool, project: str = PROJECT) -> FeatureViewSpec:
    document: dict[str, Any] = {
        "entities": [{"name": "customer_id", "type": "INT64"}],
        "features": [{"name": f"f{number}", "type": "DOUBLE"} for number in range(features)],
        "source": {"type": "redis", "project": project},
    }
    return FeatureViewSpec.model_validate_json(orjson.dumps(document | ({"cache": {"ttl": "1h"}} if cache else {})))


def key_of(customer: int, features: int = 0, views: int = 0) -> EntityKey:
    """A row of its own for each shape, for Redis takes longer to find a field in a longer row."""
    return EntityKey(f"{PROJECT}_{features}_{views}", ("customer_id",), (customer,), ("INT64",))


def needs_of(features: int, views: int, customer: int) -> list[ViewNeed]:
    names = tuple(f"f{number}" for number in range(features // views))
    types = cast(tuple[ValueType, ...], ("DOUBLE",) * len(names))
    key = key_of(customer, features, views)
    return [ViewNeed(view_name(features, views, number), key, names, types) for number in range(views)]


async def in_turns(calls: Mapping[_Named, Callable[[int], Awaitable[object]]]) -> dict[_Named, Cost]:
    """One call after the other, a few of each in turn."""
    took: dict[_Named, list[int]] = {name: [] for name in calls}
    cpu: dict[_Named, int] = dict.fromkeys(calls, 0)
    for block in range(CALLS // BLOCK):
        for name, call in calls.items():
            cpu_before = time.process_time_ns()
            for number in range(BLOCK):
                started = time.perf_counter_ns()
                await call((block * BLOCK + number) % ENTITIES)
                took[name].append(time.perf_counter_ns() - started)
            cpu[name] += time.process_time_ns() - cpu_before
    return {name: Cost(statistics.median(took[name]) / 1_000, cpu[name] / 1_000 / CALLS) for name in calls}


def cached_store(url: str, *, cache: bool) -> CachedFeatureStore:
    """A worker's store; without ``cache`` no view of its registry has one."""
    views = {
        view_name(features, count, number): view_of(features // count, cache)
        for features, count in SHAPES
        for number in range(count)
    }
    return CachedFeatureStore(
        RedisFeatureStore(url),
        views=lambda: views,
        clock=SystemClock(),
        entries_max=100_000,
        bytes_max=64 * 1024 * 1024,
        fetch_timeout_ms=TIMEOUT_MS,
    )


async def fetches(url: str) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Ratios by figure, a round each; and each shape's costs, medians over the rounds."""
    cold, cached, raw = cached_store(url, cache=False), cached_store(url, cache=True), Redis.from_url(url)
    ratios: dict[str, list[float]] = {"features_cold": [], "features_cached": [], "features_five_views": []}
    costs: dict[tuple[str, int, int], list[Cost]] = {}
    try:
        await write_rows(url)
        for number in range(ROUNDS + 1):
            calls: dict[tuple[str, int, int], Callable[[int], Awaitable[object]]] = {}
            for features, views in SHAPES:
                needs = [needs_of(features, views, customer) for customer in range(ENTITIES)]
                keys = [row_key(key_of(customer, features, views)) for customer in range(ENTITIES)]
                fields = [
                    field
                    for need in needs[0]
                    for field in (*(feature_field(need.view, name) for name in need.features), time_field(need.view),
                                  b"_at:" + need.view.encode())
                ]  # fmt: skip

                async def plain(customer: int, keys: list[bytes] = keys, fields: list[bytes] = fields) -> object:
                    return await raw.hmget(keys[customer], fields)

                async def fetch(customer: int, needs: list[list[ViewNeed]] = needs) -> object:
                    return await cold.fetch(needs[customer], TIMEOUT_MS)

                async def fetch_cached(customer: int, needs: list[list[ViewNeed]] = needs) -> object:
                    return await cached.fetch(needs[customer], TIMEOUT_MS)

                if not number:
                    for each in needs:
                        await check(cached, each)
                for name, call in (("raw", plain), ("cold", fetch), ("cached", fetch_cached)):
                    calls[name, features, views] = call
            found = await in_turns(calls)
            if number:  # the first round warms up
                for shape, cost in found.items():
                    costs.setdefault(shape, []).append(cost)
                for name in ("cold", "cached"):
                    worst = max(found[name, *shape].p50_us / found["raw", *shape].p50_us for shape in SHAPES)
                    ratios[f"features_{name}"].append(worst)
                ratios["features_five_views"].append(
                    max(found["cold", count, 5].p50_us / found["cold", count, 1].p50_us for count in (10, 50))
                )
    finally:
        await cold.close()
        await cached.close()
        await raw.aclose()
    return ratios, {
        f"{name}, {features} features, {views} {'view' if views == 1 else 'views'}": {
            "p50_us": statistics.median(cost.p50_us for cost in each),
            "cpu_us": statistics.median(cost.cpu_us for cost in each),
        }
        for (name, features, views), each in costs.items()
    }


async def check(store: CachedFeatureStore, needs: list[ViewNeed]) -> None:
    """What is measured is the right values."""
    found = await store.fetch(needs, TIMEOUT_MS)
    assert all(value.status is FeatureStatus.PRESENT for value in found.values())
    assert len(found) == sum(len(need.features) for need in needs)


async def write_rows(url: str) -> None:
    """All customers' rows."""
    store = RedisFeatureStore(url)
    for features, views in SHAPES:
        for customer in range(ENTITIES):
            await store.write(
                [
                    FeatureRow(
                        need.view,
                        need.key,
                        need.features,
                        tuple(customer + index + 0.5 for index in range(len(need.features))),
                        need.types,
                        EVENT_TIME_MS,
                    )
                    for need in needs_of(features, views, customer)
                ]
            )
    await store.close()


class NoLetters:
    """The dead-letter side of a materializer that refuses nothing."""

    async def publish(self, *_: object, **__: object) -> None:
        raise AssertionError("an update was refused")

    publish_all = publish


async def materializing(url: str) -> tuple[list[float], dict[str, float]]:
    """Ratios of rows a second, materializer to bare writer, a round each; and both, medians over the rounds."""
    names = [f"f{number}" for number in range(10)]
    views = {"materialized": view_of(10, cache=False, project=f"{PROJECT}_0_0")}
    store, raw = RedisFeatureStore(url), Redis.from_url(url)
    updates = FeatureUpdates(
        writer=store, publisher=cast(Any, NoLetters()), views=lambda: views, group="bench", clock=SystemClock()
    )
    moment = EVENT_TIME_MS
    ours: list[float] = []
    bare: list[float] = []
    try:
        for number in range(ROUNDS + 1):
            batches, mappings = [], []
            for _ in range(BATCHES):
                moment += 1_000
                records, rows = [], []
                for customer in range(BATCH):
                    values = {name: customer + index + 0.25 for index, name in enumerate(names)}
                    body = {
                        "project": PROJECT + "_0_0", "view": "materialized", "entities": {"customer_id": customer},
                        "values": values, "event_time": moment,
                    }  # fmt: skip
                    value = orjson.dumps(body)
                    records.append(InboundRecord("features.updates", 0, customer, moment, b"k", value, ()))
                    mapping: dict[bytes, bytes] = {
                        feature_field("materialized", name): encode_value(each, "DOUBLE")
                        for name, each in values.items()
                    }
                    mapping[time_field("materialized")] = encode_time(moment)
                    rows.append((row_key(key_of(customer)), mapping))
                batches.append(records)
                mappings.append(rows)
            gc.collect()
            ours_s = bare_s = 0.0
            for records, rows in zip(batches, mappings, strict=True):
                started = time.perf_counter()
                await updates.handle(0, records)
                handled = time.perf_counter()
                async with raw.pipeline(transaction=False) as pipe:
                    for key, mapping in rows:
                        pipe.hset(key, mapping=cast(Any, mapping))
                    await pipe.execute()
                ours_s, bare_s = ours_s + handled - started, bare_s + time.perf_counter() - handled
            if number:
                ours.append(BATCH * BATCHES / ours_s)
                bare.append(BATCH * BATCHES / bare_s)
    finally:
        await store.close()
        await raw.aclose()
    return (
        [mine / theirs for mine, theirs in zip(ours, bare, strict=True)],
        {"materializer_rows_per_s": statistics.median(ours), "bare_rows_per_s": statistics.median(bare)},
    )


def feature_figures(url: str) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Each figure with its median and spread, and what they were made of."""

    async def measure() -> tuple[dict[str, list[float]], dict[str, Any]]:
        ratios, costs = await fetches(url)
        ratios["materializer"], rates = await materializing(url)
        return ratios, {"fetches": costs, **rates}

    thresholds = gc.get_threshold()
    # As a worker logs, to nowhere.
    structlog.configure(
        processors=[structlog.processors.JSONRenderer()], logger_factory=structlog.ReturnLoggerFactory()
    )
    try:
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 50, 50)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            ratios, details = runner.run(measure())
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        structlog.reset_defaults()
    figures = {
        name: {"value": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in ratios.items()
    }
    return figures, details
