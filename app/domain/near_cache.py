"""The near cache: rows of the feature store that a worker has read before, while they may still be used.

A row is what one ``ViewNeed`` asks for: the same view, entity and features. It is fresh for its view's ``ttl``, or
``negativeTtl`` where the store had none of it, or what its feature server calls too old. Past that it is kept, as room
allows, for the case that the store does not answer (``stale-if-error`` of RFC 5861), and then each contract's
``maxAge`` judges it.

Two bounds hold, of entries and of bytes. What goes first is decided by SIEVE (Zhang et al., *SIEVE is Simpler than
LRU*, NSDI 2024): entries stand in the order in which they came, a hit only marks its entry, and a hand that walks from
the oldest to the newest takes away the first that is not marked, and the marks of those that it passes.

An update is announced before the store has it. A row that is read in between is the old one, so what was announced
sets a floor: a row in which a feature that changes is older than announced, or one that is deleted is still there, is
handed out and never fresh, for minutes, as a materializer may lag. Aggregates have no time that tells whether an update
is in them, for the materializer computes them anew for other reasons too. But it commits an update only once the store
has what is computed of it: nothing of their rows is fresh that was asked for before that was known.

What was announced before updates were heard of sets one floor for all rows, until it is committed; what was before a
view changed may have been heard of otherwise than it is stored, or not at all, and sets one for the view's.

Floors are bounded too. While one that was given up in its first seconds may still count, nothing is kept; and where
one waits to be committed, its whole view waits in its place.

A row that an update makes outdated stays for the same case as one past its ttl: a store that does not answer now takes
no update either, and its busiest rows would be the first to be lost. What a tombstone deletes goes at once.
"""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

from app.domain.features import EntityKey, FeatureStatus, Fetched, Value, ViewNeed, is_away, keys_of, unavailable
from app.domain.view_documents import CacheSpec, FeatureViewSpec, RedisSource

FLOOR_MS: Final = 5_000
"""How long an announced update takes to reach the store at most, as a rule: a materializer takes some tens of ms."""
LAG_MS: Final = 600_000
"""How long a floor stands that nothing lifts. One that is never reached, as the update was refused, or as nobody says
what is committed, costs reads of its row until then."""
FLOORS_MAX: Final = 100_000
"""Some 60 MB at most, 75 of views with aggregates; 20,000 updates of cached views a second for FLOOR_MS, 166 for
LAG_MS."""
ENTRY_BYTES: Final = 1_000
"""An entry without its values: its place, its need and key, and what the index takes for it."""
VALUE_BYTES: Final = 145
"""A value without its content."""

_RowKey = tuple[str, EntityKey]
EntityRows = Mapping[str, Sequence["Entry"]]
"""An entity's entries by view; of one view there is one for each set of features that is asked for."""
_Times = Mapping[str, int]
"""The least event time that each feature may have, those that updates name."""
Views = Mapping[str, FeatureViewSpec]
"""A revision's."""
Position = tuple[int, int]
"""Where an update stands in its topic: a partition, and an offset there."""
_NO_TIMES: Final[_Times] = MappingProxyType({})


class Materialized(NamedTuple):
    """Of each partition, the offset before which all updates are in the store, aggregates too.

    Asked for when ``announced`` updates of rows with aggregates had been announced: of later ones it says nothing, for
    a topic may have been made anew in between, and its offsets begin again.
    """

    announced: int
    offsets: Mapping[int, int]


NOTHING_KNOWN: Final = Materialized(0, MappingProxyType({}))


class _Floor(NamedTuple):
    """What a row's updates demand since ``announced_ms``.

    ``deleted_ms`` is the latest tombstone's time: what is there and not later is to go. ``offsets``: those of the
    updates that the row's aggregates follow, the last of each partition; ``announced`` counts announcements of such.
    """

    times: _Times
    deleted_ms: int | None
    offsets: tuple[Position, ...]
    announced: int
    announced_ms: int

    def stands(self, now_ms: int) -> bool:
        """Whether a materializer may still be about to reach it."""
        return now_ms < self.announced_ms + LAG_MS

    def awaits(self, known: Materialized) -> bool:
        """Whether aggregates that are asked for when so much is known may lack an update."""
        if not self.offsets:
            return False
        if known.announced < self.announced:
            return True
        return any(known.offsets.get(partition, 0) <= offset for partition, offset in self.offsets)

    def above(self, need: ViewNeed, values: Sequence[Fetched]) -> bool:
        """Whether one of ``values`` is not as new as updates announce."""
        if not self.times:
            return False
        for feature, value in zip(need.features, values, strict=True):
            least_ms = self.times.get(feature)
            if least_ms is not None and (value.event_time_ms is None or value.event_time_ms < least_ms):
                return True
        return False

    def deletes(self, values: Sequence[Fetched]) -> bool:
        """Whether one of ``values`` is there that is to go."""
        return self.deleted_ms is not None and any(
            value.status is not FeatureStatus.MISSING
            and (value.event_time_ms is None or value.event_time_ms <= self.deleted_ms)
            for value in values
        )

    def joined(self, earlier: "_Floor") -> "_Floor":
        """Both demands, as of this one's announcement."""
        deleted_ms = max((each for each in (self.deleted_ms, earlier.deleted_ms) if each is not None), default=None)
        times = {
            name: max(self.times.get(name, 0), earlier.times.get(name, 0)) for name in {*self.times, *earlier.times}
        }
        if deleted_ms is not None:
            # An update that is not later than a tombstone brings nothing back.
            times = {name: least_ms for name, least_ms in times.items() if least_ms > deleted_ms}
        # A later update has the higher offset, unless its topic was made anew: then the earlier one says nothing.
        offsets = tuple(dict((*earlier.offsets, *self.offsets)).items()) if earlier.offsets else self.offsets
        return _Floor(times, deleted_ms, offsets, max(self.announced, earlier.announced), self.announced_ms)


class Entry:
    """A row as it was read at ``fetched_ms``; ``oldest_ms`` is the earliest of its event times.

    ``negative``: the store had none of the features, or one that cannot be used. ``outdated_ms``: since when an update
    is known that the row does not have; it is never fresh again.
    """

    __slots__ = ("_served", "features", "fetched_ms", "marked", "need", "negative", "newer", "older", "oldest_ms",
                 "outdated_ms", "size", "types", "values")  # fmt: skip

    def __init__(self, need: ViewNeed, values: tuple[Fetched, ...], fetched_ms: int) -> None:
        self.need = need
        self.features = need.features
        self.types = need.types
        self.values = values
        self.fetched_ms = fetched_ms
        self.negative = is_negative(values)
        self.oldest_ms = min((each.event_time_ms for each in values if each.event_time_ms is not None), default=None)
        self.size = size_of(values)
        self.marked = False
        self.outdated_ms: int | None = None
        self.newer: Entry | None = None
        self.older: Entry | None = None
        self._served: dict[tuple[str, str], Fetched] | None = None

    def holds(self, need: ViewNeed) -> bool:
        """Whether it is what ``need`` asks for: the same features, of the same source."""
        http, wanted = self.need.http, need.http
        return (
            (self.features is need.features or self.features == need.features)
            and (self.types is need.types or self.types == need.types)
            and (http is wanted or (http is not None and wanted is not None and http.is_as(wanted)))
        )

    def fresh(self, spec: CacheSpec, now_ms: int, max_age_ms: int | None = None) -> bool:
        """Whether the row may be used without asking the store: not where it has become too old for who asks, for the
        store may have a newer one."""
        lifetime_ms = spec.negative_ttl if self.negative else spec.ttl
        if self.outdated_ms is not None:
            return False
        # A clock that was set back says nothing of an age.
        if lifetime_ms is None or not 0 <= now_ms - self.fetched_ms <= lifetime_ms:
            return False
        return max_age_ms is None or self.oldest_ms is None or now_ms - self.oldest_ms <= max_age_ms

    def served(self) -> Mapping[tuple[str, str], Fetched]:
        """The values as a hit gives them."""
        if self._served is None:
            # On the first hit: many entries see none, and reading the store is not to pay for it.
            self.values = tuple(value._replace(source="cache", fetched_ms=self.fetched_ms) for value in self.values)
            self._served = dict(zip(keys_of(self.need.view, self.need.features), self.values, strict=True))
        return self._served

    def served_stale(self, spec: CacheSpec, now_ms: int) -> tuple[Fetched, ...]:
        """The values as they are given while the store does not answer.

        What was not there, or could not be read, may be there by now: it is not said again. An update ends the ttl, and
        without ``staleIfError`` nothing but a ``maxAge`` allows what is known to be outdated.
        """
        fresh_until_ms = self.fetched_ms + spec.ttl
        if self.outdated_ms is not None:
            fresh_until_ms = min(fresh_until_ms, self.outdated_ms - 1)
        overdue = not self.fetched_ms <= now_ms <= fresh_until_ms + (spec.stale_if_error or 0)
        away = next(iter(unavailable([self.need]).values()))
        return tuple(
            value._replace(overdue=overdue) if value.status in _KNOWN else away for value in self.served().values()
        )


_KNOWN: Final = frozenset({FeatureStatus.PRESENT, FeatureStatus.NULL, FeatureStatus.STALE})


def is_negative(values: Sequence[Fetched]) -> bool:
    """Whether nothing is there, or something is that cannot be used: unreadable, or by its own source's word too old,
    which may have it anew at any time."""
    known = 0
    for value in values:
        if value.status is FeatureStatus.ERROR or value.status is FeatureStatus.STALE:
            return True
        known += value.status in _KNOWN
    return not known


def can_serve_stale(values: Sequence[Fetched]) -> bool:
    """Whether there is anything in a row to fall back on."""
    return any(value.status in _KNOWN for value in values)


def is_unavailable(values: Sequence[Fetched]) -> bool:
    """Whether the store did not answer for this row."""
    return any(is_away(value.reason) for value in values)


def size_of(values: Sequence[Fetched]) -> int:
    """About how many bytes an entry of ``values`` takes.

    >>> size_of([Fetched(FeatureStatus.PRESENT, 7)]) == ENTRY_BYTES + VALUE_BYTES + 32
    True
    """
    return ENTRY_BYTES + sum(VALUE_BYTES + _content(value.value) for value in values)


def _content(value: Value | Sequence[Value]) -> int:
    if isinstance(value, str | bytes):
        return 56 + len(value)
    if isinstance(value, list | tuple):
        return 56 + sum(8 + _content(each) for each in value)
    return 32


_NO_ROWS: Final[EntityRows] = MappingProxyType({})


def views_read_anew(before: Views, after: Views) -> frozenset[str]:
    """The views with a cache whose updates may be read otherwise under a revision than under the one before it."""
    if after is before:
        return frozenset()
    return frozenset(
        name
        for name, view in after.items()
        if view.cache is not None and isinstance(view.source, RedisSource) and view != before.get(name)
    )


class NearCache:
    """Entries by row, within ``entries_max`` and ``bytes_max``; times are epoch milliseconds, as arguments."""

    def __init__(self, *, entries_max: int, bytes_max: int, floors_max: int = FLOORS_MAX) -> None:
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._floors_max = floors_max
        self._rows: dict[EntityKey, dict[str, list[Entry]]] = {}
        self._newest: Entry | None = None
        self._oldest: Entry | None = None
        self._hand: Entry | None = None
        self._floors: dict[_RowKey, _Floor] = {}
        self._forgotten: dict[str, _Floor] = {}
        """By view, what all of its rows wait for: what is left of its floors that were given up and are not known to be
        committed, and what was announced before it changed."""
        self._unheard: _Floor | None = None
        """What was announced before anything was heard of: it may be of any row."""
        self._awaited: dict[int, _Floor] = {}
        """By partition, the last update that aggregates follow; what it waits for, all before it wait for."""
        self._announced = 0
        self._nothing_kept_until_ms = 0
        self.known = NOTHING_KNOWN
        self.bytes = 0
        self.evicted = 0
        self._count = 0

    def __len__(self) -> int:
        """How many entries there are."""
        return self._count

    def rows_of(self, key: EntityKey) -> EntityRows:
        """What there is of an entity: looked up once for all views that a request asks of it."""
        return self._rows.get(key, _NO_ROWS)

    def find(self, need: ViewNeed, rows: EntityRows | None = None) -> Entry | None:
        """The entry that was stored for exactly this need, whatever its age; ``rows`` are its entity's, if at hand."""
        for entry in (self.rows_of(need.key) if rows is None else rows).get(need.view, ()):
            if entry.holds(need):
                entry.marked = True
                return entry
        return None

    def store(
        self,
        need: ViewNeed,
        answer: Mapping[tuple[str, str], Fetched],
        now_ms: int,
        known: Materialized = NOTHING_KNOWN,
    ) -> bool:
        """Keep what the store answered for ``need`` at ``now_ms``; False where it may not be kept as fresh.

        ``known`` is what the cache's was when the store was asked: what became known since may have come into the store
        after this was read there. What lacks an announced update is kept as outdated, unless what there is already is
        better.
        """
        values = tuple(answer[need.view, feature] for feature in need.features)
        entry = Entry(need, values, now_ms)
        if entry.size > self._bytes_max or not self._entries_max or is_unavailable(values):
            return False
        if now_ms < self._nothing_kept_until_ms:
            return False
        for floor in (self._floors.get((need.view, need.key)), self._forgotten.get(need.view), self._unheard):
            if floor is None or not floor.stands(now_ms):
                continue
            if floor.deletes(values):
                return False
            if floor.above(need, values) or floor.awaits(known):
                entry.outdated_ms = now_ms
        for there in tuple(self.rows_of(need.key).get(need.view, ())):
            if there.holds(need):
                if entry.outdated_ms is not None and there.outdated_ms is None:
                    # Read before the update by a fetch that took its time.
                    return False
                entry.marked |= there.marked
                self._remove(there)
        if entry.outdated_ms is not None and not can_serve_stale(values):
            return False
        while self._count >= self._entries_max or self.bytes + entry.size > self._bytes_max:
            self._evict()
        self._rows.setdefault(need.key, {}).setdefault(need.view, []).append(entry)
        self._link(entry)
        return entry.outdated_ms is None

    def invalidate(
        self,
        view: str,
        key: EntityKey,
        features: Sequence[str] | None,
        event_time_ms: int,
        now_ms: int,
        *,
        position: Position | None = None,
    ) -> int:
        """An update of ``features``, true since ``event_time_ms``, is on its way to the store; how many entries are
        not fresh any more by it.

        ``features`` None: a tombstone of all that is not later. ``position``: the row has aggregates, which follow it.
        """
        row = (view, key)
        # What guards nothing in the store cannot be told from what replaces it.
        times = dict.fromkeys(features or (), max(1, event_time_ms))
        deleted_ms = event_time_ms if features is None else None
        if position is None:
            floor = _Floor(times, deleted_ms, (), 0, now_ms)
        else:
            self._announced += 1
            floor = _Floor(times, deleted_ms, (position,), self._announced, now_ms)
            self._awaited[position[0]] = floor
        taken = 0
        for entry in tuple(self.rows_of(key).get(view, ())):
            if floor.deletes(entry.values):
                self._remove(entry)
            # An update of what is as new already changes nothing there, and takes nothing here.
            elif entry.outdated_ms is not None or (position is None and not floor.above(entry.need, entry.values)):
                continue
            elif can_serve_stale(entry.values):
                entry.outdated_ms, entry.marked = now_ms, False
            else:
                self._remove(entry)
            taken += 1
        known = self._floors.pop(row, None)
        self._floors[row] = floor if known is None or not known.stands(now_ms) else floor.joined(known)
        self._forget_floors(now_ms)
        return taken

    def _forget_floors(self, now_ms: int) -> None:
        """Drop the floors whose time is over; they stand in the order of their announcement."""
        while self._floors:
            row, floor = next(iter(self._floors.items()))
            if floor.stands(now_ms):
                if len(self._floors) <= self._floors_max:
                    return
                self._nothing_kept_until_ms = max(self._nothing_kept_until_ms, floor.announced_ms + FLOOR_MS)
                if floor.offsets:
                    # Also where it is known to be committed: what was asked for before may not be stored yet.
                    self._forget(row[0], floor._replace(times=_NO_TIMES, deleted_ms=None), now_ms)
            del self._floors[row]

    def _forget(self, view: str, floor: _Floor, now_ms: int) -> None:
        known = self._forgotten.get(view)
        self._forgotten[view] = floor if known is None or not known.stands(now_ms) else floor.joined(known)

    def unheard(self, offsets: Mapping[int, int], now_ms: int, views: Collection[str] | None = None) -> None:
        """Updates before ``offsets`` (by partition), of ``views`` or of any, are not announced, and may be on their way
        to the store."""
        if not offsets:
            return
        self._announced += 1
        last = tuple((partition, offset - 1) for partition, offset in offsets.items())
        floor = _Floor(_NO_TIMES, None, last, self._announced, now_ms)
        if views is None:
            self._unheard = floor
        for view in views or ():
            self._forget(view, floor, now_ms)
        self._awaited.update(dict.fromkeys(offsets, floor))
        entry = self._oldest
        while entry is not None:
            if entry.outdated_ms is None and (views is None or entry.need.view in views):
                entry.outdated_ms = now_ms
            entry = entry.newer

    def awaits(self, now_ms: int) -> int | None:
        """How many announcements there were of what ``materialized`` has to tell, where it has not told of all."""
        waiting = any(floor.stands(now_ms) and floor.awaits(self.known) for floor in self._awaited.values())
        return self._announced if waiting else None

    def materialized(self, announced: int, offsets: Mapping[int, int]) -> None:
        """All updates before ``offsets`` are in the store, with what is computed of them; ``announced`` is what
        ``awaits`` said before that was asked for."""
        self.known = Materialized(announced, MappingProxyType(dict(offsets)))

    def _link(self, entry: Entry) -> None:
        entry.older = self._newest
        if self._newest is not None:
            self._newest.newer = entry
        else:
            self._oldest = entry
        self._newest = entry
        self._count += 1
        self.bytes += entry.size

    def _remove(self, entry: Entry) -> None:
        view, key, *_ = entry.need
        rows = self._rows[key]
        rows[view].remove(entry)
        if not rows[view]:
            del rows[view]
        if not rows:
            del self._rows[key]
        if self._hand is entry:
            self._hand = entry.newer
        if entry.newer is not None:
            entry.newer.older = entry.older
        else:
            self._newest = entry.older
        if entry.older is not None:
            entry.older.newer = entry.newer
        else:
            self._oldest = entry.newer
        entry.newer = entry.older = None
        self._count -= 1
        self.bytes -= entry.size

    def _evict(self) -> None:
        entry = self._hand or self._oldest
        assert entry is not None  # noqa: S101 - an entry alone is within the bounds
        while entry.marked:
            entry.marked = False
            entry = entry.newer or self._oldest
            assert entry is not None  # noqa: S101 - the list is not empty
        self._hand = entry
        self._remove(entry)
        self.evicted += 1
