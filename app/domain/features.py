"""Features: what a model version needs in, values with their status out.

Three steps, all pure: ``needs_of`` says what to fetch for a whole request (the union over its tasks, one entry an
entity), the caller fetches, ``resolve`` turns what came back into one task's inputs or into the problems that
prevent it. A value is coerced to its declared type or is an ERROR, never a guess. Missing, null and stale differ.
"""

import base64
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, NamedTuple

from app.domain.document_parts import ValueType
from app.domain.errors import Code, Problem
from app.domain.requests import Request, is_finite
from app.domain.version_documents import FeatureContract
from app.domain.view_documents import FeatureViewSpec, HttpSource

Element = str | int | float | bool | bytes | None
Value = Element | tuple[Element, ...]
"""What a feature can be: a scalar, null, or a list of scalars."""

REQUEST_SOURCES: Final = ("inputs", "entities", "metadata")
EVENT_TIME_AHEAD_MS_MAX: Final = 300_000
"""How far an event time may lie ahead of our clock: machines without a good clock are seconds off, a few of them
minutes. A time beyond it is an error that would keep a value fresh, and newer ones out, until it has come."""
LIST_LENGTH_MAX: Final = 10_000
"""Elements of one list: an embedding has hundreds, and what is longer would fill a decision's record by itself."""
_INT_BOUNDS: Final = {"INT32": 2**31, "INT64": 2**63, "UNIX_TIMESTAMP": 2**63}
_SECONDS: Final = range(-62_135_596_800, 253_402_300_800)
"""Of the years 1 to 9999, which is all that ISO 8601 text, Python and protobuf can say of a time."""
_EXACT_BELOW: Final = 2**53
"""From here on a float stands for several whole numbers, and which of them was meant is not known."""
_FLOAT: Final = struct.Struct("<f")
_LIST: Final = "_LIST"
_NULLABLE_ELEMENTS: Final = frozenset({"DOUBLE", "FLOAT", "UNIX_TIMESTAMP"})
"""Of which Feast keeps a null within a list apart from every value: as NaN, or as the smallest int64."""


class FeatureStatus(StrEnum):
    """What is known of a value."""

    PRESENT = "PRESENT"
    NULL = "NULL"
    MISSING = "MISSING"
    STALE = "STALE"
    DEFAULTED = "DEFAULTED"
    COMPUTED = "COMPUTED"
    ERROR = "ERROR"


FeatureRef = tuple[str, str]
"""A feature's view, or a section of the request, and its name there."""


class EntityKey(NamedTuple):
    """A row of a view: Feast project, join keys sorted by name, and their typed values."""

    project: str
    names: tuple[str, ...]
    values: tuple[str | int, ...]
    types: tuple[str, ...]


class ViewNeed(NamedTuple):
    """What to fetch of one view for one entity; ``types`` are the declared types, in the features' order.

    ``http``: the feature server to ask, where the view has one; ``others`` are then the view's features that are not
    asked for, and ``ttl_ms`` is the view's ttl. ``max_age_ms``: the strictest age that whoever wants them allows.
    """

    view: str
    key: EntityKey
    features: tuple[str, ...]
    types: tuple[ValueType, ...]
    http: HttpSource | None = None
    others: tuple[str, ...] = ()
    max_age_ms: int | None = None
    ttl_ms: int | None = None


class Fetched(NamedTuple):
    """One value as it was found, before any contract: PRESENT, COMPUTED, NULL, MISSING, STALE (where its source says
    so itself) or ERROR (``reason`` says why), and its event time.

    ``source`` is where it was found: request, redis, cache, http or onDemand. Of a value out of a cache, ``fetched_ms``
    is when the store gave it. One that is ``overdue`` was kept for the case that the store does not answer, and is good
    only for contracts that bound its age themselves. One that is ``undated`` was computed of a value without an event
    time, so that its own age is not known, whatever time its other ingredients give it.

    A tuple, because one is made of each value of each request, at a fifth of a frozen dataclass's cost.
    """

    status: FeatureStatus
    value: Value = None
    event_time_ms: int | None = None
    reason: str | None = None
    source: str = "redis"
    fetched_ms: int | None = None
    overdue: bool = False
    undated: bool = False


FROM_REQUEST: Final = "request"
FROM_HTTP: Final = "http"
_MISSING: Final = Fetched(FeatureStatus.MISSING)
_NOT_SENT: Final = Fetched(FeatureStatus.MISSING, source=FROM_REQUEST)
_SENT_NULL: Final = Fetched(FeatureStatus.NULL, source=FROM_REQUEST)
_SOUND: Final = (FeatureStatus.PRESENT, FeatureStatus.COMPUTED)
_STRAYED: Final = (FeatureStatus.STALE, FeatureStatus.ERROR)


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
    """One task's inputs: values and types by column, in the declared order; problems where a contract is broken.

    ``referrals`` are the problems of which the contract says that a person must decide.
    """

    values: Mapping[str, Value]
    types: Mapping[str, str]
    features: tuple[FeatureValue, ...]
    problems: tuple[Problem, ...]
    referrals: tuple[Problem, ...] = ()

    @property
    def obstacle(self) -> Problem | None:
        """Why the task cannot be run with these; None where it can."""
        return next(iter(self.problems or self.referrals), None)


def coerce(value: Any, type_: str) -> Value:
    """``value`` as its declared type; None stays None. A FLOAT has 32 bits, as in Feast, and is rounded to them.

    Raises:
        ValueError: it cannot be that type without guessing.

    >>> coerce(5000, "DOUBLE"), coerce(5000.0, "INT64"), coerce(True, "BOOL")
    (5000.0, 5000, True)
    >>> coerce([1, 2.0], "INT64_LIST")
    (1, 2)
    """
    if type_.endswith(_LIST):
        return None if value is None else _coerced_list(value, type_)
    return coerce_element(value, type_)


def coerce_written(value: Any, type_: str) -> Value:
    """``coerce`` of what JSON, YAML or CEL say: they have no bytes, so text stands for them, in base64.

    >>> coerce_written("YWI=", "BYTES"), coerce_written(["YQ==", ""], "BYTES_LIST"), coerce_written(5, "DOUBLE")
    (b'ab', (b'a', b''), 5.0)
    """
    if type_ == "BYTES" and isinstance(value, str):
        return bytes_of(value)
    if type_ == "BYTES_LIST" and isinstance(value, list | tuple):
        value = [bytes_of(each) if isinstance(each, str) else each for each in value]
    return coerce(value, type_)


def bytes_of(text: str) -> bytes:
    """What base64 text stands for; ValueError where it is none, white space and missing padding among that."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"not base64, the text form of BYTES: {error}") from error


@lru_cache(maxsize=1_024)
def _default_of(default: Value, type_: str) -> Value:
    return coerce_written(default, type_)


def coerce_element(value: Any, type_: str) -> Element:
    """``coerce`` for the scalar types."""
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
            return _floating(value, type_)
        case "INT32" | "INT64" | "UNIX_TIMESTAMP" if isinstance(value, int | float) and not isinstance(value, bool):
            bound = _INT_BOUNDS[type_]
            if is_finite(value) and value == int(value) and -bound <= value < bound:
                if isinstance(value, float) and abs(value) >= _EXACT_BELOW:
                    raise ValueError(
                        f"{value!r} (float) may be a rounded number: send it as a whole one, without a point"
                    )
                return int(value) if type_ != "UNIX_TIMESTAMP" else _within_years(int(value))
        case "UNIX_TIMESTAMP" if isinstance(value, str):
            return _epoch_seconds(value)
    raise ValueError(f"{str(value)[:80]!r} ({type(value).__name__}) is not {type_}")


def _coerced_list(value: Any, type_: str) -> tuple[Element, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{str(value)[:80]!r} ({type(value).__name__}) is not {type_}")
    if len(value) > LIST_LENGTH_MAX:
        raise ValueError(f"a list of {len(value)} elements: {LIST_LENGTH_MAX} are allowed")
    of = type_.removesuffix(_LIST)
    if None in value and of not in _NULLABLE_ELEMENTS:
        raise ValueError(f"null within a list cannot be told from a value of {type_}: leave it out")
    return tuple(coerce_element(element, of) for element in value)


def _floating(value: float, type_: str) -> float:
    try:
        number = float(value)
        return number if type_ == "DOUBLE" else float(_FLOAT.unpack(_FLOAT.pack(number))[0])
    except OverflowError:
        raise ValueError(f"{str(value)[:80]} is beyond the range of {type_}") from None


def _epoch_seconds(text: str) -> int:
    if text.strip().isdecimal():
        # ISO 8601 takes some for a date, and people write the seconds themselves.
        raise ValueError(
            f"{text[:80]!r} may be a date or a number of seconds: send {_dashed(text)}, or a number of epoch seconds"
        )
    moment = datetime.fromisoformat(text)
    if moment.microsecond:
        raise ValueError(f"{text[:80]!r} has a fraction of a second, and UNIX_TIMESTAMP is in whole ones")
    return _within_years(int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()))


def _dashed(digits: str) -> str:
    """How the date of eight digits is written without doubt; of others, an example."""
    return f"{digits[:4]}-{digits[4:6]}-{digits[6:]}" if len(digits) == 8 else "a date as 2026-01-31"


def _within_years(seconds: int) -> int:
    if seconds not in _SECONDS:
        # From 1978 on milliseconds lie past the year 9999, and what is sent finer always does.
        hint = " (milliseconds?)" if seconds > 0 else ""
        raise ValueError(f"{seconds} is outside the years 1 to 9999: UNIX_TIMESTAMP is in epoch seconds{hint}")
    return seconds


def inferred_type(value: Value | list[Any]) -> str:
    """The value type of a request's own value that declares none.

    >>> inferred_type(3), inferred_type(3.5), inferred_type("x"), inferred_type((1, 2.5))
    ('INT64', 'DOUBLE', 'STRING', 'DOUBLE_LIST')
    """
    if isinstance(value, tuple | list):
        # A null has no type of its own, and whole numbers among others are doubles.
        found = {inferred_type(element) for element in value if element is not None}
        if found == {"INT64", "DOUBLE"}:
            return "DOUBLE_LIST"
        return f"{found.pop()}_LIST" if len(found) == 1 else "STRING_LIST"
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
    max_age_ms: int | None = None


def wants_of(
    contracts: Iterable[FeatureContract],
    views: Mapping[str, FeatureViewSpec],
    ingredients: Mapping[FeatureRef, int | None] | None = None,
) -> tuple[ViewWant, ...]:
    """What ``contracts`` want of stored features, each view and each feature once.

    ``ingredients`` are wanted besides, each with its maximum age; what is computed on demand is not stored.
    """
    wanted: dict[str, dict[str, None]] = {}
    ages: dict[str, int] = {}

    def want(view: str, feature: str, max_age_ms: int | None) -> None:
        if view in REQUEST_SOURCES or views[view].on_demand is not None:
            return
        wanted.setdefault(view, {})[feature] = None
        if max_age_ms is not None:
            ages[view] = min(max_age_ms, ages.get(view, max_age_ms))

    for contract in contracts:
        want(contract.source, contract.feature, contract.max_age)
    for (view, feature), max_age_ms in (ingredients or {}).items():
        want(view, feature, max_age_ms)
    return tuple(
        ViewWant(view, tuple(features), tuple(views[view].types[feature] for feature in features), ages.get(view))
        for view, features in wanted.items()
    )


def needs_of(
    wants: Iterable[ViewWant], views: Mapping[str, FeatureViewSpec], request: Request
) -> tuple[tuple[ViewNeed, ...], tuple[Problem, ...]]:
    """What to fetch for ``request``; problems where it names no usable entity."""
    needs: list[ViewNeed] = []
    problems: list[Problem] = []
    for want in wants:
        spec = views[want.view]
        key = _entity_key(spec, request, problems)
        if key is None:
            continue
        if isinstance(spec.source, HttpSource):
            others = tuple(feature for feature in spec.types if feature not in want.features)
            needs.append(
                ViewNeed(want.view, key, want.features, want.types, spec.source, others, want.max_age_ms, spec.ttl)
            )
        else:
            needs.append(ViewNeed(want.view, key, want.features, want.types, max_age_ms=want.max_age_ms))
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
        spec.project,
        tuple(entity.name for entity in entities),
        tuple(values),
        tuple(entity.type for entity in entities),
    )


FetchedFeatures = Mapping[tuple[str, str], Fetched]
"""What a store answered, by (view, feature)."""


@lru_cache(maxsize=4096)
def keys_of(view: str, features: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Under what a view's features stand in ``FetchedFeatures``: made once, for each request asks the same."""
    return tuple((view, feature) for feature in features)


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
    referrals: list[Problem] = []
    for contract in contracts:
        source = contract.source
        if source in REQUEST_SOURCES:
            found, type_ = _from_request(contract, request), contract.type
        else:
            found = fetched.get((source, contract.feature), _MISSING)
            if found.overdue and contract.max_age is None:
                found = _UNAVAILABLE._replace(source=found.source)
            found = within_ttl(found, views[source].ttl, now_ms)
            type_ = views[source].types[contract.feature]
        if found.status is not FeatureStatus.PRESENT or contract.max_age is not None:
            found, broken = _under_contract(contract, found, type_, now_ms)
            if broken is not None:
                (referrals if contract.violation == "refer" else problems).append(broken)
        column, value = contract.column, found.value
        values[column] = value
        types[column] = type_ or inferred_type(value)
        features.append(
            FeatureValue(contract.ref, found.status, value, found.event_time_ms, found.source, found.reason)
        )
    return TaskInputs(values, types, tuple(features), tuple(problems), tuple(referrals))


def declared_type(contract: FeatureContract, views: Mapping[str, FeatureViewSpec]) -> str | None:
    """The value type that a view, or else the contract, declares; None where the value itself tells."""
    if contract.source in REQUEST_SOURCES:
        return contract.type
    return views[contract.source].types[contract.feature]


def recorded(
    contracts: Sequence[FeatureContract], views: Mapping[str, FeatureViewSpec], features: Sequence[FeatureValue]
) -> TaskInputs:
    """A task's inputs as they were resolved before: what another worker had found, not what is there now.

    Contracts that were broken then are still.
    """
    values = {contract.column: feature.value for contract, feature in zip(contracts, features, strict=True)}
    types = {c.column: declared_type(c, views) or inferred_type(values[c.column]) for c in contracts}
    problems: list[Problem] = []
    referrals: list[Problem] = []
    for contract, feature in zip(contracts, features, strict=True):
        if feature.status not in _SOUND and feature.status is not FeatureStatus.DEFAULTED:
            broken = _broken(contract, feature.status, feature.reason)
            (referrals if contract.violation == "refer" else problems).append(broken)
    return TaskInputs(values, types, tuple(features), tuple(problems), tuple(referrals))


def _from_request(contract: FeatureContract, request: Request) -> Fetched:
    section: Mapping[str, Any] = getattr(request, contract.source)
    if contract.feature not in section:
        return _NOT_SENT
    given = section[contract.feature]
    if given is None:
        return _SENT_NULL
    try:
        value = coerce_written(given, contract.type or inferred_type(given))
    except ValueError as error:
        return Fetched(FeatureStatus.ERROR, reason=str(error), source=FROM_REQUEST)
    return Fetched(FeatureStatus.PRESENT, value, source=FROM_REQUEST)


_BROKEN: Final[Mapping[FeatureStatus, tuple[Code, str]]] = {
    FeatureStatus.MISSING: (Code.FEATURE_MISSING, "is missing"),
    FeatureStatus.NULL: (Code.FEATURE_MISSING, "is null"),
}
_TOO_OLD: Final = "is older than its maxAge"
_AGE_UNKNOWN: Final = "has no event time, so that its age is not known, and its maxAge bounds it"
_MADE_OF_UNDATED: Final = (
    "is computed of a value that has no event time, so that its age is not known, and its maxAge bounds it"
)
_PAST_TTL: Final = "is past its view's ttl"
_AHEAD: Final = "has an event time in the future, so that its age is not known"


def within_ttl(found: Fetched, ttl_ms: int | None, now_ms: int) -> Fetched:
    """What a store answered, STALE where the view's ttl is over: no contract takes it for a value."""
    if ttl_ms is None or found.event_time_ms is None or now_ms - found.event_time_ms <= ttl_ms:
        return found
    if found.status not in (FeatureStatus.PRESENT, FeatureStatus.NULL):
        return found
    return Fetched(FeatureStatus.STALE, found.value, found.event_time_ms, _PAST_TTL, found.source)


def _under_contract(
    contract: FeatureContract, found: Fetched, type_: str | None, now_ms: int
) -> tuple[Fetched, Problem | None]:
    if found.status in _SOUND and contract.max_age is not None:
        why = too_old(found, contract.max_age, now_ms)
        if why is not None:
            found = Fetched(FeatureStatus.STALE, found.value, found.event_time_ms, why, found.source)
    if found.status in _SOUND:
        return found, None
    if contract.violation != "default" and (contract.required or found.status in _STRAYED):
        return found, _broken(contract, found.status, found.reason)
    reason = f"{found.status}" + (f": {found.reason}" if found.reason else "")
    # As its declared type, like every other value: documents write times and bytes as text.
    default = contract.default if type_ is None else _default_of(contract.default, type_)
    return Fetched(FeatureStatus.DEFAULTED, default, found.event_time_ms, reason, found.source), None


def too_old(found: Fetched, max_age_ms: int, now_ms: int) -> str | None:
    """Why a value may not be used under a maximum age; None where it may."""
    if found.undated:
        return _MADE_OF_UNDATED
    if found.event_time_ms is None:
        # What a request brings, and what is computed of that alone, is of now.
        of_now = found.source == FROM_REQUEST or found.status is FeatureStatus.COMPUTED
        return None if of_now else _AGE_UNKNOWN
    age_ms = now_ms - found.event_time_ms
    if age_ms > max_age_ms:
        return _TOO_OLD
    # Within what clocks differ by, a time ahead of ours is an age of 0.
    return _AHEAD if age_ms < -EVENT_TIME_AHEAD_MS_MAX else None


def _broken(contract: FeatureContract, status: FeatureStatus, reason: str | None) -> Problem:
    if status is FeatureStatus.ERROR:
        code = Code.FEATURES_UNAVAILABLE if is_away(reason) else Code.FEATURE_INVALID
        said = reason or "cannot be used"
    elif status is FeatureStatus.STALE:
        code, said = Code.FEATURE_STALE, reason or _TOO_OLD
    else:
        code, said = _BROKEN[status]
        said = f"{said}: {reason}" if reason else said
    named = f"{'required ' if contract.required else ''}feature {contract.ref}"
    return Problem(code, f"{named} {said}", feature=contract.ref)


def refers(contracts: Iterable[FeatureContract], problem: Problem | None) -> bool:
    """Whether ``problem`` is a broken contract that leaves the decision to a person."""
    return problem is not None and any(
        contract.ref == problem.feature and contract.violation == "refer" for contract in contracts
    )


_NOT_FETCHED: Final = "could not be fetched: "
UNAVAILABLE: Final = f"{_NOT_FETCHED}its source does not answer in time"
"""The reason of values whose store or feature server was away: a failure of ours, not a fault of the request."""
_UNAVAILABLE: Final = Fetched(FeatureStatus.ERROR, reason=UNAVAILABLE)


def is_away(reason: str | None) -> bool:
    """Whether an ERROR's reason is that its source failed, in whatever way: the value may be there all the same."""
    return reason is not None and reason.startswith(_NOT_FETCHED)


def unavailable(needs: Iterable[ViewNeed], why: str | None = None) -> dict[tuple[str, str], Fetched]:
    """What is known of ``needs`` where their source failed; ``why``: other than by its silence."""
    reason = UNAVAILABLE if why is None else f"{_NOT_FETCHED}{why}"
    stored = Fetched(FeatureStatus.ERROR, reason=reason)
    served = Fetched(FeatureStatus.ERROR, reason=reason, source=FROM_HTTP)
    return {
        (need.view, feature): stored if need.http is None else served for need in needs for feature in need.features
    }
