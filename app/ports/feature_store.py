"""The feature store: rows by entity in, values with their event times out; and the way in for updates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from app.domain.features import EntityKey, FetchedFeatures, Value, ViewNeed


@dataclass(frozen=True, slots=True)
class FeatureRow:
    """New values of one view's features for one entity; ``types`` are Feast value types, in the values' order."""

    view: str
    key: EntityKey
    names: tuple[str, ...]
    values: tuple[Value, ...]
    types: tuple[str, ...]
    event_time_ms: int


class FeatureStore(Protocol):
    """Where features are read."""

    async def fetch(self, needs: Sequence[ViewNeed], timeout_ms: int) -> FetchedFeatures:
        """All of ``needs`` in one round trip, each value PRESENT, NULL, MISSING or ERROR (undecodable).

        Raises:
            StoreUnavailable: no answer within ``timeout_ms``; nothing is known of any value.
        """
        ...

    async def ping(self) -> None:
        """Raises StoreUnavailable unless the store answers."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...


class FeatureWriter(Protocol):
    """Where features are written."""

    async def write(self, rows: Sequence[FeatureRow]) -> None:
        """Store ``rows``, in order; a row whose event time is at or before the stored one changes nothing.

        Raises:
            StoreUnavailable: the store did not acknowledge all of them; writing them again is safe.
        """
        ...
