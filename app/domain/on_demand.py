"""On-demand features: what is computed for a request from the request itself and from other features.

A view's ``onDemand`` holds a CEL expression or the name of a Python function for each of its features.
``compile_views`` reads them all together: each becomes a ``Computation`` that knows its ingredients, in an order in
which every one comes after what it is made of; circles are faults, told step by step. ``compute`` then adds their
values to what was fetched.

Nothing is guessed: an ingredient that is missing or null makes what is computed of it MISSING, one that is an error
makes it an ERROR, and so does a value that cannot be the declared type; each with its reason. What is computed is as
old as the oldest of its ingredients, and of no known age where one of them has no event time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from app.domain.document_parts import ValueType
from app.domain.errors import ExpressionFailed, raised
from app.domain.expressions import Activation, Expression, compile_expression
from app.domain.features import (
    EVENT_TIME_AHEAD_MS_MAX,
    FROM_REQUEST,
    REQUEST_SOURCES,
    UNAVAILABLE,
    FeatureRef,
    FeatureStatus,
    Fetched,
    FetchedFeatures,
    Value,
    coerce,
    coerce_written,
    is_away,
    within_ttl,
)
from app.domain.requests import Request
from app.domain.view_documents import ComputedBy, FeatureViewSpec

SOURCE: Final = "onDemand"
FeatureFunction = Callable[[Mapping[str, Value]], Value]
"""What ``{function: NAME}`` names: its declared ``inputs`` by ref in, the feature's value out; None is null."""

_REQUEST_ROOTS: Final = ("path", *REQUEST_SOURCES)
_SOUND: Final = (FeatureStatus.PRESENT, FeatureStatus.COMPUTED)
_SAMPLES: Final[Mapping[str, Value]] = {
    "BOOL": True,
    "BYTES": b"",
    "DOUBLE": 0.5,
    "FLOAT": 0.5,
    "INT32": 1,
    "INT64": 1,
    "STRING": "",
    "UNIX_TIMESTAMP": 1,
}


@dataclass(frozen=True, slots=True)
class Ingredient:
    """What a computation reads: a feature of a view, or a member of the request. ``optional``: it asks itself whether
    the value is there.
    """

    source: str
    name: str
    optional: bool = False

    @property
    def ref(self) -> FeatureRef:
        """By which it is found among features."""
        return self.source, self.name

    def __str__(self) -> str:
        return f"{self.source}.{self.name}"


@dataclass(frozen=True, slots=True)
class Computation:
    """One on-demand feature, compiled: an expression or a function's name, and what it is made of.

    ``roots`` are the views' names as the expression writes them, where ``-`` is ``_``.
    """

    view: str
    feature: str
    type: ValueType
    expression: Expression | None
    function: str | None
    ingredients: tuple[Ingredient, ...]

    @property
    def ref(self) -> FeatureRef:
        """By which it is found among features."""
        return self.view, self.feature

    def __str__(self) -> str:
        return f"{self.view}.{self.feature}"

    @property
    def text(self) -> str:
        """How it is computed, as people wrote it."""
        return self.expression.text if self.expression is not None else f"function {self.function}"


Computations = Mapping[FeatureRef, Computation]
"""All on-demand features, each after those that it is made of."""


@dataclass(frozen=True, slots=True)
class ViewFault:
    """What is wrong with a view's ``onDemand``."""

    view: str
    field: str
    message: str


# --- compiling --------------------------------------------------------------------------------------------------------


def compile_views(views: Mapping[str, FeatureViewSpec]) -> tuple[Computations, tuple[ViewFault, ...]]:
    """The computations of all of ``views``, in order, and everything wrong with them."""
    faults: list[ViewFault] = []
    found: dict[FeatureRef, Computation] = {}
    # A name with a dot in it cannot be written in a ref either.
    roots = {_root(name): name for name in views if "." not in name and name not in _REQUEST_ROOTS}
    for name, spec in views.items():
        faults += (ViewFault(name, field, message) for field, message in _cover_faults(spec))
        for feature, written in (spec.on_demand or {}).items():
            type_ = spec.types.get(feature)
            if type_ is None:
                continue  # told by _cover_faults
            try:
                made = _compiled(name, feature, type_, written, roots)
            except ExpressionFailed as error:
                faults.append(ViewFault(name, f"onDemand.{feature}", str(error)))
                continue
            found[made.ref] = made
            faults += (ViewFault(name, f"onDemand.{feature}", said) for said in _ingredient_faults(made, views))
    ordered, circle = _ordered(found)
    if circle:
        way = " -> ".join(map(str, circle))
        faults.append(ViewFault(circle[0].view, f"onDemand.{circle[0].feature}", f"is made of itself: {way}"))
    if not faults:
        faults += _type_faults(ordered, views)
    return ordered, tuple(faults)


def _root(view: str) -> str:
    return view.replace("-", "_")


def _cover_faults(spec: FeatureViewSpec) -> Iterator[tuple[str, str]]:
    if spec.on_demand is None:
        return
    named = {feature.name for feature in spec.features}
    for feature in spec.on_demand:
        if feature not in named:
            yield f"onDemand.{feature}", "is not among the view's features: declare it there, with its type"
    for feature in named - spec.on_demand.keys():
        yield f"features[{feature}]", "has nothing under onDemand that computes it"


def _compiled(
    view: str,
    feature: str,
    type_: ValueType,
    written: str | ComputedBy,
    roots: Mapping[str, str],
) -> Computation:
    if isinstance(written, ComputedBy):
        parts = (ref.partition(".") for ref in written.inputs)
        ingredients = tuple(Ingredient(source, name) for source, _, name in parts)
        return Computation(view, feature, type_, None, written.function, ingredients)
    expression = compile_expression(written, (*_REQUEST_ROOTS, *roots))
    found: dict[FeatureRef, Ingredient] = {}
    for root in expression.roots:
        own = expression.reach(root)
        if root == "path":
            continue
        source = root if root in REQUEST_SOURCES else roots[root]
        if own is None:
            raise ExpressionFailed(f"{root} as a whole, or by a computed key: name each value as {root}.NAME")
        asked: set[str] = set()
        read: set[str] = set()
        for path, tested in expression.members(root):
            (asked if tested and len(path) == 1 else read).add(path[0])
        if source == "metadata" and "headers" in own:
            raise ExpressionFailed("metadata.headers is not for features: let callers send the value as an input")
        for name in own:
            # Asked for by has(), or by "name" in root, it may be absent; the expression says what then.
            optional = name in asked or name not in read
            found[source, name] = Ingredient(source, name, optional)
    return Computation(view, feature, type_, expression, None, tuple(found.values()))


def _ingredient_faults(made: Computation, views: Mapping[str, FeatureViewSpec]) -> Iterator[str]:
    for each in made.ingredients:
        if each.source in REQUEST_SOURCES:
            continue
        spec = views.get(each.source)
        if spec is None:
            yield f"there is no FeatureView {each.source}"
        elif each.name not in spec.types:
            have = ", ".join(spec.types)
            yield f"FeatureView {each.source} has no feature {each.name} (there is: {have})"


def _ordered(found: Mapping[FeatureRef, Computation]) -> tuple[Computations, tuple[Computation, ...]]:
    """The computations, each after its ingredients (depth-first search), or the first circle among them."""
    ordered: dict[FeatureRef, Computation] = {}
    for start in found.values():
        way: list[Computation] = []
        waiting = [iter((start,))]
        while waiting:
            following = next(waiting[-1], None)
            if following is None:
                waiting.pop()
                if way:
                    done = way.pop()
                    ordered[done.ref] = done
            elif following in way:
                return {}, (*way[way.index(following) :], following)
            elif following.ref not in ordered:
                way.append(following)
                waiting.append(iter([found[each.ref] for each in following.ingredients if each.ref in found]))
    return ordered, ()


def _type_faults(computations: Computations, views: Mapping[str, FeatureViewSpec]) -> Iterator[ViewFault]:
    """Expressions whose types cannot fit, as far as features' declared types prove it: a request's own have none."""
    for each in computations.values():
        if each.expression is None or any(source.source in REQUEST_SOURCES for source in each.ingredients):
            continue
        sample: dict[FeatureRef, Fetched] = {
            ingredient.ref: Fetched(FeatureStatus.PRESENT, _sample(views[ingredient.source].types[ingredient.name]))
            for ingredient in each.ingredients
        }
        field = f"onDemand.{each.feature}"
        activation = _activation(each.expression, sample, "/", {})
        said = each.expression.mistyped(activation)
        if said is not None:
            yield ViewFault(each.view, field, said)
            continue
        try:
            value = each.expression.evaluate(activation)
        except ExpressionFailed:
            continue
        if value is not None and _kind(value) != _kind(_sample(each.type)):
            yield ViewFault(each.view, field, f"gives {type(value).__name__}, and the feature is {each.type}")


def _sample(type_: str) -> Value:
    of = type_.removesuffix("_LIST")
    element = _SAMPLES[of]
    assert not isinstance(element, tuple)  # noqa: S101 - samples are scalars
    return element if of == type_ else (element,)


def _kind(value: object) -> str:
    if isinstance(value, bool | bytes | str):
        return type(value).__name__
    if isinstance(value, int | float | datetime):
        return "number"
    return "list" if isinstance(value, list | tuple) else type(value).__name__


# --- what is needed ---------------------------------------------------------------------------------------------------


def closure(refs: Iterable[FeatureRef], computations: Computations) -> tuple[Computation, ...]:
    """The computations that ``refs`` need, in order."""
    wanted: set[FeatureRef] = set()
    waiting = list(refs)
    while waiting:
        made = computations.get(waiting.pop())
        if made is not None and made.ref not in wanted:
            wanted.add(made.ref)
            waiting += (each.ref for each in made.ingredients)
    return tuple(each for ref, each in computations.items() if ref in wanted) if wanted else ()


def functions_of(computations: Iterable[Computation]) -> frozenset[str]:
    """The functions that are called by name."""
    return frozenset(each.function for each in computations if each.function is not None)


# --- computing --------------------------------------------------------------------------------------------------------


def compute(
    computations: Sequence[Computation],
    request: Request,
    fetched: FetchedFeatures,
    functions: Mapping[str, FeatureFunction],
    views: Mapping[str, FeatureViewSpec],
    now_ms: int,
) -> FetchedFeatures:
    """``fetched``, and what ``computations`` make of it and of ``request``; what is past its view's ttl is no value."""
    if not computations:
        return fetched
    known: dict[FeatureRef, Fetched] = dict(fetched)
    for each in computations:
        known[each.ref] = _computed(each, request, known, functions, views, now_ms)._replace(source=SOURCE)
    return known


def _computed(
    made: Computation,
    request: Request,
    known: Mapping[FeatureRef, Fetched],
    functions: Mapping[str, FeatureFunction],
    views: Mapping[str, FeatureViewSpec],
    now_ms: int,
) -> Fetched:
    usable: dict[FeatureRef, Fetched] = {}
    for each in made.ingredients:
        if each.source in REQUEST_SOURCES:
            found = _from_request(each, request)
        else:
            found = within_ttl(known.get(each.ref, _MISSING), views[each.source].ttl, now_ms)
            if found.overdue:
                # Whose age nobody bounds here: the contract is about what is computed of it.
                found = Fetched(FeatureStatus.ERROR, None, found.event_time_ms, UNAVAILABLE)
        if found.status in _SOUND:
            usable[each.ref] = found
        elif found.status in (FeatureStatus.ERROR, FeatureStatus.STALE):
            return _unusable(each, found)
        elif not each.optional:
            time_ms = _oldest((*usable.values(), found), now_ms)
            return Fetched(FeatureStatus.MISSING, None, time_ms, f"its ingredient {each} is {found.status.lower()}")
    time_ms = _oldest(usable.values(), now_ms)
    try:
        value = _plain(_evaluated(made, request, usable, functions))
        # An expression hands on what a request's JSON says; a function has bytes of its own.
        value = coerce_written(value, made.type) if made.expression is not None else coerce(value, made.type)
    except (ExpressionFailed, ValueError, OverflowError) as error:
        return Fetched(FeatureStatus.ERROR, None, time_ms, f"cannot be computed: {error}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a function's value is foreign code: what it says of itself may raise
        return Fetched(FeatureStatus.ERROR, None, time_ms, f"cannot be computed: its value raised {raised(error)}")
    status = FeatureStatus.NULL if value is None else FeatureStatus.COMPUTED
    return Fetched(status, value, time_ms, undated=any(map(_is_undated, usable.values())))


_MISSING: Final = Fetched(FeatureStatus.MISSING)


def _from_request(each: Ingredient, request: Request) -> Fetched:
    section: Mapping[str, Any] = getattr(request, each.source)
    if each.name not in section:
        return _MISSING
    value = section[each.name]
    if value is None:
        return Fetched(FeatureStatus.NULL, source=FROM_REQUEST)
    return Fetched(FeatureStatus.PRESENT, value, source=FROM_REQUEST)


def _unusable(each: Ingredient, found: Fetched) -> Fetched:
    if is_away(found.reason):
        # Not a fault of the request, and told from one by this very reason.
        return Fetched(FeatureStatus.ERROR, None, found.event_time_ms, found.reason)
    said = f"its ingredient {each} is {found.status}" + (f": {found.reason}" if found.reason else "")
    return Fetched(FeatureStatus.ERROR, None, found.event_time_ms, said)


def _is_undated(found: Fetched) -> bool:
    """Whether an ingredient's age is not known: a stored one without an event time, or one that is made of such."""
    stored = found.status is FeatureStatus.PRESENT and found.source != FROM_REQUEST
    return found.undated or (stored and found.event_time_ms is None)


def _oldest(ingredients: Iterable[Fetched], now_ms: int) -> int | None:
    """The oldest event time; one that lies so far ahead that an age is not known is not hidden by older ones."""
    times = [each.event_time_ms for each in ingredients if each.event_time_ms is not None]
    if not times:
        return None
    latest = max(times)
    return latest if latest - now_ms > EVENT_TIME_AHEAD_MS_MAX else min(times)


def _evaluated(
    made: Computation,
    request: Request,
    usable: Mapping[FeatureRef, Fetched],
    functions: Mapping[str, FeatureFunction],
) -> object:
    if made.expression is not None:
        sections: dict[str, Any] = {
            name: getattr(request, name) for name in REQUEST_SOURCES if name in made.expression.roots
        }
        return made.expression.evaluate(_activation(made.expression, usable, request.path, sections))
    function = functions.get(str(made.function))
    if function is None:
        raise ValueError(f"function {made.function} is not registered in this worker: install the package that has it")
    given = {str(each): _given(usable[each.ref].value) for each in made.ingredients}
    try:
        return function(given)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # SystemExit, panics of Rust and CancelledError are no Exceptions, and each would end the worker. Nothing waits
        # in here, so a CancelledError is the function's own: one meant for this task comes where it waits next.
        raise ValueError(f"function {made.function} raised {raised(error)}") from error


def _activation(
    expression: Expression, usable: Mapping[FeatureRef, Fetched], path: str, sections: Mapping[str, Mapping[str, Any]]
) -> Activation:
    values: dict[str, Any] = {}
    for root in expression.roots:
        if root == "path":
            values[root] = path
        elif root in REQUEST_SOURCES:
            # As absent as one that was not sent: has() is what tells.
            values[root] = {name: value for name, value in sections[root].items() if value is not None}
        else:
            values[root] = {}
    for (source, name), found in usable.items():
        root = _root(source)
        if root in values and source not in REQUEST_SOURCES:
            values[root][name] = list(found.value) if isinstance(found.value, tuple) else found.value
    return Activation(values, expression.helpers)


def _given(value: Value) -> Value:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: object) -> object:
    return value.timestamp() if isinstance(value, datetime) else value
