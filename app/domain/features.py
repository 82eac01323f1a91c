"""Features: what a model version needs in, values with their status out.

Three steps, all pure: ``needs_of`` says what to fetch for a whole request (the union over its tasks, one entry an
entity), the caller fetches, ``resolve`` turns what came back into one task's inputs or into the problems that
prevent it. A value is coerced to its declared type or is an ERROR, never a guess. Missing, null and stale differ.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from app.domain.documents import FeatureContract, FeatureViewSpec, ValueType
from app.domain.errors import Code, Problem
from app.domain.requests import Request, is_finite

Value = str | int | float | bool | bytes | None

REQUEST_SOURCES: Final = ("inputs", "entities", "metadata")
EVENT_TIME_AHEAD_MS_MAX: Final = 300_000
"""How far an event time may lie ahead of our clock: machines without a good clock are seconds off, a few of them
minutes. A time beyond it is an error that would keep a value fresh, and newer ones out, until it has come."""
_INT_BOUNDS: Final = {"INT32": 2**31, "INT64": 2**63, "UNIX_TIMESTAMP": 2**63}


class FeatureStatus(StrEnum):
    """What is known of a value."""

    PRESENT = "PRESENT"
    NULL = "NULL"
    MISSING = "MISSING"
    STALE = "STALE"
    DEFAULTED = "DEFAULTED"
    ERROR = "ERROR"


@dataclass(frozen=True, slots=True)
class EntityKey:
    """A row of a view: Feast project, join keys sorted by name, and their typed values."""

    project: str
    names: tuple[str, ...]
    values: tuple[str | int, ...]
    types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ViewNeed:
    """What to fetch of one view for one entity; ``types`` are the declared types, in the features' order."""

    view: str
    key: EntityKey
    features: tuple[str, ...]
    types: tuple[ValueType, ...]


@dataclass(frozen=True, slots=True)
class Fetched:
    """One stored value: PRESENT, NULL, MISSING or ERROR (``reason`` says why), and its event time."""

    status: FeatureStatus
    value: Value = None
    event_time_ms: int | None = None
    reason: str | None = None


_MISSING: Final = Fetched(FeatureStatus.MISSING)


@dataclass(frozen=True, slots=True)
class FeatureValue:
    """One input as a model was given it, with where it came from: what the audit keeps."""

    ref: str
    status: FeatureStatus
    value: Value
    event_time_ms: int | None
    source: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class TaskInputs:
    """One task's inputs: values and types by column, in the declared order; problems where a contract is broken."""

    values: Mapping[str, Value]
    types: Mapping[str, str]
    features: tuple[FeatureValue, ...]
    problems: tuple[Problem, ...]


def coerce(value: Any, type_: str) -> Value:
    """``value`` as its declared type; None stays None.

    Raises:
        ValueError: it cannot be that type without guessing.

    >>> coerce(5000, "DOUBLE"), coerce(5000.0, "INT64"), coerce(True, "BOOL")
    (5000.0, 5000, True)
    """
    if value is None:
        return None
    match type_:
        case "BOOL" if isinstance(value, bool):
            return value
        case "STRING" if isinstance(value, str):
            return value
        case "BYTES" if isinstance(value, bytes):
            return value
        case "DOUBLE" | "FLOAT" if isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value):
            return float(value)
        case "INT32" | "INT64" | "UNIX_TIMESTAMP" if isinstance(value, int | float) and not isinstance(value, bool):
            bound = _INT_BOUNDS[type_]
            if is_finite(value) and value == int(value) and -bound <= value < bound:
                return int(value)
        case "UNIX_TIMESTAMP" if isinstance(value, str):
            return _epoch_seconds(value)
    raise ValueError(f"{str(value)[:80]!r} ({type(value).__name__}) is not {type_}")


def _epoch_seconds(text: str) -> int:
    moment = datetime.fromisoformat(text)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def inferred_type(value: Value) -> str:
    """The value type of a request's own value that declares none.

    >>> inferred_type(3), inferred_type(3.5), inferred_type("x")
    ('INT64', 'DOUBLE', 'STRING')
    """
    if isinstance(value, bool):
        return "BOOL"
    if isinstance(value, int):
        return "INT64"
    if isinstance(value, float):
        return "DOUBLE"
    return "BYTES" if isinstance(value, bytes) else "STRING"


@dataclass(frozen=True, slots=True)
class ViewWant:
    """What a set of model versions wants of one view, whoever it is about."""

    view: str
    features: tuple[str, ...]
    types: tuple[ValueType, ...]


def wants_of(contracts: Iterable[FeatureContract], views: Mapping[str, FeatureViewSpec]) -> tuple[ViewWant, ...]:
    """What ``contracts`` want of stored features, each view and each feature once."""
    wanted: dict[str, dict[str, None]] = {}
    for contract in contracts:
        if contract.source not in REQUEST_SOURCES:
            wanted.setdefault(contract.source, {})[contract.feature] = None
    return tuple(
        ViewWant(view, tuple(features), tuple(views[view].types[feature] for feature in features))
        for view, features in wanted.items()
    )


def needs_of(
    wants: Iterable[ViewWant], views: Mapping[str, FeatureViewSpec], request: Request
) -> tuple[tuple[ViewNeed, ...], tuple[Problem, ...]]:
    """What to fetch for ``request``; problems where it names no usable entity."""
    needs: list[ViewNeed] = []
    problems: list[Problem] = []
    for want in wants:
        key = _entity_key(views[want.view], request, problems)
        if key is not None:
            needs.append(ViewNeed(want.view, key, want.features, want.types))
    return tuple(needs), tuple(dict.fromkeys(problems))


def _entity_key(spec: FeatureViewSpec, request: Request, problems: list[Problem]) -> EntityKey | None:
    entities = spec.sorted_entities
    values: list[str | int] = []
    for entity in entities:
        given = request.entities.get(entity.name)
        if given is None:
            problems.append(
                Problem(Code.ENTITY_MISSING, f"entities.{entity.name} is missing: send it as {entity.type}")
            )
            continue
        try:
            if isinstance(given, float):
                raise ValueError(f"{given!r} (float) is not {entity.type}")
            value = coerce(given, entity.type)
        except ValueError as error:
            problems.append(Problem(Code.ENTITY_INVALID, f"entities.{entity.name}: {error}; send {entity.type}"))
            continue
        assert isinstance(value, str | int)  # noqa: S101 - entity types are STRING and INT, by their document
        values.append(value)
    if len(values) < len(entities):
        return None
    return EntityKey(
        spec.source.project,
        tuple(entity.name for entity in entities),
        tuple(values),
        tuple(entity.type for entity in entities),
    )


FetchedFeatures = Mapping[tuple[str, str], Fetched]
"""What a store answered, by (view, feature)."""


def resolve(
    contracts: Sequence[FeatureContract],
    views: Mapping[str, FeatureViewSpec],
    request: Request,
    fetched: FetchedFeatures,
    now_ms: int,
) -> TaskInputs:
    """One task's inputs under its contracts, at ``now_ms``."""
    values: dict[str, Value] = {}
    types: dict[str, str] = {}
    features: list[FeatureValue] = []
    problems: list[Problem] = []
    for contract in contracts:
        source = contract.source
        if source in REQUEST_SOURCES:
            found, type_, origin = _from_request(contract, request), contract.type, "request"
        else:
            found = within_ttl(fetched.get((source, contract.feature), _MISSING), views[source].ttl, now_ms)
            type_, origin = views[source].types[contract.feature], "redis"
        if found.status is not FeatureStatus.PRESENT or contract.max_age is not None:
            found, broken = _under_contract(contract, found, now_ms)
            if broken is not None:
                problems.append(broken)
        column, value = contract.column, found.value
        values[column] = value
        types[column] = type_ or inferred_type(value)
        features.append(FeatureValue(contract.ref, found.status, value, found.event_time_ms, origin, found.reason))
    return TaskInputs(values, types, tuple(features), tuple(problems))


def declared_type(contract: FeatureContract, views: Mapping[str, FeatureViewSpec]) -> str | None:
    """The value type that a view, or else the contract, declares; None where the value itself tells."""
    if contract.source in REQUEST_SOURCES:
        return contract.type
    return views[contract.source].types[contract.feature]


def recorded(
    contracts: Sequence[FeatureContract], views: Mapping[str, FeatureViewSpec], features: Sequence[FeatureValue]
) -> TaskInputs:
    """A task's inputs as they were resolved before: what another worker had found, not what is there now."""
    values = {contract.column: feature.value for contract, feature in zip(contracts, features, strict=True)}
    types = {c.column: declared_type(c, views) or inferred_type(values[c.column]) for c in contracts}
    return TaskInputs(values, types, tuple(features), ())


def _from_request(contract: FeatureContract, request: Request) -> Fetched:
    section: Mapping[str, Any] = getattr(request, contract.source)
    if contract.feature not in section:
        return _MISSING
    given = section[contract.feature]
    if given is None:
        return Fetched(FeatureStatus.NULL)
    try:
        value = coerce(given, contract.type or inferred_type(given))
    except ValueError as error:
        return Fetched(FeatureStatus.ERROR, reason=str(error))
    return Fetched(FeatureStatus.PRESENT, value)


_BROKEN: Final = {
    FeatureStatus.MISSING: (Code.FEATURE_MISSING, "is missing"),
    FeatureStatus.NULL: (Code.FEATURE_MISSING, "is null"),
}
_TOO_OLD: Final = "is older than its maxAge"
_PAST_TTL: Final = "is past its view's ttl"
_AHEAD: Final = "has an event time in the future, so that its age is not known"


def within_ttl(found: Fetched, ttl_ms: int | None, now_ms: int) -> Fetched:
    """What a store answered, STALE where the view's ttl is over: no contract takes it for a value."""
    if ttl_ms is None or found.event_time_ms is None or now_ms - found.event_time_ms <= ttl_ms:
        return found
    if found.status not in (FeatureStatus.PRESENT, FeatureStatus.NULL):
        return found
    return Fetched(FeatureStatus.STALE, found.value, found.event_time_ms, _PAST_TTL)


def _under_contract(contract: FeatureContract, found: Fetched, now_ms: int) -> tuple[Fetched, Problem | None]:
    if found.status is FeatureStatus.PRESENT and contract.max_age is not None and found.event_time_ms is not None:
        # Within what clocks differ by, a time ahead of ours is an age of 0.
        age_ms = now_ms - found.event_time_ms
        if age_ms > contract.max_age or age_ms < -EVENT_TIME_AHEAD_MS_MAX:
            why = _TOO_OLD if age_ms > 0 else _AHEAD
            found = Fetched(FeatureStatus.STALE, found.value, found.event_time_ms, why)
    if found.status is FeatureStatus.PRESENT:
        return found, None
    if contract.required:
        if found.status is FeatureStatus.ERROR:
            code = Code.FEATURES_UNAVAILABLE if found.reason == UNAVAILABLE else Code.FEATURE_INVALID
            said = found.reason or "cannot be used"
        elif found.status is FeatureStatus.STALE:
            code, said = Code.FEATURE_STALE, found.reason or _TOO_OLD
        else:
            code, said = _BROKEN[found.status]
        return found, Problem(code, f"required feature {contract.ref} {said}", feature=contract.ref)
    reason = f"{found.status}" + (f": {found.reason}" if found.reason else "")
    return Fetched(FeatureStatus.DEFAULTED, contract.default, found.event_time_ms, reason), None


UNAVAILABLE: Final = "could not be fetched: the feature store does not answer"
"""The reason of values whose store was away: a failure of ours, not a fault of the request."""


def unavailable(needs: Iterable[ViewNeed]) -> dict[tuple[str, str], Fetched]:
    """What is known of ``needs`` while their store does not answer."""
    answer = Fetched(FeatureStatus.ERROR, reason=UNAVAILABLE)
    return {(need.view, feature): answer for need in needs for feature in need.features}
