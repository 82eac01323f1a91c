"""The feature store: rows by entity in, values with their event times out; and the way in for updates."""

from collections.abc import Sequence
from typing import Protocol

from app.domain.feature_updates import FeatureRow
from app.domain.features import FetchedFeatures, ViewNeed


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

    async def write(self, rows: Sequence[FeatureRow]) -> int:
        """Store ``rows``, in order, and say how many changed something.

        Each feature has the event time of the row that wrote it, and only a later row changes it: of rows in any order
        the latest stands, and of two of one time the first. A tombstone deletes the view's features that are not later
        than itself, and rows that are not later do not bring them back. Times at or before the epoch guard nothing.

        Raises:
            StoreUnavailable: the store did not acknowledge all of them; writing them again is safe.
            RowsRefused: some can never be stored, for a value is too long or what stands in their place is no row; the
                others are.
        """
        ...
