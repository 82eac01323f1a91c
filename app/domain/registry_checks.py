"""What documents say of one another: names that are taken, references that lead nowhere, versions not to be used.

Each check yields where in the document the fault lies, and the fault; nothing is refused before all have spoken.
"""

import datetime
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from app.domain.dispatch import sound_value
from app.domain.document_parts import Scalar
from app.domain.documents import Document, FeatureView, Model, ModelSpec, ModelVersion
from app.domain.errors import Fault
from app.domain.feature_checks import input_faults, refresh_fault, source_faults
from app.domain.feature_views import aggregate_faults
from app.domain.features import REQUEST_SOURCES, coerce_written
from app.domain.on_demand import Computations, closure
from app.domain.registry_parts import is_unread
from app.domain.route_documents import TaskSpec
from app.domain.skew import baseline_faults
from app.domain.version_documents import FeatureContract, KafkaBackend, ModelVersionSpec
from app.domain.view_documents import FeatureViewSpec

FieldFault = tuple[str, str]
"""A field of a document, and what is wrong there."""

_NOT_QUEUED: Final = "not supported yet for backend type kafka (its pool's workers take tasks as they can); remove it"


@dataclass(frozen=True, slots=True)
class Known:
    """What documents define. ``unread``: what those that could not be read would have defined, by kind and name."""

    models: Mapping[str, ModelSpec]
    views: Mapping[str, FeatureViewSpec]
    feature_types: Mapping[str, Mapping[str, str]]
    versions: Mapping[tuple[str, str], ModelVersionSpec]
    unread: AbstractSet[tuple[str, str]] = frozenset()

    @classmethod
    def of(cls, documents: Iterable[Document], unread: AbstractSet[tuple[str, str]] = frozenset()) -> "Known":
        """What ``documents`` define; of two of one name, which is a fault by itself, the last."""
        models: dict[str, ModelSpec] = {}
        views: dict[str, FeatureViewSpec] = {}
        feature_types: dict[str, Mapping[str, str]] = {}
        versions: dict[tuple[str, str], ModelVersionSpec] = {}
        for document in documents:
            match document:
                case Model():
                    models[document.metadata.name] = document.spec
                case FeatureView():
                    views[document.metadata.name] = document.spec
                    feature_types[document.metadata.name] = document.spec.types
                case ModelVersion():
                    versions[document.spec.model, document.spec.version] = document.spec
                case _:
                    pass
        return cls(models, views, feature_types, versions, unread)

    def model_exists(self, model: str) -> bool:
        """Whether there is such a model, or may be."""
        return model in self.models or self.may_exist("Model", model) or is_unread(model)

    def version_exists(self, model: str, version: str) -> bool:
        """Whether the model has such a version, or may have."""
        there = (model, version) in self.versions or self.may_exist("ModelVersion", f"{model}/{version}")
        return there or is_unread(version) or is_unread(model)

    def may_exist(self, kind: str, name: str) -> bool:
        """Whether a document that could not be read may define it."""
        return (kind, name) in self.unread or (kind, "") in self.unread

    def label(self, task: TaskSpec, version: str | None, alias: str | None) -> str | None:
        """The version that is named by itself or by an alias of the task's model; None where there is none."""
        model = self.models.get(task.model)
        return version if alias is None else None if model is None else model.aliases.get(alias)

    def served(self, task: TaskSpec) -> tuple[ModelVersionSpec, ...] | None:
        """The versions that can serve ``task``; None where one of them is not known, which is a fault by itself."""
        select = task.select
        labels: list[str | None] = [arm.version for arm in select.split or () if arm.weight > 0]
        if select.split is None:
            labels.append(self.label(task, select.version, select.alias))
        if task.rollout is not None:
            labels.append(task.rollout.to)
        labels += [self.label(task, each.version, each.alias) for each in task.fallback if each.default is None]
        found = [self.versions.get((task.model, label)) if label is not None else None for label in labels]
        versions = tuple(dict.fromkeys((spec.model, spec.version) for spec in found if spec is not None))
        return None if None in found else tuple(self.versions[identity] for identity in versions)


# --- names ------------------------------------------------------------------------------------------------------------


def name_faults(documents: Iterable[tuple[str, Document]]) -> Iterator[Fault]:
    """Documents of one kind and name, and model versions of one number."""
    first: dict[tuple[str, str], str] = {}
    first_version: dict[tuple[str, str], str] = {}
    for origin, document in documents:
        name = document.metadata.name
        where = f"{document.kind} {name}"
        if (document.kind, name) in first and not is_unread(name):
            there = first[document.kind, name]
            yield Fault(origin, where, "metadata.name", f"is taken{there and f' by {there}'}; keep one")
        first.setdefault((document.kind, name), origin)
        if isinstance(document, ModelVersion):
            identity = (document.spec.model, document.spec.version)
            if identity in first_version and not any(map(is_unread, identity)):
                taken = f"model {identity[0]} already has it, as {first_version[identity]}; number it anew"
                yield Fault(origin, where, "spec.version", taken)
            first_version.setdefault(identity, name)


def repeated(field: str, names: Iterable[str]) -> Iterator[FieldFault]:
    """Names of a list that occur more than once."""
    each = list(names)
    # Nearly always nothing is: counting is left for when something may be.
    for name, count in Counter(each).items() if len(set(each)) < len(each) else ():
        if count > 1:
            yield field, f"{name} is named {count} times; keep one"


# --- models, views, versions ------------------------------------------------------------------------------------------


def model_faults(known: Known, document: Model) -> Iterator[FieldFault]:
    """Aliases of versions that there are not."""
    for alias, version in document.spec.aliases.items():
        if not known.version_exists(document.metadata.name, version):
            yield f"spec.aliases.{alias}", f"there is no version {version} of this model"


def view_faults(document: FeatureView) -> Iterator[FieldFault]:
    """Names within a view, and its own."""
    yield from repeated("spec.features", (feature.name for feature in document.spec.features))
    yield from repeated("spec.entities", (entity.name for entity in document.spec.entities))
    if document.metadata.name in REQUEST_SOURCES:
        yield "metadata.name", "means the request's own values in a ref; rename the view"
    yield from aggregate_faults(document.spec)
    for field, message in source_faults(document.spec):
        yield f"spec.{field}", message


def version_faults(
    known: Known, document: ModelVersion, today: datetime.date | None, *, whole: bool
) -> Iterator[FieldFault]:
    """A version's validity, features and outputs; ``whole``: it is as it was written, not what is sound of it."""
    spec = document.spec
    if not known.model_exists(document.spec.model):
        yield "spec.model", f"there is no Model {document.spec.model}"
    ended = spec.governance.last_day if spec.governance else None
    if today is not None and ended is not None and ended < today:
        yield "spec.governance.validUntil", f"ended on {ended}; have it validated again"
    if isinstance(spec.backend, KafkaBackend):
        for field in ("retries", "concurrency", "outlier", "batch"):
            if field in spec.policy.model_fields_set:
                yield f"spec.policy.{field}", _NOT_QUEUED
    columns = (contract.name or contract.ref.partition(".")[2] for contract in spec.features)
    yield from repeated("spec.features", columns)
    yield from repeated("spec.outputs", (output.name for output in spec.outputs))
    for contract in spec.features:
        fault = _contract_fault(known, contract)
        if fault is not None:
            yield f"spec.features[{contract.ref}].{fault[0]}", fault[1]
    for field, message in input_faults(spec, known.feature_types, whole=whole):
        yield f"spec.{field}", message
    for output in spec.outputs:
        if output.datatype in ("BOOL", "BYTES") and (output.min is not None or output.max is not None):
            bound = "min" if output.min is not None else "max"
            yield f"spec.outputs[{output.name}].{bound}", f"{output.datatype} has no order; remove it"
        elif output.min is not None and output.max is not None and output.min > output.max:
            yield f"spec.outputs[{output.name}].min", "is above max; no value would be sound"
    if spec.baseline is not None:
        for field, message in baseline_faults(spec, _declared_types(known, spec)):
            yield f"spec.baseline{field}", message


def _declared_types(known: Known, spec: ModelVersionSpec) -> dict[str, str | None]:
    """The declared types of a version's inputs by its names; without those of views that are not known."""
    types: dict[str, str | None] = {}
    for contract in spec.features:
        source, _, feature = contract.ref.partition(".")
        if source in REQUEST_SOURCES:
            types[contract.name or feature] = contract.type
        elif feature in known.feature_types.get(source, {}):
            types[contract.name or feature] = known.feature_types[source][feature]
    return types


def _contract_fault(known: Known, contract: FeatureContract) -> FieldFault | None:
    # Tens of thousands of contracts are checked in a load, so what each caches for requests is not filled here.
    source, _, feature = contract.ref.partition(".")
    if source in REQUEST_SOURCES:
        if contract.max_age is not None:
            return "maxAge", "a request's own values have no age; remove it"
        declared: str | None = contract.type
    else:
        if source not in known.views:
            return None if known.may_exist("FeatureView", source) else ("ref", f"there is no FeatureView {source}")
        declared = known.feature_types[source].get(feature)
        if declared is None:
            return "ref", f"FeatureView {source} has no feature {feature}"
        if contract.type is not None:
            return "type", "its FeatureView declares it; remove it here"
        if contract.max_age == 0:
            return "maxAge", "0s makes whatever is stored STALE as it is read: declare the age that is allowed, as 1d"
        if contract.max_age is not None and known.views[source].aggregate:
            refused = refresh_fault(contract.max_age, known.views[source], feature)
            if refused is not None:
                return "maxAge", refused
    try:
        if declared is not None and contract.default is not None:
            coerce_written(contract.default, declared)
    except ValueError as error:
        return "default", str(error)
    return None


def computed_age_faults(known: Known, document: Document, computations: Computations) -> Iterator[FieldFault]:
    """Contracts about what is computed on demand, and is STALE between two computations of its ingredients."""
    for contract in document.spec.features if isinstance(document, ModelVersion) else ():
        source, _, feature = contract.ref.partition(".")
        if contract.max_age is None or (source, feature) not in computations:
            continue
        made = closure([(source, feature)], computations)
        for view, name in dict.fromkeys(each.ref for one in made for each in one.ingredients):
            spec = known.views.get(view)
            refused = refresh_fault(contract.max_age, spec, name, f"{view}.{name}") if spec and spec.aggregate else None
            if refused is not None:
                yield f"spec.features[{contract.ref}].maxAge", refused


# --- tasks ------------------------------------------------------------------------------------------------------------


def task_faults(known: Known, task: TaskSpec, today: datetime.date | None) -> Iterator[FieldFault]:
    """The versions that a task names, and the fixed answers that stand in for them."""
    select, model = task.select, known.models.get(task.model)
    if model is None:
        if not known.model_exists(task.model):
            yield "model", f"there is no Model {task.model}"
        return
    named: list[tuple[str, str | None, str | None]] = [("select", select.version, select.alias)]
    named += [(f"shadow[{number}]", each.version, each.alias) for number, each in enumerate(task.shadow)]
    named += [(f"fallback[{number}]", each.version, each.alias) for number, each in enumerate(task.fallback)]
    chosen: list[tuple[str, str]] = []
    for field, version, alias in named:
        label = known.label(task, version, alias)
        if label is not None:
            chosen.append((f"{field}.alias" if alias is not None else f"{field}.version", label))
        elif alias is not None:
            yield f"{field}.alias", f"Model {task.model} has no alias {alias}"
    # A rollout's own version may be its shadow, for another is drawn at times; and aliases move.
    taken = {select.version} if task.rollout is None else set()
    for number, shadow in enumerate(task.shadow):
        if shadow.version is not None and shadow.version in taken:
            yield (
                f"shadow[{number}]",
                f"{shadow.version} is selected or named already and would not be asked; remove it",
            )
        taken.add(shadow.version)
    arms = Counter(arm.version for arm in select.split or ())
    chosen += [(f"select.split[{version}]", version) for version in arms]
    for version, count in arms.items():
        if count > 1:
            yield "select.split", f"version {version} is named {count} times; keep one"
    if task.rollout is not None:
        chosen.append(("rollout.to", task.rollout.to))
        if known.label(task, select.version, select.alias) == task.rollout.to:
            yield "rollout.to", f"version {task.rollout.to} is what the task selects already; remove it"
    deciding: dict[str, ModelVersionSpec] = {}
    for field, version in chosen:
        spec = known.versions.get((task.model, version))
        if spec is not None:
            if not field.startswith("shadow"):
                deciding[version] = spec
            refusal = _governance_fault(spec, today, decides=not field.startswith("shadow"))
            if refusal is not None:
                yield field, refusal
        elif not known.version_exists(task.model, version):
            yield field, f"there is no version {version} of {task.model}"
    fixed = {f"fallback[{number}].default": each.default for number, each in enumerate(task.fallback)}
    for field, answer in {"default": task.default, **fixed}.items():
        for spec in deciding.values() if answer is not None else ():
            yield from ((f"{field}{below}", message) for below, message in _answer_faults(answer or {}, spec))


def _answer_faults(answer: Mapping[str, Scalar], version: ModelVersionSpec) -> Iterator[FieldFault]:
    """Why a fixed answer is none that the version could give."""
    contracts = {output.name: output for output in version.outputs}
    if answer.keys() != contracts.keys():
        given, wanted = ", ".join(sorted(answer)) or "nothing", ", ".join(sorted(contracts))
        yield "", f"names {given}, and version {version.version} answers {wanted}; name the same"
    for name, value in answer.items():
        try:
            if name in contracts:
                sound_value(contracts[name], value)
        except ValueError as error:
            yield f".{name}", f"{error}, by version {version.version}: write what it could answer"


def _governance_fault(spec: ModelVersionSpec, today: datetime.date | None, *, decides: bool) -> str | None:
    """Why a version must not be used from ``today`` on; one that only runs beside another needs no approval yet."""
    if today is None:
        return None
    if spec.governance is None:
        lacks = f"version {spec.version} has no governance: name in approvedBy who approved it, or run it as a shadow"
        return lacks if decides else None
    ended = spec.governance.last_day
    return f"version {spec.version} ended on {ended}; use another" if ended and ended < today else None
