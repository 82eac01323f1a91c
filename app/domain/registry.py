"""The registry: documents in, one immutable, content-addressed revision out, ready to route with.

Shapes are read first (``registry_shapes``), then it is checked what the documents say of one another
(``registry_checks``), and every route is compiled (``registry_routes``); all faults are collected before anything is
refused. A revision's id is the SHA-256 of its canonical JSON, so equal content has equal ids wherever it was applied
from.
"""

import datetime
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import orjson

from app.domain.documents import Document, FeatureView, Model, ModelSpec, ModelVersion, Route
from app.domain.errors import DocumentsRefused, Fault
from app.domain.features import FeatureRef, ViewWant, wants_of
from app.domain.on_demand import Computation, Computations, closure, compile_views
from app.domain.paths import PathTree
from app.domain.registry_checks import (
    FieldFault,
    Known,
    computed_age_faults,
    model_faults,
    name_faults,
    version_faults,
    view_faults,
)
from app.domain.registry_routes import (
    CompiledRoute,
    CompiledTask,
    Rule,
    compile_route,
    rolled_out,
    rollout_digest,
    same_path_faults,
)
from app.domain.registry_shapes import Shapes, Source
from app.domain.version_documents import KafkaBackend, ModelVersionSpec
from app.domain.view_documents import FeatureViewSpec

__all__ = [
    "REVISION_BYTES_MAX",
    "CompiledRoute",
    "CompiledTask",
    "Revision",
    "Rule",
    "Source",
    "canonical",
    "compile_revision",
    "content_of",
    "load_revision",
    "parse",
    "pools_of",
    "read_revision",
    "restated",
    "revision_id",
    "rolled_out",
    "rollout_digest",
    "unapproved_of",
]

REVISION_BYTES_MAX: Final = 16 * 1024 * 1024


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
    computations: Computations = field(default_factory=dict, repr=False, compare=False)
    _wants: dict[tuple[tuple[str, str], ...], tuple[tuple[ViewWant, ...], tuple[Computation, ...]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def wants(self, versions: Iterable[ModelVersionSpec]) -> tuple[ViewWant, ...]:
        """What ``versions`` together want of stored features; worked out once for each set that meets."""
        return self._wanted(versions)[0]

    def computed(self, versions: Iterable[ModelVersionSpec]) -> tuple[Computation, ...]:
        """What is computed on demand for ``versions``, each after its ingredients."""
        return self._wanted(versions)[1] if self.computations else ()

    def _wanted(self, versions: Iterable[ModelVersionSpec]) -> tuple[tuple[ViewWant, ...], tuple[Computation, ...]]:
        chosen = tuple(versions)
        key = tuple((version.model, version.version) for version in chosen)
        wanted = self._wants.get(key)
        if wanted is None:
            contracts = [contract for version in chosen for contract in version.features]
            ages: dict[FeatureRef, int | None] = {}
            for contract in contracts:
                ref = (contract.source, contract.feature)
                ages[ref] = _strictest(ages.get(ref), contract.max_age)
            made = closure(ages, self.computations)
            for computation in reversed(made):
                # What is computed is as old as its ingredients, so none of them may be older.
                for each in computation.ingredients:
                    ages[each.ref] = _strictest(ages.get(each.ref), ages.get(computation.ref))
            ingredients = {each.ref: ages[each.ref] for computation in made for each in computation.ingredients}
            wanted = self._wants[key] = wants_of(contracts, self.views, ingredients), made
        return wanted


def _strictest(one: int | None, other: int | None) -> int | None:
    return min((age for age in (one, other) if age is not None), default=None)


def read_revision(sources: Iterable[Source], *, today: datetime.date | None = None) -> Revision:
    """The revision that ``sources`` make together: shapes, references and expressions checked in one go.

    ``today`` (UTC) refuses versions whose validity has ended, and the use of those that nobody approved; None leaves
    governance alone, for a revision that was accepted once stays loadable.

    Raises:
        DocumentsRefused: everything wrong in any of them.
    """
    shapes = Shapes()
    shapes.read(sources)
    return _compiled(shapes, today)


def parse(sources: Iterable[Source]) -> tuple[Document, ...]:
    """The documents that ``sources`` hold, each by itself.

    Raises:
        DocumentsRefused: everything wrong with their shapes.
    """
    shapes = Shapes()
    shapes.read(sources)
    if shapes.faults:
        raise DocumentsRefused(shapes.faults)
    return tuple(document for _, document in shapes.documents)


def compile_revision(
    documents: Iterable[Document], *, today: datetime.date | None = None, origin: str = ""
) -> Revision:
    """The revision that ``documents`` of ``origin`` make together; ``today`` and errors as in ``read_revision``."""
    return _compiled(Shapes([(origin, document) for document in documents]), today)


def restated(revision: Revision, documents: Iterable[Document]) -> Revision:
    """As ``compile_revision`` of ``documents``, which are mostly those of ``revision`` with another status of rollouts.

    Only routes whose status is another are compiled anew; where more than that differs, all is.
    """
    given = tuple(documents)
    if len(given) != len(revision.documents) or not all(map(_alike_but_status, revision.documents, given)):
        return compile_revision(given)
    known = Known.of(given)
    before = iter(revision.routes)
    faults: list[Fault] = []
    routes: list[CompiledRoute] = []
    for old, document in zip(revision.documents, given, strict=True):
        if not isinstance(document, Route):
            continue
        compiled = next(before)
        if document is not old:
            found, compiled_anew = _checked(known, document, None, whole=True)
            faults += (Fault("", f"Route {document.metadata.name}", *each) for each in found)
            compiled = compiled_anew or compiled
        routes.append(compiled)
    content = canonical(given)
    faults += _size_faults(content)
    if faults:
        raise DocumentsRefused(faults)
    paths = PathTree((route.spec.path, route) for route in routes)
    return replace(revision, id=revision_id(content), documents=given, routes=tuple(routes), paths=paths)


def _alike_but_status(one: Document, other: Document) -> bool:
    if one is other:
        return True
    if not (isinstance(one, Route) and isinstance(other, Route)):
        return False
    return (one.api_version, one.metadata, one.spec) == (other.api_version, other.metadata, other.spec)


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


def unapproved_of(revision: Revision) -> tuple[str, ...]:
    """Which versions that nobody approved a task would decide by, each with its route and task.

    `apply` publishes none; one that was written by hand is not asked, and its task goes on as if it had expired.
    """
    known = Known(revision.models, revision.views, {}, revision.versions)
    return tuple(
        f"Route {route.name}, rule {rule.spec.name}, task {task.spec.name}: {version.model} {version.version}"
        for route in revision.routes
        for rule in route.rules
        for task in rule.tasks
        for version in known.served(task.spec) or ()
        if version.governance is None
    )


def pools_of(revision: Revision) -> frozenset[str]:
    """The worker pools that versions of ``revision`` run in."""
    return frozenset(spec.backend.pool for spec in revision.versions.values() if isinstance(spec.backend, KafkaBackend))


def _compiled(shapes: Shapes, today: datetime.date | None) -> Revision:
    """The revision, if nothing at all is wrong."""
    documents = tuple(document for _, document in shapes.documents)
    known = Known.of(documents, shapes.unread)
    named = [*shapes.documents, *((part.origin, part.document) for part in shapes.parts)]
    faults = [*shapes.faults, *name_faults(named)]
    routes: list[tuple[str, CompiledRoute]] = []
    for origin, document in shapes.documents:
        found, route = _checked(known, document, today, whole=True)
        faults += (Fault(origin, f"{document.kind} {document.metadata.name}", *each) for each in found)
        if route is not None:
            routes.append((origin, route))
    in_parts: list[tuple[str, CompiledRoute]] = []
    for part in shapes.parts:
        found, route = _checked(known, part.document, today, whole=False)
        faults += (part.fault(*each) for each in found)
        if route is not None:
            in_parts.append((part.origin, route))
    faults += same_path_faults([*routes, *in_parts])
    computations, broken = _computations(known, shapes)
    faults += broken
    for origin, document in shapes.documents if computations else ():
        said = computed_age_faults(known, document, computations)
        faults += (Fault(origin, f"{document.kind} {document.metadata.name}", *each) for each in said)
    content = canonical(documents)
    faults += _size_faults(content)
    if faults:
        raise DocumentsRefused(faults)
    ordered = tuple(route for _, route in routes)
    tree = PathTree((route.spec.path, route) for route in ordered)
    expires = {
        identity: _end_of(spec.governance.last_day)
        for identity, spec in known.versions.items()
        if spec.governance is not None and spec.governance.last_day is not None
    }
    return Revision(
        revision_id(content),
        documents,
        ordered,
        known.models,
        known.versions,
        known.views,
        expires,
        tree,
        computations,
    )


def _size_faults(content: bytes) -> list[Fault]:
    if len(content) <= REVISION_BYTES_MAX:
        return []
    said = f"the revision has {len(content)} bytes, and {REVISION_BYTES_MAX} are allowed: remove old versions"
    return [Fault("", "", "", said)]


def _computations(known: Known, shapes: Shapes) -> tuple[Computations, list[Fault]]:
    """What views compute on demand; nothing where one could not be read, for others may be made of it."""
    if any(kind == "FeatureView" for kind, _ in shapes.unread):
        return {}, []
    computations, broken = compile_views(known.views)
    origins = {each.metadata.name: origin for origin, each in shapes.documents if isinstance(each, FeatureView)}
    return computations, [
        Fault(origins[each.view], f"FeatureView {each.view}", f"spec.{each.field}", each.message) for each in broken
    ]


def _checked(
    known: Known, document: Document, today: datetime.date | None, *, whole: bool
) -> tuple[list[FieldFault], CompiledRoute | None]:
    """What is wrong with a document beside others, and the route that it is, if it is one."""
    match document:
        case ModelVersion():
            return list(version_faults(known, document, today, whole=whole)), None
        case FeatureView():
            return list(view_faults(document)), None
        case Model():
            return list(model_faults(known, document)), None
        case Route():
            faults: list[FieldFault] = []
            return faults, compile_route(known, document, today, lambda *fault: faults.append(fault))


def _end_of(day: datetime.date) -> int:
    """The moment after ``day`` in UTC, epoch milliseconds."""
    midnight = datetime.datetime.combine(day, datetime.time(), datetime.UTC) + datetime.timedelta(days=1)
    return int(midnight.timestamp() * 1000)
