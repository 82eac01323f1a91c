"""The registry: documents in, one immutable, content-addressed revision out, ready to route with.

Shapes are checked first, then what the documents say of one another, and every expression is compiled; all faults are
collected before anything is refused. A revision's id is the SHA-256 of its canonical JSON, so equal content has equal
ids wherever it was applied from.
"""

import datetime
import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from pydantic import ValidationError

from app.domain.documents import (
    IN_WORDS,
    KINDS,
    NOT_SUPPORTED_YET,
    VALUES_NOT_SUPPORTED_YET,
    Document,
    FeatureContract,
    FeatureView,
    FeatureViewSpec,
    KafkaBackend,
    Model,
    ModelSpec,
    ModelVersion,
    ModelVersionSpec,
    Rollout,
    RolloutStatus,
    Route,
    RouteSpec,
    RouteStatus,
    RuleSpec,
    TaskSpec,
    item_label,
)
from app.domain.errors import DocumentsRefused, ExpressionFailed, Fault
from app.domain.expressions import Activation, Expression, Reach, compile_expression, joined
from app.domain.features import REQUEST_SOURCES, ViewWant, coerce, wants_of
from app.domain.paths import PathTree, placeholders_of

WHEN_ROOTS: Final = ("path", "entities", "inputs", "metadata")
RESULT_ROOTS: Final = ("outputs", *WHEN_ROOTS)
REASON_ROOTS: Final = ("result", *RESULT_ROOTS)
REVISION_BYTES_MAX: Final = 16 * 1024 * 1024

_RESERVED: Final = frozenset({"headers", "model_version"})
"""Members of metadata that no placeholder may be called."""
_SHOWN_LENGTH_MAX: Final = 80
_NOT_QUEUED: Final = "not supported yet for backend type kafka (its pool's workers take tasks as they can); remove it"


@dataclass(frozen=True, slots=True)
class Source:
    """One document as it was read: where from, and what it says."""

    origin: str
    content: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CompiledTask:
    """A task, compiled. ``experiment`` salts its draws; ``arms`` are what is drawn from, none where nothing is.

    ``segments`` stand for its shadows' segments, in their order.
    """

    spec: TaskSpec
    experiment: str
    arms: tuple[tuple[str, int], ...]
    condition: Expression | None
    segments: tuple[Expression | None, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule, compiled."""

    spec: RuleSpec
    when: Expression | None
    tasks: tuple[CompiledTask, ...]
    result: Mapping[str, Expression]
    reasons: Mapping[str, Expression]


@dataclass(frozen=True, slots=True)
class CompiledRoute:
    """A route, compiled; ``placeholders`` name the segments of its path that vary, in order.

    ``reach`` by root and ``helpers`` are what its expressions need, together.
    """

    name: str
    spec: RouteSpec
    status: RouteStatus
    placeholders: tuple[str, ...]
    rules: tuple[Rule, ...]
    reach: Mapping[str, Reach]
    helpers: frozenset[str]


@dataclass(frozen=True, slots=True)
class Revision:
    """One whole state of the registry; what a request sees from start to end."""

    id: str
    documents: tuple[Document, ...]
    routes: tuple[CompiledRoute, ...]
    models: Mapping[str, ModelSpec]
    versions: Mapping[tuple[str, str], ModelVersionSpec]
    views: Mapping[str, FeatureViewSpec]
    expires_ms: Mapping[tuple[str, str], int]
    """Until when versions may be used, of those that end: the first moment after."""
    paths: PathTree[CompiledRoute] = field(repr=False, compare=False)
    _wants: dict[tuple[tuple[str, str], ...], tuple[ViewWant, ...]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def wants(self, versions: Iterable[ModelVersionSpec]) -> tuple[ViewWant, ...]:
        """What ``versions`` together want of stored features; worked out once for each set that meets."""
        chosen = tuple(versions)
        key = tuple((version.model, version.version) for version in chosen)
        wants = self._wants.get(key)
        if wants is None:
            wants = self._wants[key] = wants_of((c for version in chosen for c in version.features), self.views)
        return wants


def read_revision(sources: Iterable[Source], *, today: datetime.date | None = None) -> Revision:
    """The revision that ``sources`` make together: shapes, references and expressions checked in one go.

    ``today`` (UTC) refuses versions whose validity has ended, and the use of those that nobody approved; None leaves
    governance alone, for a revision that was accepted once stays loadable.

    Raises:
        DocumentsRefused: everything wrong in any of them.
    """
    check = _Check(today)
    check.read(sources)
    return check.compiled()


def parse(sources: Iterable[Source]) -> tuple[Document, ...]:
    """The documents that ``sources`` hold, each by itself.

    Raises:
        DocumentsRefused: everything wrong with their shapes.
    """
    check = _Check(None)
    check.read(sources)
    if check.faults:
        raise DocumentsRefused(check.faults)
    return tuple(document for _, document in check.documents)


def compile_revision(
    documents: Iterable[Document], *, today: datetime.date | None = None, origin: str = ""
) -> Revision:
    """The revision that ``documents`` of ``origin`` make together; ``today`` and errors as in ``read_revision``."""
    check = _Check(today)
    check.documents = [(origin, document) for document in documents]
    return check.compiled()


def canonical(documents: Iterable[Document]) -> bytes:
    """The documents' canonical JSON: sorted by kind and name, members sorted, what was not written left out."""
    ordered = sorted(documents, key=lambda document: (document.kind, document.metadata.name))
    return orjson.dumps([content_of(document) for document in ordered], option=orjson.OPT_SORT_KEYS)


def content_of(document: Document) -> dict[str, Any]:
    """What a document says, as JSON-like values: durations in their shortest text, what was not written left out."""
    return document.model_dump(mode="json", by_alias=True, exclude_unset=True)


def revision_id(content: bytes) -> str:
    """A revision's id: ``sha256:`` and the digest of its canonical JSON."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def load_revision(identity: str, content: bytes) -> Revision:
    """A published revision, from its canonical JSON.

    Raises:
        DocumentsRefused: the content does not hash to ``identity``, or is not a sound revision.
    """
    at = f"revision {identity[:80]}"
    if revision_id(content) != identity:
        raise DocumentsRefused([Fault(at, "", "", f"its content hashes to {revision_id(content)}; publish it anew")])
    try:
        entries = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise DocumentsRefused([Fault(at, "", "", f"not JSON: {error}")]) from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DocumentsRefused([Fault(at, "", "", "not a list of documents")])
    if not entries:
        # `apply` publishes none, and a worker that went over to it would reject every request.
        raise DocumentsRefused([Fault(at, "", "", "holds no documents; publish some by `apply`")])
    revision = read_revision(Source(identity[:19], entry) for entry in entries)
    if revision.id != identity:
        raise DocumentsRefused([Fault(at, "", "", "its content is not in canonical form; publish it by `apply`")])
    return revision


def pools_of(revision: Revision) -> frozenset[str]:
    """The worker pools that versions of ``revision`` run in."""
    return frozenset(spec.backend.pool for spec in revision.versions.values() if isinstance(spec.backend, KafkaBackend))


class _Check:
    """One pass over documents, and everything found wrong on the way."""

    def __init__(self, today: datetime.date | None) -> None:
        self.today = today
        self.documents: list[tuple[str, Document]] = []
        self.faults: list[Fault] = []
        # What is sound of documents that have a fault in a part: looked through for references, and no more.
        self.parts: list[tuple[str, Document]] = []
        # What documents that could not be read would have defined: references to it are not faults of their own.
        self.unread: set[tuple[str, str]] = set()
        self.models: dict[str, ModelSpec] = {}
        self.views: dict[str, FeatureViewSpec] = {}
        self.feature_types: dict[str, dict[str, str]] = {}
        self.versions: dict[tuple[str, str], ModelVersionSpec] = {}

    # --- shapes -------------------------------------------------------------------------------------------------------

    def read(self, sources: Iterable[Source]) -> None:
        """Take in each document that has its kind's shape."""
        for source in sources:
            kind, name = source.content.get("kind"), _name_in(source.content)
            shape = KINDS.get(kind) if isinstance(kind, str) else None
            if shape is None:
                known = ", ".join(sorted(KINDS))
                self.faults.append(Fault(source.origin, name, "kind", f"{_shown(kind)} is unknown: use one of {known}"))
                continue
            where = f"{kind} {name}" if name else str(kind)
            try:
                document = shape.model_validate_json(orjson.dumps(source.content))
            except ValidationError as error:
                details = (detail for detail in error.errors(include_url=False) if not _is_echo(detail))
                found = (_shape_fault(source, where, detail) for detail in details)
                self.faults += dict.fromkeys(found)
                self.unread |= _defined_by(source.content)
                part = _sound_part(shape, source.content, error)
                if part is not None:
                    self.parts.append((source.origin, part))
            except TypeError as error:
                self.faults.append(Fault(source.origin, where, "", f"cannot be kept as JSON: {error}"))
                self.unread |= _defined_by(source.content)
            else:
                self.documents.append((source.origin, document))

    # --- references ---------------------------------------------------------------------------------------------------

    def compiled(self) -> Revision:
        """The revision, if nothing at all is wrong."""
        self._index()
        routes = []
        for origin, document in self.documents:
            match document:
                case ModelVersion():
                    self._check_version(origin, document)
                case FeatureView():
                    self._check_view(origin, document)
                case Model():
                    self._check_model(origin, document)
                case Route():
                    routes.append((origin, self._compile_route(origin, document)))
        for origin, document in self.parts:
            self._check_references(origin, document)
        self._refuse_same_paths(routes)
        documents = tuple(document for _, document in self.documents)
        content = canonical(documents)
        if len(content) > REVISION_BYTES_MAX:
            fault = f"the revision has {len(content)} bytes, and {REVISION_BYTES_MAX} are allowed: remove old versions"
            self.faults.append(Fault("", "", "", fault))
        if self.faults:
            raise DocumentsRefused(self.faults)
        ordered = tuple(route for _, route in routes)
        tree = PathTree((route.spec.path, route) for route in ordered)
        expires = {
            identity: _end_of(spec.governance.last_day)
            for identity, spec in self.versions.items()
            if spec.governance is not None and spec.governance.last_day is not None
        }
        return Revision(revision_id(content), documents, ordered, self.models, self.versions, self.views, expires, tree)

    def _add(self, origin: str, document: Document, field: str, message: str) -> None:
        self.faults.append(Fault(origin, f"{document.kind} {document.metadata.name}", field, message))

    def _add_repeated(self, origin: str, document: Document, field: str, names: Iterable[str]) -> None:
        each = list(names)
        # Nearly always nothing is: counting is left for when something may be.
        for name, count in Counter(each).items() if len(set(each)) < len(each) else ():
            if count > 1:
                self._add(origin, document, field, f"{name} is named {count} times; keep one")

    def _index(self) -> None:
        first: dict[tuple[str, str], str] = {}
        first_version: dict[tuple[str, str], str] = {}
        for origin, document in self.documents:
            name = document.metadata.name
            if (document.kind, name) in first:
                there = first[document.kind, name]
                self._add(origin, document, "metadata.name", f"is taken{there and f' by {there}'}; keep one")
            first.setdefault((document.kind, name), origin)
            match document:
                case Model():
                    self.models[name] = document.spec
                case FeatureView():
                    self.views[name] = document.spec
                    # Of two of one name, which is a fault by itself, the first counts.
                    self.feature_types[name] = {each.name: each.type for each in reversed(document.spec.features)}
                case ModelVersion():
                    identity = (document.spec.model, document.spec.version)
                    if identity in first_version:
                        taken = f"model {identity[0]} already has it, as {first_version[identity]}; number it anew"
                        self._add(origin, document, "spec.version", taken)
                    first_version.setdefault(identity, name)
                    self.versions[identity] = document.spec
                case Route():
                    pass

    def _model_exists(self, model: str) -> bool:
        return model in self.models or ("Model", model) in self.unread

    def _version_exists(self, model: str, version: str) -> bool:
        return (model, version) in self.versions or ("ModelVersion", f"{model}/{version}") in self.unread

    def _check_model(self, origin: str, document: Model) -> None:
        for alias, version in document.spec.aliases.items():
            if not self._version_exists(document.metadata.name, version):
                self._add(origin, document, f"spec.aliases.{alias}", f"there is no version {version} of this model")

    def _check_view(self, origin: str, document: FeatureView) -> None:
        self._add_repeated(origin, document, "spec.features", (feature.name for feature in document.spec.features))
        self._add_repeated(origin, document, "spec.entities", (entity.name for entity in document.spec.entities))
        if document.metadata.name in REQUEST_SOURCES:
            self._add(origin, document, "metadata.name", "means the request's own values in a ref; rename the view")

    def _check_references(self, origin: str, document: Document) -> None:
        match document:
            case ModelVersion():
                self._check_its_model(origin, document)
                self._check_contracts(origin, document)
            case Route():
                for rule in document.spec.rules:
                    self._check_tasks(origin, document, rule)
            case _:
                pass

    def _check_its_model(self, origin: str, document: ModelVersion) -> None:
        if not self._model_exists(document.spec.model):
            self._add(origin, document, "spec.model", f"there is no Model {document.spec.model}")

    def _check_contracts(self, origin: str, document: ModelVersion) -> None:
        for contract in document.spec.features:
            fault = self._contract_fault(contract)
            if fault is not None:
                self._add(origin, document, f"spec.features[{contract.ref}].{fault[0]}", fault[1])

    def _check_tasks(self, origin: str, document: Route, rule: RuleSpec) -> None:
        for task in rule.tasks:
            for field_, message in self._task_faults(task):
                self._add(origin, document, f"spec.rules[{rule.name}].tasks[{task.name}].{field_}", message)

    def _check_version(self, origin: str, document: ModelVersion) -> None:
        spec = document.spec
        self._check_its_model(origin, document)
        ended = spec.governance.last_day if spec.governance else None
        if self.today is not None and ended is not None and ended < self.today:
            self._add(origin, document, "spec.governance.validUntil", f"ended on {ended}; have it validated again")
        if isinstance(spec.backend, KafkaBackend):
            for field_ in ("retries", "concurrency", "batch"):
                if field_ in spec.policy.model_fields_set:
                    self._add(origin, document, f"spec.policy.{field_}", _NOT_QUEUED)
        columns = (contract.name or contract.ref.partition(".")[2] for contract in spec.features)
        self._add_repeated(origin, document, "spec.features", columns)
        self._add_repeated(origin, document, "spec.outputs", (output.name for output in spec.outputs))
        self._check_contracts(origin, document)
        for output in spec.outputs:
            if output.min is not None and output.max is not None and output.min > output.max:
                self._add(origin, document, f"spec.outputs[{output.name}].min", "is above max; no value would be sound")

    def _contract_fault(self, contract: FeatureContract) -> tuple[str, str] | None:
        # Tens of thousands of contracts are checked in a load, so what each caches for requests is not filled here.
        source, _, feature = contract.ref.partition(".")
        if source in REQUEST_SOURCES:
            if contract.max_age is not None:
                return "maxAge", "a request's own values have no age; remove it"
            declared: str | None = contract.type
        else:
            view = self.views.get(source)
            if view is None:
                known = ("FeatureView", source) in self.unread
                return None if known else ("ref", f"there is no FeatureView {source}")
            declared = self.feature_types[source].get(feature)
            if declared is None:
                return "ref", f"FeatureView {source} has no feature {feature}"
            if contract.type is not None:
                return "type", "its FeatureView declares it; remove it here"
        try:
            if declared is not None and contract.default is not None:
                coerce(contract.default, declared)
        except ValueError as error:
            return "default", str(error)
        return None

    # --- routes -------------------------------------------------------------------------------------------------------

    def _compile_route(self, origin: str, document: Route) -> CompiledRoute:
        spec = document.spec
        self._add_repeated(origin, document, "spec.rules", (rule.name for rule in spec.rules))
        rules = tuple(self._compile_rule(origin, document, rule) for rule in spec.rules)
        placeholders: tuple[str, ...] = ()
        try:
            placeholders = placeholders_of(spec.path)
            for name in sorted(_RESERVED & set(placeholders)):
                self._add(origin, document, "spec.path", f"metadata.{name} has a meaning of its own; name it otherwise")
        except ValueError as error:
            self._add(origin, document, "spec.path", str(error))
        for key, message in _status_faults(document):
            self._add(origin, document, f"status.rollouts.{key}", message)
        named = {task.name for rule in spec.rules for task in rule.tasks}
        for task in spec.pinnable:
            if task not in named:
                self._add(origin, document, f"spec.pinnable[{task}]", f"there is no task {task}")
        expressions = [expression for rule in rules for expression in _expressions_of(rule)]
        return CompiledRoute(
            document.metadata.name,
            spec,
            document.status or RouteStatus(),
            placeholders,
            rules,
            _reach_of(expressions),
            frozenset(helper for expression in expressions for helper in expression.helpers),
        )

    def _compile_rule(self, origin: str, document: Route, rule: RuleSpec) -> Rule:
        at = f"spec.rules[{rule.name}]"
        self._add_repeated(origin, document, f"{at}.tasks", (task.name for task in rule.tasks))
        self._check_tasks(origin, document, rule)
        for field_, message in (*_order_faults(rule.tasks), *_join_faults(rule)):
            self._add(origin, document, f"{at}.{field_}", message)

        def compiled(field_: str, text: str | None, roots: tuple[str, ...]) -> Expression | None:
            if text is None:
                return None
            try:
                return compile_expression(text, roots)
            except ExpressionFailed as error:
                self._add(origin, document, f"{at}.{field_}", str(error))
                return None

        def each(field_: str, texts: Mapping[str, str], roots: tuple[str, ...]) -> dict[str, Expression]:
            made = {name: compiled(f"{field_}.{name}", text, roots) for name, text in texts.items()}
            return {name: expression for name, expression in made.items() if expression is not None}

        def condition_of(field_: str, text: str | None, roots: tuple[str, ...]) -> Expression | None:
            expression = compiled(field_, text, roots)
            said = None if expression is None else _constant_fault(expression)
            if said is not None:
                self._add(origin, document, f"{at}.{field_}", said)
            return expression

        when = condition_of("when", rule.when, WHEN_ROOTS)
        result = each("result", rule.result, RESULT_ROOTS)
        reasons = each("reasons", rule.reasons, REASON_ROOTS)
        for name, expression in reasons.items():
            said = _constant_fault(expression)
            if said is not None:
                self._add(origin, document, f"{at}.reasons.{name}", said)
            for path, _ in expression.members("result"):
                if path[0] not in rule.result:
                    have = ", ".join(rule.result) or "nothing"
                    self._add(origin, document, f"{at}.reasons.{name}", f"result has no {path[0]} (there is: {have})")
        served = {task.name: self._served(task) for task in rule.tasks}
        maybe_absent = _maybe_absent(rule)
        for field_, expressions in (("result", result), ("reasons", reasons)):
            for name, expression in expressions.items():
                for message in _result_faults(expression, served, maybe_absent):
                    self._add(origin, document, f"{at}.{field_}.{name}", message)
        tasks = []
        for task in rule.tasks:
            condition = condition_of(f"tasks[{task.name}].when", task.when, RESULT_ROOTS)
            if condition is not None:
                before = {name: served[name] for name in task.after if name in served}
                for message in _result_faults(condition, before, maybe_absent):
                    self._add(origin, document, f"{at}.tasks[{task.name}].when", message)
            segments = tuple(
                compiled(f"tasks[{task.name}].shadow[{number}].segment", shadow.segment, WHEN_ROOTS)
                for number, shadow in enumerate(task.shadow)
            )
            experiment = task.select.experiment or f"{document.metadata.name}/{task.name}"
            tasks.append(CompiledTask(task, experiment, self._arms(document, rule, task), condition, segments))
        return Rule(rule, when, tuple(tasks), result, reasons)

    def _arms(self, document: Route, rule: RuleSpec, task: TaskSpec) -> tuple[tuple[str, int], ...]:
        """What a version is drawn from: a split's arms, or a rollout's two as far as it is."""
        select, rollout = task.select, task.rollout
        if select.split is not None:
            return tuple((arm.version, arm.weight) for arm in select.split)
        base = self._label(task, select.version, select.alias)
        if rollout is None or base is None:
            return ()
        status = (document.status or RouteStatus()).rollouts.get(f"{rule.name}/{task.name}")
        begun = status is not None and status.of == rollout_digest(rule.name, task)
        percent = rolled_out(rollout, status if begun else None)
        return ((base, 100 - percent), (rollout.to, percent))

    def _label(self, task: TaskSpec, version: str | None, alias: str | None) -> str | None:
        """The version that is named by itself or by an alias; None where there is none."""
        model = self.models.get(task.model)
        return version if alias is None else None if model is None else model.aliases.get(alias)

    def _served(self, task: TaskSpec) -> tuple[ModelVersionSpec, ...] | None:
        """The versions that can serve ``task``; None where one of them is not known, which is a fault by itself."""
        select = task.select
        labels: list[str | None] = [arm.version for arm in select.split or () if arm.weight > 0]
        if select.split is None:
            labels.append(self._label(task, select.version, select.alias))
        if task.rollout is not None:
            labels.append(task.rollout.to)
        labels += [self._label(task, each.version, each.alias) for each in task.fallback if each.default is None]
        found = [self.versions.get((task.model, label)) if label is not None else None for label in labels]
        versions = tuple(dict.fromkeys((spec.model, spec.version) for spec in found if spec is not None))
        return None if None in found else tuple(self.versions[identity] for identity in versions)

    def _task_faults(self, task: TaskSpec) -> list[tuple[str, str]]:
        select, model = task.select, self.models.get(task.model)
        if model is None:
            return [] if self._model_exists(task.model) else [("model", f"there is no Model {task.model}")]
        faults: list[tuple[str, str]] = []
        chosen: list[tuple[str, str]] = []

        def choose(field_: str, version: str | None, alias: str | None) -> None:
            label = version if alias is None else model.aliases.get(alias)
            if label is not None:
                chosen.append((f"{field_}.alias" if alias is not None else f"{field_}.version", label))
            elif alias is not None:
                faults.append((f"{field_}.alias", f"Model {task.model} has no alias {alias}"))

        choose("select", select.version, select.alias)
        for number, shadow in enumerate(task.shadow):
            choose(f"shadow[{number}]", shadow.version, shadow.alias)
        for number, fallback in enumerate(task.fallback):
            choose(f"fallback[{number}]", fallback.version, fallback.alias)
        arms = Counter(arm.version for arm in select.split or ())
        chosen += [(f"select.split[{version}]", version) for version in arms]
        faults += [
            ("select.split", f"version {version} is named {count} times; keep one")
            for version, count in arms.items()
            if count > 1
        ]
        if task.rollout is not None:
            chosen.append(("rollout.to", task.rollout.to))
            if self._label(task, select.version, select.alias) == task.rollout.to:
                faults.append(("rollout.to", f"version {task.rollout.to} is what the task selects already; remove it"))
        fixed = [("default", task.default)] if task.default is not None else []
        fixed += [
            (f"fallback[{number}].default", each.default)
            for number, each in enumerate(task.fallback)
            if each.default is not None
        ]
        for field_, version in chosen:
            spec = self.versions.get((task.model, version))
            if spec is not None:
                outputs = {output.name for output in spec.outputs}
                for where, answer in fixed:
                    if set(answer) != outputs:
                        given, wanted = ", ".join(sorted(answer)) or "nothing", ", ".join(sorted(outputs))
                        faults.append((where, f"names {given}, and version {version} answers {wanted}; name the same"))
                refusal = self._governance_fault(spec, decides=not field_.startswith("shadow"))
                if refusal is not None:
                    faults.append((field_, refusal))
            elif not self._version_exists(task.model, version):
                faults.append((field_, f"there is no version {version} of {task.model}"))
        return faults

    def _governance_fault(self, spec: ModelVersionSpec, *, decides: bool) -> str | None:
        """Why a version must not be used from today on; one that only runs beside another needs no approval yet."""
        if self.today is None:
            return None
        if spec.governance is None:
            lacks = (
                f"version {spec.version} has no governance: name in approvedBy who approved it, or run it as a shadow"
            )
            return lacks if decides else None
        ended = spec.governance.last_day
        return f"version {spec.version} ended on {ended}; use another" if ended and ended < self.today else None

    def _refuse_same_paths(self, routes: Sequence[tuple[str, CompiledRoute]]) -> None:
        seen: dict[tuple[str, ...], str] = {}
        for origin, route in routes:
            # Where a placeholder stands counts, not what it is called.
            names = {f"{{{name}}}" for name in route.placeholders}
            shape = tuple("{}" if segment in names else segment for segment in route.spec.path.split("/"))
            if shape in seen:
                same = f"Route {seen[shape]} has the same path; merge their rules"
                self.faults.append(Fault(origin, f"Route {route.name}", "spec.path", same))
            seen.setdefault(shape, route.name)


def _status_faults(document: Route) -> list[tuple[str, str]]:
    """What is wrong with a status that somebody wrote: rollouts that are none, and steps that they do not have."""
    if document.status is None:
        return []
    rollouts = {
        f"{rule.name}/{task.name}": (rule.name, task, task.rollout)
        for rule in document.spec.rules
        for task in rule.tasks
        if task.rollout is not None
    }
    faults = []
    for key, status in document.status.rollouts.items():
        if key not in rollouts:
            faults.append((key, "there is no such rollout"))
            continue
        rule_name, task, rollout = rollouts[key]
        if status.step >= len(rollout.steps) and status.of == rollout_digest(rule_name, task):
            faults.append((f"{key}.step", f"is {status.step}, and there are {len(rollout.steps)} steps, from 0"))
    return faults


def rollout_digest(rule: str, task: TaskSpec) -> str:
    """What a rollout's status is of: its rule, its task, and from where to where, how, it leads."""
    # Defaults are left out, so that a field that documents gain one day does not begin every rollout anew.
    named = {"name", "model", "select", "rollout"}
    content = task.model_dump(mode="json", by_alias=True, include=named, exclude_defaults=True)
    return hashlib.sha256(orjson.dumps([rule, content], option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def rolled_out(rollout: Rollout, status: RolloutStatus | None) -> int:
    """The percent of subjects that a rollout's new version has."""
    if status is None or status.state == "aborted":
        return 0
    return 100 if status.state == "promoted" else rollout.steps[min(status.step, len(rollout.steps) - 1)]


def _end_of(day: datetime.date) -> int:
    """The moment after ``day`` in UTC, epoch milliseconds."""
    midnight = datetime.datetime.combine(day, datetime.time(), datetime.UTC) + datetime.timedelta(days=1)
    return int(midnight.timestamp() * 1000)


def _expressions_of(rule: Rule) -> Iterator[Expression]:
    if rule.when is not None:
        yield rule.when
    for task in rule.tasks:
        yield from (each for each in (task.condition, *task.segments) if each is not None)
    yield from rule.result.values()
    yield from rule.reasons.values()


def _reach_of(expressions: Iterable[Expression]) -> dict[str, Reach]:
    reach: dict[str, Reach] = {}
    for expression in expressions:
        for root in expression.roots:
            own = expression.reach(root)
            reach[root] = joined(reach[root], own) if root in reach else own
    return reach


def _order_faults(tasks: Sequence[TaskSpec]) -> list[tuple[str, str]]:
    """What is wrong with ``after``: names that are none, and circles (Kahn's algorithm finds who is left in one)."""
    names = {task.name for task in tasks}
    faults = [
        (f"tasks[{task.name}].after", f"there is no task {name} in this rule")
        for task in tasks
        for name in task.after
        if name not in names
    ]
    faults += [
        (f"tasks[{task.name}].when", "needs after: the tasks whose outputs it may look at")
        for task in tasks
        if task.when is not None and not task.after
    ]
    left = {task.name: set(task.after) & names for task in tasks}
    while free := [name for name, before in left.items() if not before & left.keys()]:
        for name in free:
            del left[name]
    if left:
        faults.append(("tasks", f"{', '.join(sorted(left))} wait for one another by after; break the circle"))
    return faults


def _join_faults(rule: RuleSpec) -> list[tuple[str, str]]:
    join = rule.join
    if join.policy == "all":
        return []
    faults = [
        (f"tasks[{task.name}].need", f"join policy {join.policy} says how many answers are needed; remove it")
        for task in rule.tasks
        if "need" in task.model_fields_set
    ]
    if join.n is not None and join.n > len(rule.tasks):
        faults.append(("join.n", f"is {join.n}, and the rule has {len(rule.tasks)} tasks"))
    return faults


def _constant_fault(expression: Expression) -> str | None:
    """Why a condition that looks at nothing cannot hold or fail to hold; None where it can, or looks at something."""
    if expression.roots:
        return None
    try:
        value = expression.evaluate(Activation({}))
    except ExpressionFailed as error:
        return str(error)
    said = f"is always {_shown(value)}, and a condition is true or false; compare it with something"
    return None if isinstance(value, bool) else said


def _maybe_absent(rule: RuleSpec) -> frozenset[str]:
    """The tasks that may have no output in a decision that has a result."""
    if rule.join.policy != "all":
        return frozenset(task.name for task in rule.tasks)
    return frozenset(task.name for task in rule.tasks if task.need == "optional" or task.when is not None)


def _result_faults(
    expression: Expression, served: Mapping[str, tuple[ModelVersionSpec, ...] | None], maybe_absent: Collection[str]
) -> list[str]:
    """Why ``expression`` fails for every answer that the tasks' versions can give, or for every one of some version.

    Only what the documents prove is a fault: members named by a computed key and types of requests are not known.
    """
    named = expression.members("outputs")
    asked = {path for path, tested in named if tested}
    faults = []
    for path in dict.fromkeys(path for path, _ in named):
        task, output = path[0], path[1] if len(path) > 1 else None
        if task not in served:
            faults.append(f"outputs.{task}: there is no task {task} (there is: {', '.join(served) or 'none'})")
            continue
        versions = served[task]
        if output is None or versions is None:
            continue
        lacking = [each for each in versions if all(contract.name != output for contract in each.outputs)]
        if len(lacking) == len(versions):
            have = ", ".join(dict.fromkeys(contract.name for each in versions for contract in each.outputs))
            faults.append(f"outputs.{task}.{output}: task {task} has no output {output} (there is: {have})")
        elif lacking and path[:2] not in asked and " in " not in expression.text:
            without = ", ".join(f"{each.model} {each.version}" for each in lacking)
            faults.append(
                f"outputs.{task}.{output}: {without} has no such output; ask has(outputs.{task}.{output}) first"
            )
    absent = {path[0] for path, _ in named} & set(maybe_absent)
    if faults or absent or not set(expression.roots) <= {"outputs", "path"} or None in served.values():
        return faults
    known = {task: versions for task, versions in served.items() if versions}
    for turn in range(max(map(len, known.values()), default=0)):
        outputs = {task: _sample(versions[turn % len(versions)]) for task, versions in known.items()}
        said = expression.mistyped(Activation({"outputs": outputs, "path": "/"}))
        if said is not None:
            return [said]
    return []


_SAMPLES: Final[Mapping[str, Any]] = {"BOOL": True, "BYTES": "", "FP32": 0.5, "FP64": 0.5}


def _sample(version: ModelVersionSpec) -> dict[str, Any]:
    """An answer of the types that ``version`` declares."""
    return {output.name: _SAMPLES.get(output.datatype, 1) for output in version.outputs}


_NAMED_LISTS: Final = frozenset({"rules", "tasks", "features", "outputs"})
"""Lists whose items are called by name, so that those beside one that is left out keep what they are called."""


def _sound_part(shape: type[Document], content: Mapping[str, Any], error: ValidationError) -> Document | None:
    """The document without the rules, tasks, features and outputs in which the faults lie; None where no more helps."""
    left = orjson.loads(orjson.dumps(content))
    while True:
        details = error.errors(include_url=False)
        places = {_item_at(detail["loc"]) for detail in details if not _is_echo(detail)}
        items = sorted((place for place in places if place is not None), reverse=True)
        if not items or None in places:
            return None
        for *way, index in items:
            owner = left
            for step in way:
                owner = owner[step]
            if index < len(owner):
                del owner[index]
        try:
            return shape.model_validate_json(orjson.dumps(left))
        except ValidationError as another:
            error = another


def _item_at(location: tuple[str | int, ...]) -> tuple[Any, ...] | None:
    """The innermost item of a named list in which ``location`` lies."""
    for end in range(len(location), 1, -1):
        if isinstance(location[end - 1], int) and location[end - 2] in _NAMED_LISTS:
            return location[:end]
    return None


def _name_in(content: Mapping[str, Any]) -> str:
    metadata = content.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    return name if isinstance(name, str) else ""


def _defined_by(content: Mapping[str, Any]) -> set[tuple[str, str]]:
    kind, spec = content["kind"], content.get("spec")
    if kind == "ModelVersion" and isinstance(spec, Mapping):
        return {(kind, f"{spec.get('model')}/{spec.get('version')}")}
    return {(kind, _name_in(content))}


def _shown(value: object) -> str:
    return repr(value)[:_SHOWN_LENGTH_MAX]


_SCALAR_TYPES: Final = frozenset({"str", "int", "float", "bool"})


def _is_echo(detail: Any) -> bool:
    """pydantic counts only sound items, and so calls a list too short when what is wrong is in an item."""
    given = detail.get("input")
    return detail["type"] == "too_short" and isinstance(given, list) and len(given) >= detail["ctx"]["min_length"]


def _shape_fault(source: Source, where: str, detail: Any) -> Fault:
    kind, given = detail["type"], detail.get("input")
    field_, last = _field_at(source.content, detail["loc"])
    if kind == "union_tag_invalid":
        field_, given = f"{field_}.type", given.get("type")
    if kind == "extra_forbidden":
        if last in NOT_SUPPORTED_YET:
            message = f"not supported yet ({NOT_SUPPORTED_YET[last]}); remove it"
        else:
            message = "unknown field; remove it or correct its name"
    elif kind in ("literal_error", "union_tag_invalid") and given in VALUES_NOT_SUPPORTED_YET:
        message = f"{given} is not supported yet"
    elif last in _SCALAR_TYPES:
        message = f"{_shown(given)} is not text, a number, true, false or null"
    elif kind == "missing":
        message = "is missing"
    elif kind == "string_pattern_mismatch" and detail["ctx"]["pattern"] in IN_WORDS:
        message = f"{_shown(given)} cannot be read: write {IN_WORDS[detail['ctx']['pattern']]}"
    elif kind == "too_short" and not given:
        message = f"is empty: write at least {detail['ctx']['min_length']}"
    else:
        given_text = "" if isinstance(given, dict | list) else f" (given: {_shown(given)})"
        message = detail["msg"].removeprefix("Value error, ") + given_text
    return Fault(source.origin, where, field_, message)


def _field_at(content: object, location: Sequence[str | int]) -> tuple[str, str]:
    """A field's place as people read it, with items of lists by name; and its last part.

    pydantic's locations also name which member of a union was tried; those parts are no fields.
    """
    path, here, last = "", content, ""
    for part in location:
        last = str(part)
        if isinstance(part, int):
            here = here[part] if isinstance(here, list) and part < len(here) else None
            path += f"[{item_label(here, part)}]"
            continue
        members = here if isinstance(here, dict) else {}
        tried = part in _SCALAR_TYPES and not members
        tagged = part not in members and members.get("type") == part
        if part != "[key]" and not tried and not tagged:
            here = members.get(part)
            path += f".{part}"
    return path.removeprefix("."), last
