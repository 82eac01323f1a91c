"""Feature updates: what a producer says of one entity in; a typed row for the feature store out.

A producer names view, entity, values and the time they were true. The registry's FeatureView says what types they
have; an update that says anything else is refused whole, for half an update under a new event time would make old
values look fresh. A feature that is left out keeps its value and its own time; one that is given as null becomes null.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from app.domain.errors import BrokerError
from app.domain.features import EVENT_TIME_AHEAD_MS_MAX, EntityKey, Value, bytes_of, coerce
from app.domain.view_documents import FeatureViewSpec, RedisSource

_MEMBERS: Final = frozenset({"project", "view", "entities", "values", "event_time"})
_INT64_BOUND: Final = 2**63
EVENT_TIME_MS_MAX: Final = 253_402_300_799_999
"""The end of the year 9999 and of protobuf's Timestamp; microseconds sent as milliseconds lie past it."""
_NO_MILLISECONDS: Final = range(10_000_000, 10_000_000_000)
"""What people send in their place: seconds of 1970 to 2286, and dates as 20260131. As milliseconds they lie before May
1970, which no update is of."""


class FeatureRow(NamedTuple):
    """New values of one view's features for one entity; ``types`` are Feast value types, in the values' order.

    ``kept`` are the view's other features: they keep their values, and their own event times. A tombstone has no
    values; it deletes those ``kept`` that are not newer, and keeps older rows out unless ``guards`` is False.

    A tuple, as ``Fetched`` is: one is made of each update.
    """

    view: str
    key: EntityKey
    names: tuple[str, ...]
    values: tuple[Value, ...]
    types: tuple[str, ...]
    event_time_ms: int
    kept: tuple[str, ...] = ()
    tombstone: bool = False
    guards: bool = True
    ttl_ms: int | None = None


class UpdateRefused(BrokerError):
    """An update cannot be stored; the message says why.

    ``unknown`` tells a name that the registry may still learn (a view, a feature) from what never becomes right.
    """

    def __init__(self, message: str, *, unknown: bool = False) -> None:
        super().__init__(message)
        self.unknown = unknown


def read_update(body: Mapping[str, Any], views: Mapping[str, FeatureViewSpec], now_ms: int) -> FeatureRow:
    """The row that a decoded update makes under the registry's views, at ``now_ms``.

    Raises:
        UpdateRefused: a member is missing, unknown or of the wrong type, or the event time has not come yet; the
            message names it.
    """
    if body.keys() != _MEMBERS:
        wrong = sorted(f"{name} is missing" for name in _MEMBERS - set(body))
        wrong += sorted(f"{str(name)[:80]} is unknown" for name in set(body) - _MEMBERS)
        raise UpdateRefused(f"{'; '.join(wrong)[:400]}: an update has {', '.join(sorted(_MEMBERS))}")
    name = body["view"]
    view = views.get(name) if isinstance(name, str) else None
    if view is None:
        raise UpdateRefused(f"view {str(name)[:80]!r} is not in the registry: apply its FeatureView", unknown=True)
    if not isinstance(view.source, RedisSource):
        how = "computed on demand" if view.source is None else "asked of a feature server"
        raise UpdateRefused(f"view {name} is {how}: only a view with source redis takes updates", unknown=True)
    if body["project"] != view.project:
        raise UpdateRefused(
            f"project {str(body['project'])[:80]!r}: view {name} belongs to {view.project}", unknown=True
        )
    key = _key_of(_section(body, "entities"), name, view)
    if body["values"] is None:
        time_ms = _event_time_ms(body["event_time"], now_ms)
        return FeatureRow(name, key, (), (), (), time_ms, tuple(view.types), tombstone=True, ttl_ms=view.ttl)
    values = _section(body, "values")
    if not values:
        raise UpdateRefused("values is empty: send at least one feature, or null to delete them all")
    part = view.part(tuple(values))
    if part is None:
        raise _not_of(name, view, values)
    return FeatureRow(
        name,
        key,
        part.names,
        _typed_values(values, part.types),
        part.types,
        _event_time_ms(body["event_time"], now_ms),
        part.others,
        ttl_ms=view.ttl,
    )


def _not_of(name: str, view: FeatureViewSpec, values: Mapping[str, Any]) -> UpdateRefused:
    computed = sorted(set(values) & (view.types.keys() - view.declared.keys()))
    if computed:
        return UpdateRefused(f"values.{computed[0]}: is computed from the updates of view {name}; leave it out")
    strange = min(set(values) - set(view.types))
    return UpdateRefused(f"values.{strange[:80]}: view {name} has no such feature", unknown=True)


def _typed_values(values: Mapping[str, Any], types: tuple[str, ...]) -> tuple[Value, ...]:
    """Each as its type. What needs no conversion, as nearly all, is told here; ``_typed`` has the rules."""
    return tuple(
        [
            given
            if (type_ == "DOUBLE" and type(given) is float and math.isfinite(given))
            or (type_ == "INT64" and type(given) is int and -_INT64_BOUND <= given < _INT64_BOUND)
            or (type_ == "STRING" and type(given) is str and given.isascii())
            else _typed(given, type_, f"values.{feature}")
            for (feature, given), type_ in zip(values.items(), types, strict=True)
        ]
    )


def _section(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = body[name]
    if not isinstance(section, Mapping):
        raise UpdateRefused(f"{name} is {type(section).__name__}: send an object of names to values")
    return section


def _key_of(given: Mapping[str, Any], name: str, view: FeatureViewSpec) -> EntityKey:
    expected = view.entity_names
    if given.keys() != set(expected):
        raise UpdateRefused(
            f"entities has {', '.join(sorted(given))[:200] or 'nothing'}: view {name} is of {', '.join(expected)}"
        )
    values: list[str | int] = []
    for entity, type_ in zip(expected, view.entity_types, strict=True):
        value = given[entity]
        # 17.0 may be a rounded id: another applicant's.
        typed = None if isinstance(value, float) else _typed(value, type_, f"entities.{entity}")
        if not isinstance(typed, str | int):
            raise UpdateRefused(f"entities.{entity} is {str(value)[:80]}: send {type_}")
        values.append(typed)
    return EntityKey(view.project, expected, tuple(values), view.entity_types)


def _typed(given: Any, type_: str, where: str) -> Value:
    if type_ == "INT64" and type(given) is int and -_INT64_BOUND <= given < _INT64_BOUND:
        return given
    of = type_.removesuffix("_LIST")
    if of != type_ and isinstance(given, list):
        # Each element by itself, for what makes bytes of text.
        given = [None if each is None else _typed(each, of, f"{where}[{at}]") for at, each in enumerate(given)]
    try:
        if type_ == "BYTES" and isinstance(given, str):
            return bytes_of(given)
        if type_ == "UNIX_TIMESTAMP" and isinstance(given, bytes):
            raise ValueError("bytes are not UNIX_TIMESTAMP")
        value = coerce(given, type_)
        if isinstance(value, str):
            value.encode()
    except (ValueError, OverflowError) as error:
        raise UpdateRefused(f"{where}: {error}") from error
    return value


def _event_time_ms(given: Any, now_ms: int) -> int:
    moment: int | None = None
    if isinstance(given, int) and not isinstance(given, bool):
        moment = given
    elif isinstance(given, str):
        try:
            parsed = datetime.fromisoformat(given)
            moment = round((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp() * 1_000)
        except (ValueError, OverflowError):
            moment = None
    if moment is None:
        raise UpdateRefused(f"event_time {str(given)[:80]!r}: send ISO 8601 text or epoch milliseconds")
    if not 0 <= moment <= EVENT_TIME_MS_MAX:
        raise UpdateRefused(f"event_time {str(given)[:80]!r} is not between the years 1970 and 9999: send milliseconds")
    if moment in _NO_MILLISECONDS and not isinstance(given, str):
        raise UpdateRefused(
            f"event_time {given} would be in early 1970, as epoch milliseconds: seconds are sent times 1000, a date as "
            "ISO 8601 text"
        )
    if moment - now_ms > EVENT_TIME_AHEAD_MS_MAX:
        ahead_s, allowed_s = (moment - now_ms) // 1_000, EVENT_TIME_AHEAD_MS_MAX // 1_000
        raise UpdateRefused(
            f"event_time {str(given)[:80]!r} is {ahead_s} s in the future, and {allowed_s} s are allowed: no later "
            "update would be taken before; correct the producer's clock, or the time's unit"
        )
    return moment
