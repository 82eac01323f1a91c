"""The feature store in memory: what the contract suite holds beside Redis, and other tests use in its place."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.domain.errors import StoreUnavailable
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureStatus, Fetched, FetchedFeatures, Value, ViewNeed, coerce


@dataclass(slots=True)
class _StoredView:
    deleted_ms: int = 0
    features: dict[str, tuple[Value, int]] = field(default_factory=dict)


class MemoryFeatureStore:
    """A FeatureStore and FeatureWriter. ``available`` False makes every call raise, as a dead Redis does.

    ``slow_s``: so long each fetch takes. ``silent``: it answers none, and each is given up after its time.
    """

    def __init__(self) -> None:
        self.available = True
        self.slow_s = 0.0
        self.silent = False
        self._views: dict[tuple[EntityKey, str], _StoredView] = {}

    async def fetch(self, needs: Sequence[ViewNeed], timeout_ms: int) -> FetchedFeatures:
        """See FeatureStore."""
        await asyncio.sleep(self.slow_s)
        if self.silent:
            await asyncio.sleep(timeout_ms / 1000)
            raise StoreUnavailable(f"the store in memory did not answer within {timeout_ms} ms")
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
            written += self._write(self._views.setdefault((row.key, row.view), _StoredView()), row)
        return written

    @staticmethod
    def _write(view: _StoredView, row: FeatureRow) -> bool:
        time_ms, before = row.event_time_ms, (view.deleted_ms, dict(view.features))
        if row.tombstone:
            view.features = {
                name: held for name, held in view.features.items() if name not in row.kept or held[1] > time_ms
            }
            view.deleted_ms = max(view.deleted_ms, time_ms if row.guards else 0)
        for name, value in zip(row.names, row.values, strict=True):
            guard_ms = view.features[name][1] if name in view.features else view.deleted_ms
            if time_ms > guard_ms or guard_ms <= 0:
                view.features[name] = (value, time_ms)
        return before != (view.deleted_ms, view.features)

    async def ping(self) -> None:
        """See FeatureStore."""
        if not self.available:
            raise StoreUnavailable("the store in memory is switched off")

    async def close(self) -> None:
        """See FeatureStore."""
