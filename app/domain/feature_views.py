"""What a FeatureView's document must say beyond its shape: its aggregates make sense, fit, and have their own names."""

from collections.abc import Iterator

from app.domain.aggregates import STATE_BYTES_MAX, Plan
from app.domain.registry_parts import is_unread
from app.domain.view_documents import AggregateSpec, FeatureViewSpec
from app.durations import format_duration, parse_duration_ms

_NUMBERS = frozenset({"INT32", "INT64", "DOUBLE", "FLOAT"})
_TYPES = {
    "sum": _NUMBERS,
    "mean": _NUMBERS,
    "min": _NUMBERS | {"UNIX_TIMESTAMP"},
    "max": _NUMBERS | {"UNIX_TIMESTAMP"},
    "last": _NUMBERS | {"UNIX_TIMESTAMP", "STRING", "BOOL"},
    "distinct": _NUMBERS | {"UNIX_TIMESTAMP", "STRING", "BOOL"},
    "count": None,
}
"""The types that each function takes; None: any."""
_WINDOW_MS_MIN, _WINDOW_MS_MAX = 60_000, 365 * 86_400_000
_NAME_LENGTH_MAX = 128


def aggregate_faults(spec: FeatureViewSpec) -> Iterator[tuple[str, str]]:
    """Each fault of the view's aggregates: the field, and what to do."""
    if not spec.aggregate:
        if "lateness" in spec.model_fields_set:
            yield "spec.lateness", "goes with aggregate, and there is none; remove it"
        return
    sound = True
    for at, aggregate in enumerate(spec.aggregate):
        for field, message in _faults(aggregate, spec):
            sound = False
            yield f"spec.aggregate[{at}].{field}", message
    taken = set(spec.declared)
    for name in (name for each in spec.aggregate for name in _names(each, spec)):
        if name in taken:
            yield "spec.aggregate", f"{name} is taken in this view; keep one"
        if len(name) > _NAME_LENGTH_MAX:
            yield "spec.aggregate", f"{name} is longer than the {_NAME_LENGTH_MAX} characters a name may have"
        taken.add(name)
    if sound and spec.plan is not None:
        yield from _plan_faults(spec, spec.plan)


def _plan_faults(spec: FeatureViewSpec, plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.state_bytes_max > STATE_BYTES_MAX:
        yield (
            "spec.aggregate",
            f"an entity's tiles could take {plan.state_bytes_max} bytes, and {STATE_BYTES_MAX} are allowed: "
            "declare fewer windows of distinct, or a view for each",
        )
    if spec.ttl is not None and spec.ttl <= plan.refresh_ms:
        every = format_duration(plan.refresh_ms)
        yield (
            "spec.ttl",
            f"{format_duration(spec.ttl)} is over before aggregates are computed anew, which is every {every} while "
            f"nothing comes, so sound ones would be STALE: declare more than {every}, or shorter windows",
        )
    # The default is longer than a window of minutes; it then bounds nothing.
    if "lateness" in spec.model_fields_set and spec.lateness > plan.keeps_ms:
        covers = format_duration(plan.keeps_ms)
        yield (
            "spec.lateness",
            f"{format_duration(spec.lateness)} is longer than the longest window covers: what is later than {covers} "
            f"is in no window; declare {covers} at most",
        )


def _names(aggregate: AggregateSpec, spec: FeatureViewSpec) -> Iterator[str]:
    return (each.name for each, _ in aggregate.aggregations(spec.declared))


def _faults(aggregate: AggregateSpec, spec: FeatureViewSpec) -> Iterator[tuple[str, str]]:
    if aggregate.of is None:
        if aggregate.op != "count":
            yield "of", f"{aggregate.op} needs a feature of this view"
    elif aggregate.of not in spec.declared:
        if not any(map(is_unread, (aggregate.of, *spec.declared))):
            yield "of", f"this view has no feature {aggregate.of}"
    else:
        allowed, given = _TYPES[aggregate.op], spec.declared[aggregate.of]
        if allowed is not None and given not in allowed:
            yield "of", f"{aggregate.of} is {given}, and {aggregate.op} takes {', '.join(sorted(allowed))}"
    lengths = [parse_duration_ms(window) for window in aggregate.windows]
    for window, length in zip(aggregate.windows, lengths, strict=True):
        if not _WINDOW_MS_MIN <= length <= _WINDOW_MS_MAX:
            yield f"windows[{window}]", "a window from 1m to 365d is allowed"
        elif lengths.count(length) > 1:
            yield f"windows[{window}]", "is there twice; keep one"
