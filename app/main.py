"""The composition root: settings in, a wired process out. The only module that knows every part.

Each process imports its own parts and no others', inside its function: a worker that starts in a second is back in a
second.
"""

import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

from app.adapters.clock import SystemClock
from app.domain.errors import ConfigurationError, StoreUnavailable
from app.settings import Settings

if TYPE_CHECKING:
    from app.adapters.kafka import KafkaPublisher
    from app.adapters.record_codec import EntryHeader
    from app.adapters.registry_topic import RegistryFollower
    from app.domain.on_demand import FeatureFunction
    from app.domain.view_documents import FeatureViewSpec


async def run_decide(settings: Settings, *, instance: str, http_port: int) -> int:
    """A decide worker: requests and results agents over one joins table."""
    from app.adapters.faust_app import create_app
    from app.adapters.faust_table import DurableTable
    from app.adapters.feature_functions import load_functions
    from app.adapters.feature_sources import FeatureSources
    from app.adapters.http_feast import FeastServers
    from app.adapters.http_oip import HttpOipBackend
    from app.adapters.kafka import KafkaPublisher
    from app.adapters.near_cache import CachedFeatureStore
    from app.adapters.record_codec import entry_yields, read_entry_header
    from app.adapters.redis_feast import RedisFeatureStore
    from app.adapters.registry_topic import RegistryFollower
    from app.adapters.request_codec import RequestDecoder
    from app.adapters.row_sharing import RowSharing
    from app.adapters.topics import JOINS_CHANGELOG, check_copartitioned
    from app.adapters.update_follower import UpdateFollower
    from app.agents import requests, results, skew
    from app.agents.admission import Admission
    from app.agents.decider import Decider
    from app.agents.ledger import Ledger
    from app.agents.shadows import Shadows
    from app.agents.tasks import Tasks
    from app.agents.timers import Timers
    from app.agents.worker import Worker
    from app.domain.breaker import BreakerPolicy

    check_copartitioned(settings)
    functions = load_functions()
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(KafkaPublisher(settings, client_id=instance))
        guard = skew.SkewGuard(clock=clock, settings=settings)
        skew.export(guard)
        registry = RegistryFollower(settings, on_switch=[guard.on_revision])
        await registry.start()
        stack.push_async_callback(registry.stop)
        redis = RedisFeatureStore(
            settings.redis_url,
            value_bytes_max=settings.feature_value_bytes_max,
            breaker=BreakerPolicy(failures=settings.feature_breaker_failures, open_ms=settings.feature_breaker_open),
        )
        store = CachedFeatureStore(
            FeatureSources(redis, redis, FeastServers(), clock),
            views=lambda: registry.current.views if registry.current else None,
            clock=clock,
            entries_max=settings.feature_cache_entries,
            bytes_max=settings.feature_cache_bytes,
            fetch_timeout_ms=settings.feature_timeout,
        )
        stack.push_async_callback(store.close)
        await store.ping()
        updates = UpdateFollower(
            store,
            bootstrap=settings.kafka_bootstrap,
            topic=settings.topic("features.updates"),
            group=f"{settings.topic_prefix}features",
            client_id=instance,
            views=lambda: registry.current.views if registry.current else None,
            clock=clock,
        )
        backend = RowSharing(HttpOipBackend(clock), clock)
        stack.push_async_callback(backend.close)
        decoder = RequestDecoder(settings.schema_registry_url)
        stack.push_async_callback(decoder.close)
        app = create_app(settings, role="decide", instance=instance)
        group = app.conf.id
        changelog = settings.topic(JOINS_CHANGELOG)
        table = DurableTable(
            app,
            name="joins",
            changelog=changelog,
            publisher=publisher,
            read=lambda _, entry: read_entry_header(entry),
            yields=entry_yields,
        )
        ledger = Ledger(table=table, replies=publisher, settings=settings, clock=clock, group=group)
        timers = Timers(clock)
        decider = Decider(
            admission=Admission(decoder, publisher, settings),
            ledger=ledger,
            registry=registry,
            tasks=Tasks(
                ledger=ledger,
                features=store,
                backend=backend,
                replies=publisher,
                timers=timers,
                clock=clock,
                settings=settings,
                functions=functions,
                skew=guard,
            ),
            shadows=Shadows(
                backend=backend, ledger=ledger, replies=publisher, clock=clock, settings=settings, skew=guard
            ),
            timers=timers,
            clock=clock,
            new_id=lambda: str(uuid.uuid4()),
            settings=settings,
            instance=instance,
            on_crash=app.crash,
        )
        stack.push_async_callback(decider.close)

        def entries(partition: int) -> "list[tuple[str, EntryHeader]]":
            return [(request_id, read_entry_header(entry)) for request_id, entry in table.entries(partition)]

        table.on_ownership(lambda owned, gained: decider.on_ownership(owned, gained, entries))
        intakes = [
            requests.attach(
                app,
                topic=settings.topic("inference.requests"),
                decider=decider,
                in_flight_max=settings.requests_in_flight_max,
            ),
            results.attach(
                app,
                topic=settings.topic("inference.results"),
                decider=decider,
                publisher=publisher,
                group=group,
                in_flight_max=settings.requests_in_flight_max,
            ),
        ]
        worker = Worker(
            app,
            settings=settings,
            role="decide",
            instance=instance,
            http_port=http_port,
            intakes=intakes,
            ready_checks={
                "registry": _registry_ready(registry),
                "features": store.ping,
                "functions": _functions_ready(registry, functions),
            },
            background=[decider.run_timers, updates.run],
            begins_after=registry.usable,
        )
        return await worker.run()


async def run_features(settings: Settings, *, instance: str, http_port: int) -> int:
    """A features worker."""
    from app.adapters.faust_app import create_app
    from app.adapters.faust_table import DurableTable
    from app.adapters.kafka import KafkaPublisher
    from app.adapters.redis_feast import RedisFeatureStore
    from app.adapters.registry_topic import RegistryFollower
    from app.adapters.topics import AGGREGATED, AGGREGATES_CHANGELOG, check_copartitioned
    from app.agents import features
    from app.agents.aggregates import Aggregates, check_entry
    from app.agents.worker import Worker

    check_copartitioned(settings, AGGREGATED)
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(KafkaPublisher(settings, client_id=instance))
        registry = RegistryFollower(settings)
        await registry.start()
        stack.push_async_callback(registry.stop)
        store = RedisFeatureStore(settings.redis_url, value_bytes_max=settings.feature_value_bytes_max)
        stack.push_async_callback(store.close)
        await store.ping()
        await _require_topics(publisher, settings, "features.updates", "features.updates-dlt")
        app = create_app(settings, role="features", instance=instance)

        def views() -> "Mapping[str, FeatureViewSpec] | None":
            return registry.current.views if registry.current else None

        changelog = settings.topic(AGGREGATES_CHANGELOG)
        table = DurableTable(app, name="aggregates", changelog=changelog, publisher=publisher, read=check_entry)
        aggregates = Aggregates(table=table, writer=store, views=views, clock=clock)
        table.on_ownership(aggregates.on_ownership)
        intake = features.attach(
            app,
            topic=settings.topic("features.updates"),
            writer=store,
            publisher=publisher,
            views=views,
            group=app.conf.id,
            clock=clock,
            aggregates=aggregates,
        )
        worker = Worker(
            app,
            settings=settings,
            role="features",
            instance=instance,
            http_port=http_port,
            intakes=[intake],
            ready_checks={"registry": _registry_ready(registry), "features": store.ping},
            background=[aggregates.run],
        )
        return await worker.run()


async def run_audit(settings: Settings, *, instance: str, http_port: int) -> int:
    """An audit worker."""
    from app.adapters.dynamodb import DynamoPointerTable
    from app.adapters.faust_app import create_app
    from app.adapters.kafka import KafkaPublisher
    from app.adapters.s3 import S3ObjectStore
    from app.agents import audit
    from app.agents.worker import Worker

    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(KafkaPublisher(settings, client_id=instance))
        objects = await stack.enter_async_context(S3ObjectStore(settings.audit_bucket))
        pointers = await stack.enter_async_context(DynamoPointerTable(settings.audit_table))
        await objects.ping()
        await pointers.ping()
        await _require_topics(publisher, settings, "inference.audit", "inference.audit-dlt")
        app = create_app(settings, role="audit", instance=instance)
        intake = audit.attach(
            app,
            topic=settings.topic("inference.audit"),
            objects=objects,
            pointers=pointers,
            publisher=publisher,
            settings=settings,
            group=app.conf.id,
        )
        worker = Worker(
            app,
            settings=settings,
            role="audit",
            instance=instance,
            http_port=http_port,
            intakes=[intake],
            ready_checks={"objects": objects.ping, "pointers": pointers.ping},
        )
        return await worker.run()


async def run_rollouts(settings: Settings, *, instance: str, http_port: int) -> int:
    """A rollouts worker: counts what new versions and shadows do, and moves rollouts."""
    from app.adapters.faust_app import create_app
    from app.adapters.faust_table import DurableTable
    from app.adapters.kafka import KafkaPublisher
    from app.adapters.registry_topic import RegistryFollower, publish_next
    from app.adapters.topics import REGISTRY_TOPIC, ROLLOUT_WINDOWS, WINDOWED, check_copartitioned
    from app.adapters.window_follower import WindowFollower
    from app.agents import rollouts, windows
    from app.agents.worker import Worker
    from app.domain.windows import check_window

    partitions = check_copartitioned(settings, WINDOWED)
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(KafkaPublisher(settings, client_id=instance))
        registry = RegistryFollower(settings)
        await registry.start()
        stack.push_async_callback(registry.stop)
        app = create_app(settings, role="rollouts", instance=instance)
        audit_topic, changelog = settings.topic("inference.audit"), settings.topic(ROLLOUT_WINDOWS)
        followed = WindowFollower(
            settings,
            changelog=changelog,
            log_topic=audit_topic,
            partitions=partitions,
            group=app.conf.id,
            client_id=instance,
        )
        await followed.start()
        stack.push_async_callback(followed.stop)
        table = DurableTable(app, name="windows", changelog=changelog, publisher=publisher, read=check_window)

        judge = rollouts.Judge(
            table=table,
            windows=followed,
            registry=registry,
            publisher=publisher,
            publish_next=partial(publish_next, settings),
            clock=clock,
            audit_topic=audit_topic,
            registry_topic=settings.topic(REGISTRY_TOPIC),
        )
        intake = windows.attach(
            app, topic=audit_topic, windows=windows.Windows(table=table, registry=registry, clock=clock)
        )

        async def following() -> None:
            if not followed.healthy:
                raise StoreUnavailable("the windows are not being followed")

        worker = Worker(
            app,
            settings=settings,
            role="rollouts",
            instance=instance,
            http_port=http_port,
            intakes=[intake],
            ready_checks={"registry": _registry_ready(registry), "windows": following},
            background=[judge.run],
        )
        return await worker.run()


async def run_pool(settings: Settings, *, instance: str, http_port: int, name: str, runner: str) -> int:
    """A pool worker of the pool ``name``, running the models of ``runner`` (``module:factory``)."""
    from app.adapters.faust_app import create_app
    from app.adapters.kafka import KafkaPublisher
    from app.adapters.topics import pool_topic
    from app.agents import pool
    from app.agents.worker import Worker

    models = pool.load_runner(runner)
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(KafkaPublisher(settings, client_id=instance))
        tasks = pool_topic(name)
        await _require_topics(publisher, settings, tasks, f"{tasks}-dlt", "inference.results")
        app = create_app(settings, role=f"pool-{name}", instance=instance)
        intake = pool.attach(
            app,
            topic=settings.topic(tasks),
            results_topic=settings.topic("inference.results"),
            runner=models,
            publisher=publisher,
            clock=SystemClock(),
            settings=settings,
            instance=instance,
            group=app.conf.id,
        )
        worker = Worker(
            app,
            settings=settings,
            role="pool",
            instance=instance,
            http_port=http_port,
            intakes=[intake],
            ready_checks={},
        )
        return await worker.run()


async def _require_topics(publisher: "KafkaPublisher", settings: Settings, *names: str) -> None:
    """ConfigurationError where a topic is not there: a consumer of nothing looks as if it worked."""
    absent = [settings.topic(name) for name in names if not await publisher.has_partition(settings.topic(name), None)]
    if absent:
        raise ConfigurationError(f"no topic {', '.join(absent)}: create with `model-broker topics apply`")


def _functions_ready(
    registry: "RegistryFollower", functions: "Mapping[str, FeatureFunction]"
) -> Callable[[], Awaitable[None]]:
    """Fails where versions need functions that this worker's packages lack; views that none uses do not count."""
    from app.domain.on_demand import functions_of

    async def check() -> None:
        current = registry.current
        named = frozenset() if current is None else functions_of(current.computed(current.versions.values()))
        absent = ", ".join(sorted(named - functions.keys()))
        if absent:
            raise StoreUnavailable(f"feature functions {absent} are not registered: install the package that has them")

    return check


def _registry_ready(registry: "RegistryFollower") -> Callable[[], Awaitable[None]]:
    async def check() -> None:
        if registry.current is None:
            said = "no registry revision is published" if registry.blank else "no published revision is sound"
            raise StoreUnavailable(f"{said}: run `model-broker apply`")
        if not registry.healthy:
            raise StoreUnavailable("the registry topic is not being read")

    return check
