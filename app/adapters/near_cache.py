"""A feature store with a near cache before it: rows of views that declare ``cache`` are read again only when they may
have changed, and by one fetch at a time.

Of a request's needs, the fresh ones are answered from here; for those that are being fetched already, the request waits
for that fetch; all others, cached views or not, go to the store in one fetch a source: Redis, and each view of a
feature server, so that a slow source keeps no other's rows back. A fetch of cached rows belongs to no request: it has
the time that any fetch has, each request waits for it within its own deadline, and who gives up fails nobody else.

While the store does not answer, rows past their ttl and outdated ones are given out, as ``app.domain.near_cache`` says,
and fetches are not waited for together any more: the store's breaker answers each at once.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from prometheus_client import Counter, Gauge

from app.domain.errors import StoreUnavailable
from app.domain.features import EntityKey, Fetched, FetchedFeatures, ViewNeed, keys_of, unavailable
from app.domain.near_cache import EntityRows, Entry, Materialized, NearCache, Position, is_unavailable
from app.domain.view_documents import CacheSpec, FeatureViewSpec
from app.ports.clock import Clock
from app.ports.feature_store import FeatureStore

FETCHES_MAX: Final = 1_024
"""Fetches under way at once: more than a worker has requests in flight, so it holds only where they outlive them."""

_LOOKUPS = Counter(
    "broker_feature_cache_lookups",
    "Rows of cached views that requests asked for: hit, negative, miss, shared (waited for another's fetch), stale",
    ["outcome"],
)
_HIT, _NEGATIVE, _MISS, _SHARED, _STALE = (
    _LOOKUPS.labels(outcome) for outcome in ("hit", "negative", "miss", "shared", "stale")
)
_EVICTED = Counter("broker_feature_cache_evictions", "Entries that made room for others")
_INVALIDATED = Counter(
    "broker_feature_cache_invalidations", "Entries that an update of their row made outdated, or took away"
)
_ENTRIES = Gauge("broker_feature_cache_entries", "Rows that the near cache holds")
_BYTES = Gauge("broker_feature_cache_bytes", "Bytes that they take, as estimated")

_Fetch = asyncio.Task[FetchedFeatures | StoreUnavailable]
Views = Callable[[], Mapping[str, FeatureViewSpec] | None]


class CachedFeatureStore:
    """A FeatureStore over ``store``; ``views`` are the registry's, whose ``cache`` says what is kept and how long."""

    def __init__(
        self,
        store: FeatureStore,
        *,
        views: Views,
        clock: Clock,
        entries_max: int,
        bytes_max: int,
        fetch_timeout_ms: int,
    ) -> None:
        self._store = store
        self._views = views
        self._clock = clock
        self._cache = NearCache(entries_max=entries_max, bytes_max=bytes_max)
        self._fetch_timeout_ms = fetch_timeout_ms
        self._fetches: set[_Fetch] = set()
        self._fetching: dict[ViewNeed, _Fetch] = {}
        self._failing: set[str | None] = set()
        """Sources that did not answer last."""
        self._evicted = 0

    async def fetch(self, needs: Sequence[ViewNeed], timeout_ms: int) -> FetchedFeatures:
        """See FeatureStore."""
        views = self._views() or {}
        now_ms = self._clock.now_ms()
        found: dict[tuple[str, str], Fetched] = {}
        ask: list[ViewNeed] = []
        waiting: dict[ViewNeed, _Fetch] = {}
        cached: dict[ViewNeed, tuple[CacheSpec, Entry | None]] = {}
        hits = negatives = 0
        key: EntityKey | None = None
        rows: EntityRows = {}
        for need in needs:
            view = views.get(need.view)
            spec = None if view is None else view.cache
            if spec is None:
                ask.append(need)
                continue
            if need.key is not key:
                # A request's needs are of few entities, each one after the other.
                key = need.key
                rows = self._cache.rows_of(key)
            entry = self._cache.find(need, rows)
            if entry is not None and entry.fresh(spec, now_ms, need.max_age_ms):
                if entry.negative:
                    negatives += 1
                else:
                    hits += 1
                found.update(entry.served())
                continue
            cached[need] = (spec, entry)
            under_way = None if _source(need) in self._failing else self._fetching.get(need)
            if under_way is not None:
                waiting[need] = under_way
            else:
                ask.append(need)
        if hits:
            _HIT.inc(hits)
        if negatives:
            _NEGATIVE.inc(negatives)
        if not cached and not ask:
            return found
        if not cached and all(need.http is None for need in ask):
            # Nothing to keep and nobody to share with.
            answer = await self._store.fetch(ask, timeout_ms)
            return {**found, **answer} if found else answer
        if waiting:
            _SHARED.inc(len(waiting))
        if missed := len(cached) - len(waiting):
            _MISS.inc(missed)
        return await self._await(found, ask, waiting, cached, timeout_ms)

    async def ping(self) -> None:
        """See FeatureStore."""
        await self._store.ping()

    async def close(self) -> None:
        """See FeatureStore."""
        for fetch in self._fetches:
            fetch.cancel()
        await asyncio.gather(*self._fetches, return_exceptions=True)
        await self._store.close()

    def invalidate(
        self,
        view: str,
        key: EntityKey,
        features: Sequence[str] | None,
        event_time_ms: int,
        *,
        position: Position | None,
    ) -> None:
        """See Follows of the update announcer."""
        now_ms = self._clock.now_ms()
        if taken := self._cache.invalidate(view, key, features, event_time_ms, now_ms, position=position):
            _INVALIDATED.inc(taken)
            self._measure()

    def unheard(self, offsets: Mapping[int, int], views: Collection[str] | None = None) -> None:
        """See Follows of the update announcer."""
        self._cache.unheard(offsets, self._clock.now_ms(), views)

    def awaits(self) -> int | None:
        """See Follows of the update announcer."""
        return self._cache.awaits(self._clock.now_ms())

    def materialized(self, announced: int, offsets: Mapping[int, int]) -> None:
        """See Follows of the update announcer."""
        self._cache.materialized(announced, offsets)

    async def _await(
        self,
        found: dict[tuple[str, str], Fetched],
        ask: list[ViewNeed],
        waiting: dict[ViewNeed, _Fetch],
        cached: Mapping[ViewNeed, tuple[CacheSpec, Entry | None]],
        timeout_ms: int,
    ) -> FetchedFeatures:
        """Add to ``found`` what is to be asked for and what is being fetched already."""
        failure: StoreUnavailable | None = None
        if ask and len(self._fetches) >= FETCHES_MAX:
            failure = StoreUnavailable(f"{FETCHES_MAX} fetches are under way, and the feature store answers none")
        # With something to fall back on, there must be time left to use it.
        patience_ms = timeout_ms / 2 if any(entry is not None for _, entry in cached.values()) else timeout_ms
        if failure is None:
            by_source: dict[str | None, list[ViewNeed]] = {}
            for need in ask:
                by_source.setdefault(_source(need), []).append(need)
            for needs in by_source.values():
                waiting.update(dict.fromkeys(needs, self._begin(needs, cached, max(1, round(patience_ms)))))
        if waiting:
            await asyncio.wait(set(waiting.values()), timeout=patience_ms / 1000)
        known = len(found)
        for need in (*waiting, *(need for need in ask if need not in waiting)):
            answer = self._answered(waiting.get(need), failure)
            values = None if isinstance(answer, StoreUnavailable) else _row(need, answer)
            if values is None or is_unavailable(values):
                spec, entry = cached.get(need, (None, None))
                if spec is not None and entry is not None:
                    _STALE.inc()
                    values = entry.served_stale(spec, self._clock.now_ms())
                elif isinstance(answer, StoreUnavailable):
                    failure = answer
                    found.update(unavailable([need]))
                    continue
            if values is not None:
                known += 1
                _take(need, values, found)
        if failure is not None and not known:
            raise failure
        return found

    def _answered(self, fetch: _Fetch | None, failure: StoreUnavailable | None) -> FetchedFeatures | StoreUnavailable:
        if fetch is None:
            return failure or StoreUnavailable("the feature store was not asked")
        if not fetch.done():
            return StoreUnavailable("the feature store did not answer within the request's time")
        if fetch.cancelled():
            return StoreUnavailable("the worker ends")
        return fetch.result()

    def _begin(self, needs: Sequence[ViewNeed], cached: Mapping[ViewNeed, object], patience_ms: int) -> _Fetch:
        """Fetch ``needs`` of one source; what nobody else can use is given up with the request."""
        kept = [need for need in needs if need in cached]
        timeout_ms = self._fetch_timeout_ms if kept else patience_ms
        fetch = asyncio.create_task(self._read(needs, kept, self._cache.known, timeout_ms), name="feature-fetch")
        self._fetches.add(fetch)
        fetch.add_done_callback(self._fetches.discard)
        for need in kept:
            self._fetching[need] = fetch
        return fetch

    async def _read(
        self, needs: Sequence[ViewNeed], kept: Sequence[ViewNeed], known: Materialized, timeout_ms: int
    ) -> FetchedFeatures | StoreUnavailable:
        """One fetch of the store, begun when so much was known to be in it; its failure is a result, for there may be
        nobody left who waits for it."""
        this, source = asyncio.current_task(), _source(needs[0])
        try:
            answer = await self._store.fetch(needs, timeout_ms)
        except StoreUnavailable as error:
            self._failing.add(source)
            return error
        finally:
            for need in kept:
                if self._fetching.get(need) is this:
                    del self._fetching[need]
        if all(is_unavailable(_row(need, answer)) for need in needs):
            self._failing.add(source)
        else:
            self._failing.discard(source)
        now_ms = self._clock.now_ms()
        for need in kept:
            self._cache.store(need, answer, now_ms, known)
        self._measure()
        return answer

    def _measure(self) -> None:
        _ENTRIES.set(len(self._cache))
        _BYTES.set(self._cache.bytes)
        if self._cache.evicted > self._evicted:
            _EVICTED.inc(self._cache.evicted - self._evicted)
            self._evicted = self._cache.evicted


def _source(need: ViewNeed) -> str | None:
    """What answers for a need: a view's feature server, or Redis, which answers for all of its views at once."""
    return None if need.http is None else need.view


def _row(need: ViewNeed, answer: FetchedFeatures) -> tuple[Fetched, ...]:
    return tuple(answer[need.view, feature] for feature in need.features)


def _take(need: ViewNeed, values: Sequence[Fetched], found: dict[tuple[str, str], Fetched]) -> None:
    found.update(zip(keys_of(need.view, need.features), values, strict=True))
