"""The registry: documents in, one immutable, content-addressed revision out, ready to route with.

``parse`` checks shapes, ``compile_revision`` checks what the documents say of one another and compiles every
expression; both collect all faults before they refuse. A revision's id is the SHA-256 of its canonical JSON, so equal
content has equal ids wherever it was applied from.
"""

import datetime
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
from pydantic import ValidationError

from app.domain.documents import (
    KINDS,
    NOT_SUPPORTED_YET,
    VALUES_NOT_SUPPORTED_YET,
    Document,
    FeatureContract,
    FeatureView,
    FeatureViewSpec,
    Model,
    ModelSpec,
    ModelVersion,
    ModelVersionSpec,
    Route,
    RouteSpec,
    RuleSpec,
    TaskSpec,
)
from app.domain.errors import DocumentsRefused, ExpressionFailed
from app.domain.expressions import Expression, compile_expression
from app.domain.features import REQUEST_SOURCES, coerce

WHEN_ROOTS: Final = ("path", "entities", "inputs", "metadata")
RESULT_ROOTS: Final = ("outputs", *WHEN_ROOTS)
REVISION_BYTES_MAX: Final = 16 * 1024 * 1024
_PLACEHOLDER: Final = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, slots=True)
class Source:
    """One document as it was read: where from, and what it says."""

    origin: str
    content: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule, compiled."""

    spec: RuleSpec
    when: Expression | None
    result: Mapping[str, Expression]


@dataclass(frozen=True, slots=True)
class CompiledRoute:
    """A route, compiled: ``pattern`` matches paths and names placeholders."""

    name: str
    spec: RouteSpec
    pattern: re.Pattern[str]
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Revision:
    """One whole state of the registry; what a request sees from start to end."""

    id: str
    documents: tuple[Document, ...]
    routes: tuple[CompiledRoute, ...]
    models: Mapping[str, ModelSpec]
    versions: Mapping[tuple[str, str], ModelVersionSpec]
    views: Mapping[str, FeatureViewSpec]


def parse(sources: Iterable[Source]) -> tuple[Document, ...]:
    """The documents that ``sources`` hold.

    Raises:
        DocumentsRefused: every fault of every document, each as ``origin: kind name: field: what is wrong``.
    """
    documents: list[Document] = []
    faults: list[str] = []
    for source in sources:
        kind = source.content.get("kind")
        shape = KINDS.get(kind) if isinstance(kind, str) else None
        if shape is None:
            faults.append(f"{source.origin}: kind {kind!r} is unknown: use one of {', '.join(sorted(KINDS))}")
            continue
        metadata = source.content.get("metadata")
        name = metadata.get("name") if isinstance(metadata, dict) else None
        try:
            documents.append(shape.model_validate_json(orjson.dumps(source.content)))
        except ValidationError as error:
            faults += [f"{source.origin}: {kind} {name}: {_fault(detail)}" for detail in error.errors()]
        except TypeError as error:
            faults.append(f"{source.origin}: {kind} {name}: {error}")
    if faults:
        raise DocumentsRefused(faults)
    return tuple(documents)


def _fault(detail: Any) -> str:
    location = [str(part) for part in detail["loc"] if part not in ("http", "kafka")]
    field, given = ".".join(location), detail.get("input")
    kind = detail["type"]
    if kind == "extra_forbidden":
        last = location[-1]
        if last in NOT_SUPPORTED_YET:
            return f"{field}: not supported yet ({NOT_SUPPORTED_YET[last]}); remove it"
        return f"{field}: unknown field; remove it or correct its name"
    if kind == "union_tag_invalid":
        tag = given.get("type") if isinstance(given, dict) else given
        field, given = f"{field}.type", tag
    if kind in ("literal_error", "union_tag_invalid") and given in VALUES_NOT_SUPPORTED_YET:
        return f"{field}: {given} is not supported yet"
    message = detail["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(given, dict | list) or kind == "missing" else f" (given: {str(given)[:80]!r})"
    return f"{field or 'document'}: {message}{shown}"


def compile_revision(documents: Sequence[Document], *, today: datetime.date | None = None) -> Revision:
    """The revision that ``documents`` make together.

    ``today`` (UTC) refuses versions whose validity has ended; None leaves validity alone, for a revision that was
    accepted once stays loadable.

    Raises:
        DocumentsRefused: every fault found, each naming its document and field.
    """
    faults: list[str] = []
    seen = Counter((document.kind, document.metadata.name) for document in documents)
    faults += [
        f"{kind} {name}: {count} documents have this name; keep one"
        for (kind, name), count in seen.items()
        if count > 1
    ]
    models = {d.metadata.name: d.spec for d in documents if isinstance(d, Model)}
    views = {d.metadata.name: d.spec for d in documents if isinstance(d, FeatureView)}
    versions: dict[tuple[str, str], ModelVersionSpec] = {}
    for document in documents:
        if isinstance(document, ModelVersion):
            identity = (document.spec.model, document.spec.version)
            if identity in versions:
                faults.append(
                    f"ModelVersion {document.metadata.name}: spec.version: model {identity[0]} already has a version "
                    f"{identity[1]}; number it anew"
                )
            versions[identity] = document.spec
    for document in documents:
        if isinstance(document, ModelVersion):
            faults += _version_faults(document, models, views, today)
        elif isinstance(document, FeatureView):
            faults += _view_faults(document)
        elif isinstance(document, Model):
            faults += [
                f"Model {document.metadata.name}: spec.aliases.{alias}: there is no version {version} of it"
                for alias, version in document.spec.aliases.items()
                if (document.metadata.name, version) not in versions
            ]
    routes = [_compile_route(d, models, versions, faults) for d in documents if isinstance(d, Route)]
    _refuse_same_paths(routes, faults)
    if faults:
        raise DocumentsRefused(faults)
    content = canonical(documents)
    if len(content) > REVISION_BYTES_MAX:
        raise DocumentsRefused([f"the revision has {len(content)} bytes; {REVISION_BYTES_MAX} are allowed: split it"])
    # Literal segments come before placeholders at each place of a path, so the more specific route is met first.
    routes.sort(key=lambda route: [segment.startswith("{") for segment in route.spec.path.split("/")])
    return Revision(revision_id(content), tuple(documents), tuple(routes), models, versions, views)


def canonical(documents: Iterable[Document]) -> bytes:
    """The documents' canonical JSON: sorted by kind and name, members sorted, defaults left out."""
    ordered = sorted(documents, key=lambda document: (document.kind, document.metadata.name))
    return orjson.dumps(
        [document.model_dump(mode="json", by_alias=True, exclude_unset=True) for document in ordered],
        option=orjson.OPT_SORT_KEYS,
    )


def revision_id(content: bytes) -> str:
    """A revision's id: ``sha256:`` and the digest of its canonical JSON."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def load_revision(identity: str, content: bytes) -> Revision:
    """A published revision, from its canonical JSON.

    Raises:
        DocumentsRefused: the content does not hash to ``identity``, or is not a sound revision.
    """
    if revision_id(content) != identity:
        raise DocumentsRefused([f"revision {identity}: its content hashes to {revision_id(content)}; publish it anew"])
    try:
        entries = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise DocumentsRefused([f"revision {identity}: not JSON: {error}"]) from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DocumentsRefused([f"revision {identity}: not a list of documents"])
    return compile_revision(parse(Source(identity[:19], entry) for entry in entries))


def _version_faults(
    document: ModelVersion,
    models: Mapping[str, ModelSpec],
    views: Mapping[str, FeatureViewSpec],
    today: datetime.date | None,
) -> list[str]:
    spec, where = document.spec, f"ModelVersion {document.metadata.name}"
    faults = []
    if spec.model not in models:
        faults.append(f"{where}: spec.model: there is no Model {spec.model}")
    if today is not None and spec.governance and spec.governance.last_day and spec.governance.last_day < today:
        faults.append(
            f"{where}: spec.governance.validUntil: ended on {spec.governance.last_day}; have it validated again"
        )
    columns = Counter(contract.column for contract in spec.features)
    faults += [f"{where}: spec.features: {name} is named {n} times" for name, n in columns.items() if n > 1]
    outputs = Counter(output.name for output in spec.outputs)
    faults += [f"{where}: spec.outputs: {name} is named {n} times" for name, n in outputs.items() if n > 1]
    for index, contract in enumerate(spec.features):
        fault = _contract_fault(contract, views)
        if fault:
            faults.append(f"{where}: spec.features.{index}: {fault}")
    return faults


def _contract_fault(contract: FeatureContract, views: Mapping[str, FeatureViewSpec]) -> str | None:
    if contract.source in REQUEST_SOURCES:
        if contract.max_age is not None:
            return f"maxAge of {contract.ref}: a request's own values have no age; remove it"
        type_: str | None = contract.type
    else:
        view = views.get(contract.source)
        if view is None:
            return f"ref {contract.ref}: there is no FeatureView {contract.source}"
        type_ = next((feature.type for feature in view.features if feature.name == contract.feature), None)
        if type_ is None:
            return f"ref {contract.ref}: FeatureView {contract.source} has no feature {contract.feature}"
        if contract.type is not None:
            return f"type of {contract.ref}: its FeatureView declares it; remove it here"
    try:
        if type_ is not None:
            coerce(contract.default, type_)
    except ValueError as error:
        return f"default of {contract.ref}: {error}"
    return None


def _view_faults(document: FeatureView) -> list[str]:
    where = f"FeatureView {document.metadata.name}"
    names = Counter(feature.name for feature in document.spec.features)
    faults = [f"{where}: spec.features: {name} is named {n} times" for name, n in names.items() if n > 1]
    keys = Counter(entity.name for entity in document.spec.entities)
    faults += [f"{where}: spec.entities: {name} is named {n} times" for name, n in keys.items() if n > 1]
    if document.metadata.name in REQUEST_SOURCES:
        faults.append(f"{where}: metadata.name: {document.metadata.name} means the request's own values; rename it")
    return faults


def _compile_route(
    document: Route,
    models: Mapping[str, ModelSpec],
    versions: Mapping[tuple[str, str], ModelVersionSpec],
    faults: list[str],
) -> CompiledRoute:
    where = f"Route {document.metadata.name}"
    rules = []
    names = Counter(rule.name for rule in document.spec.rules)
    faults += [f"{where}: spec.rules: {name} is named {n} times" for name, n in names.items() if n > 1]
    for rule in document.spec.rules:
        at = f"{where}: rule {rule.name}"
        tasks = Counter(task.name for task in rule.tasks)
        faults += [f"{at}: tasks: {name} is named {n} times" for name, n in tasks.items() if n > 1]
        for task in rule.tasks:
            faults += [f"{at}: task {task.name}: {fault}" for fault in _task_faults(task, models, versions)]
        when = None if rule.when is None else _compiled(f"{at}: when", rule.when, WHEN_ROOTS, faults)
        result = {
            name: expression
            for name, text in rule.result.items()
            if (expression := _compiled(f"{at}: result.{name}", text, RESULT_ROOTS, faults)) is not None
        }
        rules.append(Rule(rule, when, result))
    try:
        pattern = path_pattern(document.spec.path)
    except ValueError as error:
        faults.append(f"{where}: spec.path: {error}")
        pattern = re.compile("(?!)")
    return CompiledRoute(document.metadata.name, document.spec, pattern, tuple(rules))


def _compiled(where: str, text: str, roots: tuple[str, ...], faults: list[str]) -> Expression | None:
    try:
        return compile_expression(text, roots)
    except ExpressionFailed as error:
        faults.append(f"{where}: {error}")
        return None


def _task_faults(
    task: TaskSpec,
    models: Mapping[str, ModelSpec],
    versions: Mapping[tuple[str, str], ModelVersionSpec],
) -> list[str]:
    model = models.get(task.model)
    if model is None:
        return [f"model: there is no Model {task.model}"]
    faults = []
    select = task.select
    chosen: list[tuple[str, str]] = []
    if select.alias is not None:
        if select.alias not in model.aliases:
            return [f"select.alias: Model {task.model} has no alias {select.alias}"]
        chosen.append(("select.alias", model.aliases[select.alias]))
    if select.version is not None:
        chosen.append(("select.version", select.version))
    for arm in select.split or ():
        chosen.append(("select.split", arm.version))
    arms = Counter(arm.version for arm in select.split or ())
    faults += [f"select.split: version {version} is named {n} times" for version, n in arms.items() if n > 1]
    for field, version in chosen:
        spec = versions.get((task.model, version))
        if spec is None:
            faults.append(f"{field}: there is no version {version} of {task.model}")
            continue
        outputs = {output.name for output in spec.outputs}
        if task.default is not None and set(task.default) != outputs:
            faults.append(
                f"default: names {', '.join(sorted(task.default))}, and version {version} answers "
                f"{', '.join(sorted(outputs))}; give each output once"
            )
    return faults


def _refuse_same_paths(routes: Sequence[CompiledRoute], faults: list[str]) -> None:
    by_shape: dict[str, str] = {}
    for route in routes:
        shape = _PLACEHOLDER.sub("{}", route.spec.path)
        if shape in by_shape:
            faults.append(
                f"Route {route.name}: spec.path: Route {by_shape[shape]} has the same path; merge their rules"
            )
        by_shape[shape] = route.name


def path_pattern(path: str) -> re.Pattern[str]:
    """The pattern of a route's path; each placeholder is one whole segment.

    Raises:
        ValueError: a placeholder is not a whole segment, or is named twice.

    >>> path_pattern("/credit/{product}").fullmatch("/credit/card").groupdict()
    {'product': 'card'}
    """
    parts = []
    for segment in path.split("/"):
        placeholder = _PLACEHOLDER.fullmatch(segment)
        if placeholder:
            parts.append(f"(?P<{placeholder[1]}>[^/]+)")
        elif "{" in segment or "}" in segment or "*" in segment:
            raise ValueError(f"segment {segment!r}: a placeholder is a whole segment, as in /credit/{{product}}")
        else:
            parts.append(re.escape(segment))
    try:
        return re.compile("/".join(parts))
    except re.error as error:
        raise ValueError(f"{path}: {error}") from error
