"""The feature store in memory: what the contract suite holds beside Redis, and other tests use in its place."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.domain.errors import StoreUnavailable
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureStatus, Fetched, FetchedFeatures, Value, ViewNeed, coerce


@dataclass(slots=True)
class _StoredView:
    event_time_ms: int
    features: dict[str, tuple[Value, int]] = field(default_factory=dict)


class MemoryFeatureStore:
    """A FeatureStore and FeatureWriter. ``available`` False makes every call raise, as a dead Redis does.

    ``slow_s``: so long each fetch takes.
    """

    def __init__(self) -> None:
        self.available = True
        self.slow_s = 0.0
        self._views: dict[tuple[EntityKey, str], _StoredView] = {}

    async def fetch(self, needs: Sequence[ViewNeed], timeout_ms: int) -> FetchedFeatures:
        """See FeatureStore."""
        await asyncio.sleep(self.slow_s)
        await self.ping()
        return {
            (need.view, feature): self._one(need, feature, type_)
            for need in needs
            for feature, type_ in zip(need.features, need.types, strict=True)
        }

    def _one(self, need: ViewNeed, feature: str, type_: str) -> Fetched:
        view = self._views.get((need.key, need.view))
        if view is None or feature not in view.features:
            return Fetched(FeatureStatus.MISSING)
        value, time_ms = view.features[feature]
        if value is None:
            return Fetched(FeatureStatus.NULL, None, time_ms)
        try:
            return Fetched(FeatureStatus.PRESENT, coerce(value, type_), time_ms)
        except ValueError as error:
            return Fetched(FeatureStatus.ERROR, None, time_ms, f"stored value cannot be used: {error}")

    async def write(self, rows: Sequence[FeatureRow]) -> int:
        """See FeatureWriter."""
        await self.ping()
        written = 0
        for row in rows:
            view = self._views.get((row.key, row.view))
            if view is not None and view.event_time_ms > 0 and row.event_time_ms <= view.event_time_ms:
                continue
            view = self._views.setdefault((row.key, row.view), _StoredView(row.event_time_ms))
            view.event_time_ms = row.event_time_ms
            view.features |= {
                name: (value, row.event_time_ms) for name, value in zip(row.names, row.values, strict=True)
            }
            written += 1
        return written

    async def ping(self) -> None:
        """See FeatureStore."""
        if not self.available:
            raise StoreUnavailable("the store in memory is switched off")

    async def close(self) -> None:
        """See FeatureStore."""
