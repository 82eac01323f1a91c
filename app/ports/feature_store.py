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

        A row whose event time is at or before its view's stored one changes nothing; a stored one at or before the
        epoch guards nothing. Features that a row keeps have their own event times from then on.

        Raises:
            StoreUnavailable: the store did not acknowledge all of them; writing them again is safe.
        """
        ...
