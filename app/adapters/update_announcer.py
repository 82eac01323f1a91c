"""What the near cache is told of the updates that are read: which rows they change, by the registry's views.

An update is read as the materializer reads it, so what that refuses takes nothing away. But the materializer may read
it under another revision: it waits for one that an update has overtaken, it lags, and it hears of revisions at another
moment. So where a view that has a cache changes, all that was read before counts as not told of its rows, and is waited
for; and once more when every worker has gone over, for what was read since. This takes no note of a single update: one
that names what nobody knows costs nothing.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Protocol

import orjson

from app.adapters.avro import feature_updates
from app.domain.feature_updates import UpdateRefused, read_update
from app.domain.features import EntityKey
from app.domain.near_cache import LAG_MS, Position, views_read_anew
from app.domain.view_documents import FeatureViewSpec
from app.ports.clock import Clock

SETTLED_MS: Final = 5_000
"""A revision reaches every worker well within this of the first."""
_AT_ONCE: Final = 50
"""Updates that are read before others have their turn on the event loop."""
_AVRO_MAGIC: Final = b"\xc3\x01"

Views = Callable[[], Mapping[str, FeatureViewSpec] | None]


class Follows(Protocol):
    """What wants to hear of updates."""

    def invalidate(
        self,
        view: str,
        key: EntityKey,
        features: Sequence[str] | None,
        event_time_ms: int,
        *,
        position: Position | None,
    ) -> None:
        """Features of a row get values that are true since then, or all that is not later is deleted (None).

        ``position``: what is computed of the view's updates follows, when the materializer is past this one.
        """
        ...

    def unheard(self, offsets: Mapping[int, int], views: Collection[str] | None = None) -> None:
        """What lies before these offsets, by partition, is not told, or not as it is read by now, and may not be
        materialized yet; ``views``: it is of rows of these."""
        ...

    def awaits(self) -> int | None:
        """How often something was told that waits to be materialized, where something of it is not known to be."""
        ...

    def materialized(self, announced: int, offsets: Mapping[int, int]) -> None:
        """By partition, the offsets before which all is materialized, asked for after ``awaits`` said ``announced``."""
        ...


class Record(Protocol):
    """A record of the updates' topic."""

    @property
    def offset(self) -> int:
        """Its place in its partition."""
        ...

    @property
    def value(self) -> bytes | None:
        """The update."""
        ...


class UpdateAnnouncer:
    """Tells ``cache`` of each update that concerns a view with a ``cache``; ``positions`` are the next offsets, by
    partition."""

    def __init__(self, cache: Follows, *, views: Views, clock: Clock) -> None:
        self._cache = cache
        self._views = views
        self._clock = clock
        self._codec = feature_updates()
        self._firsts: Mapping[int, int] = {}
        self._read_by: Mapping[str, FeatureViewSpec] = {}
        self._settling: dict[str, float] = {}
        """By view that changed, until when workers may read its updates as they were read before (steady ms)."""
        self.positions: dict[int, int] = {}

    def assign(self, firsts: Mapping[int, int], ends: Mapping[int, int]) -> None:
        """Take all partitions: known ones from where they were, later ones from their beginning, all at first from
        their ends."""
        later = bool(self.positions)
        for partition, end in ends.items():
            start = self.positions.get(partition, firsts[partition] if later else end)
            # A topic that was made anew has neither more nor less than it has.
            self.positions[partition] = min(max(start, firsts[partition]), end)
        self._firsts = dict(firsts)
        if not later:
            self._read_by = self._views() or {}
            # Workers may be about to come to the revision that this one begins with.
            self._settling = dict.fromkeys(views_read_anew({}, self._read_by), self._clock.steady_ms() + SETTLED_MS)
            self._cache.unheard({partition: end for partition, end in ends.items() if firsts[partition] < end})

    def notice(self) -> None:
        """Go over to the registry's revision of now; to be called before each ``tell``."""
        views, now_ms = self._views() or {}, self._clock.steady_ms()
        changed = views_read_anew(self._read_by, views)
        self._read_by = views
        settled = {view for view, until_ms in self._settling.items() if until_ms <= now_ms}
        for view in settled:
            del self._settling[view]
        self._settling.update(dict.fromkeys(changed, now_ms + SETTLED_MS))
        if concerned := changed | settled:
            read = {partition: self.positions[partition] for partition in self._firsts}
            self._cache.unheard({each: at for each, at in read.items() if self._firsts[each] < at}, concerned)

    async def tell(self, partition: int, records: Sequence[Record]) -> None:
        """Tell of a partition's next records."""
        if any(view.cache for view in self._read_by.values()):
            for number, record in enumerate(records, 1):
                self._tell_one(record.value, (partition, record.offset))
                # What was told is not told again after an interruption: its positions would go back.
                self.positions[partition] = record.offset + 1
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)
        self.positions[partition] = records[-1].offset + 1

    def _tell_one(self, value: bytes | None, position: Position) -> None:
        if not value:
            return
        try:
            body: Any = self._codec.decode(value) if value.startswith(_AVRO_MAGIC) else orjson.loads(value)
            view = self._read_by.get(body["view"])
            if view is None or view.cache is None:
                return
            # By a later clock: what is too far ahead by now is stored by a materializer that lags.
            row = read_update(body, self._read_by, self._clock.now_ms() + LAG_MS)
        except (ValueError, TypeError, KeyError, UpdateRefused):
            # The materializer says what is wrong with it.
            return
        features = None if row.tombstone else row.names
        self._cache.invalidate(
            row.view, row.key, features, row.event_time_ms, position=position if view.aggregate else None
        )
