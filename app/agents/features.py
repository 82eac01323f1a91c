"""The features worker: updates in from ``features.updates``, rows out to the feature store.

A batch of one partition's records is read under the registry's views, written to the store in one round trip, and
acknowledged only when the store has answered. Views with aggregates then have those updates counted that are stored,
and what was computed is written too. While the store or Kafka is away the batch waits and is tried again: writing a
row twice changes nothing. What cannot be stored, be it for what it says or for what stands in its place, goes to the
dead-letter topic, acknowledged there first, and does not hold up the others.

An update may overtake the revision that declares its view. So one that names something unknown waits until it has been
in Kafka for ``REGISTRY_GRACE_MS``, but not past as much from when that name was first asked for: an old backlog never
waits, nor does it spend what others wait, and a producer with a wrong name holds up the others of its partition once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

import faust
import orjson
import structlog
from faust.types import StreamT
from prometheus_client import Counter, Histogram

from app.adapters.avro import feature_updates
from app.adapters.dead_letters import dead_letter, publish_dead_letters
from app.agents.aggregates import Aggregates
from app.agents.delivery import Intake
from app.domain.errors import PublishFailed, RowsRefused, StoreUnavailable
from app.domain.feature_updates import FeatureRow, UpdateRefused, read_update
from app.domain.features import EVENT_TIME_AHEAD_MS_MAX
from app.domain.graces import Graces
from app.domain.requests import InboundRecord
from app.domain.view_documents import FeatureViewSpec
from app.observability import LATENCY_BUCKETS_S
from app.ports.clock import Clock
from app.ports.feature_store import FeatureWriter
from app.ports.log import OutboundRecord, Publisher

log = structlog.get_logger()

BATCH_RECORDS_MAX: Final = 500
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
BATCH_WAIT_MS: Final = 20
"""Small beside a producer's and Redis' own times; large enough that a backlog fills batches."""
IN_FLIGHT_MAX: Final = 2_000
REGISTRY_GRACE_MS: Final = 5_000
"""A revision reaches every worker well within this of its ``apply``."""
REGISTRY_POLL_S: Final = 0.1
RETRY_DELAYS_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Between attempts at one batch; the last repeats for as long as the dependency is away."""

_UPDATES = Counter("broker_feature_updates", "Feature updates by outcome: stored, outdated, refused", ["outcome"])
_BATCH_SECONDS = Histogram(
    "broker_feature_batch_seconds", "From a batch's first look to its acknowledgement", buckets=LATENCY_BUCKETS_S
)
_RETRIES = Counter("broker_feature_retries", "Attempts at a batch that have to be repeated", ["dependency"])

_T = TypeVar("_T")
_AVRO_MAGIC: Final = b"\xc3\x01"
Views = Callable[[], Mapping[str, FeatureViewSpec] | None]


class FeatureUpdates:
    """What happens to one batch; ``views`` are the registry's, None while no revision is known."""

    def __init__(
        self,
        *,
        writer: FeatureWriter,
        publisher: Publisher,
        views: Views,
        group: str,
        clock: Clock,
        aggregates: Aggregates | None = None,
        retry_delays_s: Sequence[float] = RETRY_DELAYS_S,
    ) -> None:
        self._writer = writer
        self._publisher = publisher
        self._views = views
        self._group = group
        self._clock = clock
        self._aggregates = aggregates
        self._retry_delays_s = retry_delays_s
        self._graces = Graces(REGISTRY_GRACE_MS)
        self._codec = feature_updates()

    async def handle(self, partition: int, records: Sequence[InboundRecord]) -> None:
        """Store a batch's rows and bury what cannot be stored; returns when both are durable."""
        started_ms = self._clock.steady_ms()
        updates: list[tuple[InboundRecord, FeatureRow]] = []
        letters: list[OutboundRecord] = []
        for record, read in zip(records, await self._read(records), strict=True):
            if isinstance(read, UpdateRefused):
                letters.append(self._letter(record, str(read)))
            else:
                updates.append((record, read))
        stored, refused = await self._store([row for _, row in updates])
        letters += [self._letter(updates[place][0], reason) for place, reason in refused.items()]
        # What is redriven later counts then; counted now too, it would count twice.
        sound = [update for place, update in enumerate(updates) if place not in refused]
        aggregates = self._aggregates
        if aggregates is not None and sound:
            computed = await self._until_done("kafka", lambda: aggregates.count(partition, sound))
            for place, reason in (await self._store(computed))[1].items():
                log.error("feature_aggregates_refused", partition=partition, view=computed[place].view, reason=reason)
        if letters:
            await self._until_done("kafka", lambda: publish_dead_letters(self._publisher, letters))
        elapsed_ms = self._clock.steady_ms() - started_ms
        _UPDATES.labels("stored").inc(stored)
        _UPDATES.labels("outdated").inc(len(sound) - stored)
        _UPDATES.labels("refused").inc(len(letters))
        _BATCH_SECONDS.observe(elapsed_ms / 1000)
        log.info(
            "feature_batch",
            partition=partition,
            first_offset=records[0].offset,
            last_offset=records[-1].offset,
            stored=stored,
            outdated=len(sound) - stored,
            refused=len(letters),
            elapsed_ms=round(elapsed_ms, 1),
        )

    def _letter(self, record: InboundRecord, reason: str) -> OutboundRecord:
        log.warning("feature_update_refused", position=record.position, reason=reason)
        return dead_letter(record, reason, "feature_update_refused", self._group)

    async def _store(self, rows: Sequence[FeatureRow]) -> tuple[int, Mapping[int, str]]:
        """How many rows changed something, and why some can never be stored, by their places."""
        if not rows:
            return 0, {}
        try:
            return await self._until_done("store", lambda: self._writer.write(rows)), {}
        except RowsRefused as error:
            return error.written, error.refused

    async def _read(self, records: Sequence[InboundRecord]) -> Sequence[FeatureRow | UpdateRefused]:
        """Each record's row, or why it has none; what may yet become known is waited for, all of it at once."""
        views = await self._known_views(records[0])
        now_ms = self._clock.now_ms()
        read = [self._row_or_refusal(record, views, now_ms) for record in records]
        waiting = self._worth_waiting(records, read, range(len(records)))
        while waiting:
            await asyncio.sleep(REGISTRY_POLL_S)
            views = await self._known_views(records[0])
            now_ms = self._clock.now_ms()
            for place in waiting:
                read[place] = self._row_or_refusal(records[place], views, now_ms)
            waiting = self._worth_waiting(records, read, waiting)
        return read

    async def _known_views(self, record: InboundRecord) -> Mapping[str, FeatureViewSpec]:
        views = self._views()
        if views is None:
            log.warning("registry_awaited", position=record.position, hint="apply a revision with feature views")
        while views is None:
            await asyncio.sleep(REGISTRY_POLL_S)
            views = self._views()
        return views

    def _worth_waiting(
        self, records: Sequence[InboundRecord], read: Sequence[FeatureRow | UpdateRefused], places: Iterable[int]
    ) -> list[int]:
        now_ms, steady_ms = self._clock.now_ms(), self._clock.steady_ms()
        worth: list[int] = []
        for place in places:
            refused = read[place]
            # The reason says what is unknown, so it stands for the name.
            if not isinstance(refused, UpdateRefused) or not refused.unknown:
                continue
            # A producer's clock may be ahead; the name's grace bounds the wait all the same.
            young = -EVENT_TIME_AHEAD_MS_MAX <= now_ms - records[place].timestamp_ms < REGISTRY_GRACE_MS
            if self._graces.ask(str(refused), steady_ms, waits=young):
                worth.append(place)
        return worth

    def _row_or_refusal(
        self, record: InboundRecord, views: Mapping[str, FeatureViewSpec], now_ms: int
    ) -> FeatureRow | UpdateRefused:
        try:
            return _row_of(record, self._decode(record.value), views, now_ms)
        except UpdateRefused as error:
            return error

    def _decode(self, value: bytes | None) -> Mapping[str, Any]:
        if not value:
            raise UpdateRefused("the record has no value: send a FeatureUpdate as JSON or Avro")
        if value.startswith(_AVRO_MAGIC):
            try:
                return self._codec.decode(value)
            except ValueError as error:
                raise UpdateRefused(str(error)) from error
        try:
            body = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise UpdateRefused(f"neither JSON nor Avro in single-object encoding: {error}") from error
        if not isinstance(body, dict):
            raise UpdateRefused(f"a JSON {type(body).__name__}: send an object")
        return body

    async def _until_done(self, dependency: str, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """The attempt's result, however often it takes; only the worker's end cancels the wait."""
        failures = 0
        while True:
            try:
                return await attempt()
            except (StoreUnavailable, PublishFailed) as error:
                delay_s = self._retry_delays_s[min(failures, len(self._retry_delays_s) - 1)]
                failures += 1
                _RETRIES.labels(dependency).inc()
                log.warning("feature_batch_waits", dependency=dependency, reason=str(error), retry_in_s=delay_s)
                await asyncio.sleep(delay_s)


def _row_of(
    record: InboundRecord, body: Mapping[str, Any], views: Mapping[str, FeatureViewSpec], now_ms: int
) -> FeatureRow:
    row = read_update(body, views, now_ms)
    if views[row.view].plan is not None and not record.key:
        raise UpdateRefused(
            f"the record has no key, and view {row.view} has aggregates: send the entity as the key, so that all its "
            "updates come in one partition"
        )
    return row


def attach(
    app: faust.App,
    *,
    topic: str,
    writer: FeatureWriter,
    publisher: Publisher,
    views: Views,
    group: str,
    clock: Clock,
    aggregates: Aggregates,
) -> Intake:
    """Add the features agent to ``app``; ``topic`` and ``group`` are full names. Returns its intake, to be drained."""
    intake = Intake(app, in_flight_max=IN_FLIGHT_MAX)
    updates = FeatureUpdates(
        writer=writer, publisher=publisher, views=views, group=group, clock=clock, aggregates=aggregates
    )

    async def features(stream: StreamT[Any]) -> None:
        await intake.batches(
            cast(faust.Stream[bytes], stream),
            updates.handle,
            records_max=BATCH_RECORDS_MAX,
            bytes_max=BATCH_BYTES_MAX,
            wait_ms=BATCH_WAIT_MS,
        )

    channel = app.topic(topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")
    app.agent(channel, name="features")(features)
    return intake
