"""What is wrong with features' documents beyond their shapes, as field and message: leaves of the registry's check."""

from collections.abc import Iterator, Mapping

from app.domain.features import REQUEST_SOURCES
from app.domain.version_documents import HttpBackend, ModelVersionSpec
from app.domain.view_documents import FeatureViewSpec, HttpSource, RedisSource
from app.durations import format_duration


def source_faults(spec: FeatureViewSpec) -> Iterator[tuple[str, str]]:
    """What a view's source does not fit, and what it cannot give."""
    if spec.source is not None and not spec.entities:
        yield "entities", "is missing: name the keys that the source has its rows by"
    if spec.on_demand is not None and spec.entities:
        yield "entities", "a view with onDemand has none of its own, its ingredients' views have: remove them"
    if spec.on_demand is not None and spec.ttl is not None:
        yield "ttl", "what is computed on demand is as old as its ingredients, whose views have their own: remove it"
    if spec.aggregate and not isinstance(spec.source, RedisSource):
        yield "aggregate", "is computed from updates, which views with source type redis have: remove it"
    if isinstance(spec.source, HttpSource):
        for feature in spec.features:
            if feature.type.startswith("BYTES"):
                said = f"is {feature.type}, and a feature server answers in JSON, which has no bytes: keep it in Redis"
                yield f"features[{feature.name}].type", said


def refresh_fault(max_age_ms: int, view: FeatureViewSpec, feature: str, of: str = "") -> str | None:
    """Why a value of ``view`` would be STALE at times whatever is done; None where it need not be.

    ``of`` names the value where the contract is about what is computed of it.
    """
    if feature in view.declared or view.plan is None or max_age_ms > view.plan.refresh_ms:
        return None
    every = format_duration(view.plan.refresh_ms)
    of = f", here {of}," if of else ""
    return (
        f"{format_duration(max_age_ms)} is over before aggregates{of} are computed anew, which is every {every} while "
        f"nothing comes, so sound ones would be STALE: declare more than {every}, or shorter windows"
    )


def input_faults(
    spec: ModelVersionSpec, feature_types: Mapping[str, Mapping[str, str]], *, whole: bool
) -> Iterator[tuple[str, str]]:
    """Features that a version's input cannot hold, at all or where they are absent.

    ``whole``: the document is as it was written. Of one with faults a contract may have lost what it says of absence.
    """
    if not isinstance(spec.backend, HttpBackend):
        return
    matrix = spec.backend.input.layout == "matrix"
    for contract in spec.features:
        # What contracts cache for requests is not filled here: tens of thousands are checked in a load.
        source, _, feature = contract.ref.partition(".")
        declared = contract.type if source in REQUEST_SOURCES else feature_types.get(source, {}).get(feature)
        if declared is None or not declared.endswith("_LIST"):
            continue
        if matrix:
            yield (
                f"features[{contract.ref}]",
                f"is {declared}, and a matrix has one number a feature: use layout columns",
            )
        elif whole and not contract.required and contract.default is None:
            # A default stands in for all that is not there or broken, and only what is required needs none.
            yield (
                f"features[{contract.ref}].default",
                f"is null, and a tensor made of no {declared} has no shape, so that requests without it would fail: "
                "declare a list, as default: [], or required: true",
            )
