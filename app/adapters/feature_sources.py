"""The feature store of a decide worker: each need goes to its view's source, all sources at once.

Views in Redis share one round trip. Those of feature servers are asked beside it, one request each. A server with a
write-back is asked only for what Redis does not have, or has from too long ago; what it says is written to Redis in
the background, in Feast's layout and under its own event time, so that an older one never replaces a newer one.
Writing back is worth no wait: what does not fit into the queue is shed and counted.

Redis gets half of a fetch's time where a server can follow: a Redis that hangs leaves a healthy server time to answer.

A source that fails makes ERRORs of its own features and of no others; only where nothing but Redis is asked is its
failure the fetch's own.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

import structlog
from prometheus_client import Counter

from app.adapters.http_feast import FeastServers
from app.domain.errors import RowsRefused, ServerFailed, StoreUnavailable
from app.domain.feature_updates import FeatureRow
from app.domain.features import (
    EVENT_TIME_AHEAD_MS_MAX,
    FeatureRef,
    FeatureStatus,
    Fetched,
    FetchedFeatures,
    ViewNeed,
    unavailable,
)
from app.domain.view_documents import HttpSource, WriteBack
from app.ports.clock import Clock
from app.ports.feature_store import FeatureStore, FeatureWriter

log = structlog.get_logger()

KEPT_PAST_MAX_AGE_MS: Final = 7 * 86_400_000
"""How long Redis has a row past its ``writeBack.maxAge`` where the view has no ttl: for contracts that allow more,
while the server is away."""
ROWS_WAITING_MAX: Final = 1_000
"""Rows that wait to be written back; Redis takes as many in some tens of milliseconds."""
_ROWS_AT_ONCE: Final = 100
_REDIS_SHARE: Final = 0.5
"""Of a fetch's time, what Redis may take where a feature server has what it lacks."""

_WRITE_BACKS = Counter(
    "broker_feature_write_backs",
    "Rows of a feature server to keep in Redis: written, outdated, shed, failed, refused (can never be stored)",
    ["fate"],
)


class FeatureSources:
    """A FeatureStore over Redis (or what stands before it) and feature servers; ``writer`` keeps what these said."""

    def __init__(
        self,
        store: FeatureStore,
        writer: FeatureWriter,
        servers: FeastServers,
        clock: Clock,
        *,
        rows_waiting_max: int = ROWS_WAITING_MAX,
    ) -> None:
        self._store = store
        self._writer = writer
        self._servers = servers
        self._clock = clock
        self._rows: asyncio.Queue[FeatureRow] = asyncio.Queue(rows_waiting_max)
        self._writing: asyncio.Task[None] | None = None

    async def fetch(self, needs: Sequence[ViewNeed], timeout_ms: int) -> FetchedFeatures:
        """See FeatureStore; StoreUnavailable only where ``needs`` are all Redis's."""
        if all(need.http is None for need in needs):
            return await self._store.fetch(needs, timeout_ms)
        stored = [need for need in needs if need.http is None or need.http.write_back is not None]
        alone = [(need, need.http) for need in needs if need.http is not None and need.http.write_back is None]
        answers = await asyncio.gather(
            self._stored(stored, timeout_ms), *(self._ask(need, source, timeout_ms) for need, source in alone)
        )
        return {ref: found for answer in answers for ref, found in answer.items()}

    async def _stored(self, needs: Sequence[ViewNeed], timeout_ms: int) -> FetchedFeatures:
        """What Redis has, and then what the servers say of that which it lacks, while the other servers are asked."""
        until_ms = self._clock.steady_ms() + timeout_ms
        followed = any(need.http is not None for need in needs)
        patience_ms = max(1, round(timeout_ms * _REDIS_SHARE)) if followed else timeout_ms
        fetched: dict[FeatureRef, Fetched] = dict(await self._from_redis(needs, patience_ms))
        again: list[tuple[ViewNeed, HttpSource]] = []
        for need in needs:
            lacking = self._lacking(need, fetched) if need.http is not None else ()
            if lacking and need.http is not None:
                again.append((_part(need, lacking), need.http))
        remaining_ms = round(until_ms - self._clock.steady_ms())
        for answer in await asyncio.gather(*(self._ask(need, source, remaining_ms, fetched) for need, source in again)):
            fetched.update(answer)
        return fetched

    async def _from_redis(self, needs: Sequence[ViewNeed], timeout_ms: int) -> FetchedFeatures:
        if not needs:
            return {}
        try:
            return await self._store.fetch(needs, timeout_ms)
        except StoreUnavailable as error:
            log.warning("features_unavailable", reason=str(error))
            return unavailable([need._replace(http=None) for need in needs])

    def _lacking(self, need: ViewNeed, fetched: Mapping[FeatureRef, Fetched]) -> tuple[str, ...]:
        """The features that Redis does not have well enough."""
        assert need.http is not None  # noqa: S101 - the caller looked
        assert need.http.write_back is not None  # noqa: S101 - the caller looked
        oldest_ms = min(need.http.write_back.max_age, need.max_age_ms or need.http.write_back.max_age)
        now_ms = self._clock.now_ms()
        return tuple(
            feature for feature in need.features if not _good(fetched.get((need.view, feature)), now_ms, oldest_ms)
        )

    async def _ask(
        self, need: ViewNeed, source: HttpSource, timeout_ms: int, kept: Mapping[FeatureRef, Fetched] | None = None
    ) -> FetchedFeatures:
        """What the server says; where it fails, what is ``kept`` although it is old, else that it is unavailable."""
        try:
            if timeout_ms <= 0:
                why = "no time was left to ask its feature server"
                raise ServerFailed(f"the feature server of view {need.view} was not asked: {why}", why)
            answer = await self._servers.ask(need, source, timeout_ms)
        except ServerFailed as error:
            log.warning("feature_server_unavailable", view=need.view, reason=str(error))
            aged = (FeatureStatus.PRESENT, FeatureStatus.NULL)
            old = {ref: found for ref, found in (kept or {}).items() if ref[0] == need.view and found.status in aged}
            return {ref: old.get(ref, found) for ref, found in unavailable([need], error.why).items()}
        if source.write_back is not None:
            self._write_back(need, source.write_back, answer)
        return answer

    # --- writing back -------------------------------------------------------------------------------------------------

    def _write_back(self, need: ViewNeed, write_back: WriteBack, answer: FetchedFeatures) -> None:
        for row in rows_of(need, write_back, answer, self._clock.now_ms()):
            if self._rows.full():
                _WRITE_BACKS.labels("shed").inc()
                continue
            self._rows.put_nowait(row)
            if self._writing is None or self._writing.done():
                self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        while not self._rows.empty():
            rows = [self._rows.get_nowait() for _ in range(min(_ROWS_AT_ONCE, self._rows.qsize()))]
            refused = 0
            try:
                written = await self._writer.write(rows)
            except StoreUnavailable as error:
                _WRITE_BACKS.labels("failed").inc(len(rows))
                log.warning("feature_write_back_failed", rows=len(rows), reason=str(error))
                continue
            except RowsRefused as error:
                written, refused = error.written, len(error.refused)
                log.warning("feature_write_back_refused", rows=refused, reason=str(error))
            _WRITE_BACKS.labels("written").inc(written)
            _WRITE_BACKS.labels("refused").inc(refused)
            _WRITE_BACKS.labels("outdated").inc(len(rows) - refused - written)

    # --- the rest -----------------------------------------------------------------------------------------------------

    async def ping(self) -> None:
        """See FeatureStore; a feature server that is away is its own features' matter."""
        await self._store.ping()

    async def close(self) -> None:
        """See FeatureStore; what waits to be written back is given up."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
        await self._servers.close()
        await self._store.close()


def _good(found: Fetched | None, now_ms: int, oldest_ms: int) -> bool:
    if found is None or found.status not in (FeatureStatus.PRESENT, FeatureStatus.NULL):
        return False
    if found.event_time_ms is None:
        return False
    return -EVENT_TIME_AHEAD_MS_MAX <= now_ms - found.event_time_ms <= oldest_ms


def _part(need: ViewNeed, features: Sequence[str]) -> ViewNeed:
    """The need for some of its features."""
    types = dict(zip(need.features, need.types, strict=True))
    left = tuple(feature for feature in need.features if feature not in features)
    wanted = tuple(features)
    return need._replace(features=wanted, types=tuple(types[each] for each in wanted), others=(*need.others, *left))


def rows_of(need: ViewNeed, write_back: WriteBack, answer: FetchedFeatures, now_ms: int) -> list[FeatureRow]:
    """The rows that keep an answer: one for each event time in it, the oldest first, for a row has one time.

    They expire, for whoever sends requests can name any entity: by the view's ttl, or after ``write_back``'s maxAge and
    ``KEPT_PAST_MAX_AGE_MS`` from now on.

    What has no event time, or one that has not come yet, cannot be kept: nobody could tell its age. What the server
    calls too old is not kept either: the layout has no place for that, and it would be sound when it is read again.
    """
    types = dict(zip(need.features, need.types, strict=True))
    by_time: dict[int, list[str]] = {}
    for feature in need.features:
        found = answer[need.view, feature]
        at_ms = found.event_time_ms
        kept = found.status in (FeatureStatus.PRESENT, FeatureStatus.NULL)
        if kept and at_ms is not None and 0 < at_ms <= now_ms + EVENT_TIME_AHEAD_MS_MAX:
            by_time.setdefault(at_ms, []).append(feature)
    return [
        FeatureRow(
            need.view,
            need.key,
            tuple(names),
            tuple(answer[need.view, name].value for name in names),
            tuple(types[name] for name in names),
            at_ms,
            tuple(name for name in (*need.features, *need.others) if name not in names),
            ttl_ms=need.ttl_ms or now_ms - at_ms + write_back.max_age + KEPT_PAST_MAX_AGE_MS,
        )
        for at_ms, names in sorted(by_time.items())
    ]
