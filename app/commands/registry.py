"""``model-broker apply`` and ``get``: the registry's documents published and shown."""

import dataclasses
import datetime
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

import orjson
import typer
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from app.adapters.documents_yaml import read_directory
from app.adapters.registry_topic import (
    MESSAGE_LENGTH_MAX,
    POINTER_DELETED,
    Head,
    publish_revision,
    read_head,
    read_published,
)
from app.adapters.topics import TopicAdmin, pool_topic, read_documents, wanted_topics
from app.commands.failures import exit_code
from app.commands.pace import PACE, Pace
from app.domain.documents import Document, Model, ModelVersion, Route
from app.domain.errors import BrokerError, ConfigurationError, DocumentsRefused, PublisherFenced, RevisionConflict
from app.domain.registry import Revision, canonical, content_of, pools_of, read_revision, restated
from app.domain.registry_diff import Change, differences
from app.domain.rollout_status import status_faults, with_status, without_status
from app.domain.version_documents import HttpBackend
from app.domain.view_documents import HttpSource
from app.durations import format_duration
from app.garbage import uncollected
from app.settings import Settings

KINDS: Final = {
    "route": "Route",
    "model": "Model",
    "modelversion": "ModelVersion",
    "featureview": "FeatureView",
}
"""What `get` understands, beside plurals and capitals."""

_VALUE_LENGTH_MAX: Final = 60
_PUBLISH_ATTEMPTS: Final = 3
_FENCED_MAX: Final = 6
"""Times that a command steps aside for other publishers before it says that they are too many."""
_DIGEST: Final = re.compile(r"\b(sha256:[0-9a-f]{12})[0-9a-f]{52}\b")

registry_app = typer.Typer(rich_markup_mode=None, add_completion=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Files = Annotated[list[Path], typer.Option("-f", "--file", help="A directory or file of documents. May be repeated.")]
Message = Annotated[str | None, typer.Option("--message", "-m", help="Why, on one line, for the history.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Validate and show the difference only.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Publish without asking; needed without a terminal.")]


# --- apply ------------------------------------------------------------------------------------------------------------


@registry_app.command("apply", epilog="Example: model-broker apply -f registry --yes")
def apply(
    file: Files,
    message: Message = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Make these documents the whole registry: validate all, show what changes, publish one revision.

    What is not among them is removed. Task topics of new pools are created. Rollouts that stay the same go on where
    they are; new and changed ones begin.
    """
    settings = Settings()
    try:
        check_message(message)
        with uncollected():
            written = read_files(file, today=today())
            draft = Draft(
                lambda head, now_ms: with_status(written.documents, head.carried, now_ms),
                lambda documents: written if documents == written.documents else restated(written, documents),
            )
            offered = offer(
                settings,
                draft,
                read_head(settings),
                message=message,
                dry_run=dry_run,
                yes=yes,
                as_json=as_json,
            )
    except BrokerError as error:
        fail(error, as_json=as_json, publishing=True)
    if as_json:
        typer.echo(orjson.dumps(offered.as_json()))
    elif offered.published:
        typer.echo(f"Published {offered.revision.id}: {len(offered.revision.documents)} documents.")
    elif offered.unchanged:
        typer.echo(f"Nothing to publish: {offered.revision.id} is the current revision.")
    else:
        documents = len(offered.revision.documents)
        typer.echo(f"Sound: {documents} documents make {offered.named}. Nothing was published.")


def today() -> datetime.date:
    """The day in UTC: a version may be used until the end of its last one."""
    return datetime.datetime.now(datetime.UTC).date()


def check_message(message: str | None) -> None:
    """Raises ConfigurationError for a message that the history cannot hold."""
    if message is not None and not (0 < len(message) <= MESSAGE_LENGTH_MAX and message.isprintable()):
        raise ConfigurationError(f"--message: one line of 1 to {MESSAGE_LENGTH_MAX} printable characters")


@dataclass(frozen=True, slots=True)
class Draft:
    """What a command would publish: the documents after a head at a moment (epoch milliseconds), and their revision.

    What begins with a publication says when that was, so the same draft makes other documents at another moment.
    """

    documents: Callable[[Head, int], tuple[Document, ...]]
    compile: Callable[[tuple[Document, ...]], Revision]


@dataclass(frozen=True, slots=True)
class Offered:
    """What was made of an offer: the revision, the head that it was held against, and whether it was published.

    ``timed``: the revision has the moment of its publication in it, so its id is not known before.
    """

    revision: Revision
    head: Head
    changes: tuple[Change, ...]
    published: bool = False
    timed: bool = False

    @property
    def unchanged(self) -> bool:
        """Whether it was the current revision already."""
        return self.head.published is not None and self.head.id == self.revision.id

    @property
    def named(self) -> str:
        """The revision's id, or why it has none yet."""
        if self.timed and not self.published:
            return "a revision whose id holds the moment of its publication, as a rollout begins or pauses with it"
        return self.revision.id

    def as_json(self) -> dict[str, Any]:
        """The same, for programs; ``revision`` is null where its id is not known yet."""
        return {
            "revision": None if self.timed and not self.published else self.revision.id,
            "previous": self.head.id,
            "documents": len(self.revision.documents),
            "changes": [_change_json(change) for change in self.changes],
            "published": self.published,
        }


def offer(
    settings: Settings,
    draft: Draft,
    head: Head,
    *,
    message: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    pace: Pace = PACE,
) -> Offered:
    """Show what ``draft`` makes of ``head`` changes, ask, publish.

    What is published says when it was, and not when it was shown. Where only a rollout moved on meanwhile, what was
    shown still holds, and the revision is made anew from there; where somebody published the very same, nothing is left
    to do. For another publisher that is at it, this one steps aside for a random time.

    Raises:
        RevisionConflict: somebody published other documents meanwhile.
        BrokerError: as ``publish_revision``.
    """
    offered = _held_against(head, draft, pace.now_ms())
    if not as_json:
        print_changes(offered.changes, head, None if offered.timed else offered.revision)
    if dry_run or offered.unchanged:
        return offered
    if not yes:
        _confirm()
    _create_pool_topics(settings, offered.revision)
    conflicts = fenced = 0
    while True:
        now_ms = pace.now_ms()
        offered = _held_against(offered.head, draft, now_ms, offered)
        if offered.unchanged:
            return offered
        try:
            publish_revision(settings, offered.revision, expected=offered.head, now_ms=now_ms, message=message)
            return replace(offered, published=True)
        except PublisherFenced:
            if fenced == _FENCED_MAX:
                raise
            pace.step_aside(fenced)
            fenced += 1
        except RevisionConflict:
            conflicts += 1
            if conflicts == _PUBLISH_ATTEMPTS:
                raise
        seen = offered.head
        offered = _held_against(read_head(settings), draft, pace.now_ms(), offered)
        if not (offered.unchanged or _same(seen, offered.head) or _differ_in_status_only(seen, offered.head)):
            raise RevisionConflict(
                f"the current revision is {offered.head.id or 'none'} by now, not {seen.id or 'none'}: nothing was "
                "published; look at the difference again and apply again"
            )


def _held_against(head: Head, draft: Draft, now_ms: int, before: Offered | None = None) -> Offered:
    """What ``draft`` makes of ``head``; the revision of ``before`` where it is the same still."""
    documents = draft.documents(head, now_ms)
    if before is not None and documents == before.revision.documents:
        if head is before.head:
            return before
        revision = before.revision
    else:
        revision = draft.compile(documents)
    timed = draft.documents(head, now_ms + 1) != documents
    return Offered(revision, head, differences(head.carried, revision.documents), timed=timed)


def _same(before: Head, after: Head) -> bool:
    """Whether nothing was published in between, nor another pointer that is refused."""
    return before.id == after.id and (after.published is not None or before.offset == after.offset)


def _differ_in_status_only(before: Head, after: Head) -> bool:
    if before.published is None or after.published is None:
        return False
    written = (without_status(head.revision.documents) for head in (before.published, after.published))
    return len({canonical(documents) for documents in written}) == 1


def read_files(paths: list[Path], *, today: datetime.date | None) -> Revision:
    """The revision that files and directories make; ``today`` as in ``read_revision``."""
    sources, found = read_directory(paths)
    faults = (*found, *status_faults(sources))
    try:
        revision = read_revision(sources, today=today)
    except DocumentsRefused as error:
        raise DocumentsRefused([*faults, *error.faults]) from error
    if faults:
        raise DocumentsRefused(faults)
    if not revision.documents:
        raise ConfigurationError("the files hold no documents; an empty registry would reject every request")
    return revision


def _confirm() -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigurationError(
            "no terminal to confirm on, and nothing was published: pass --yes, or --dry-run to look"
        )
    if not typer.confirm("Publish this revision?"):
        typer.echo("Not confirmed: nothing was published.", err=True)
        raise typer.Exit(1)


def _create_pool_topics(settings: Settings, revision: Revision) -> None:
    pools = pools_of(revision)
    admin = TopicAdmin(settings)
    absent = {settings.topic(pool_topic(pool)) for pool in pools} - admin.partition_counts().keys()
    if absent:
        wanted = wanted_topics(read_documents(), settings, pools)
        admin.apply([topic for topic in wanted if topic.name.removesuffix("-dlt") in absent])


def print_changes(changes: tuple[Change, ...], head: Head, revision: Revision | None) -> None:
    """Print what changes; ``revision`` is None where its id is not known yet."""
    console = Console(stderr=True)
    if head.faults:
        said = "The current revision is refused; what changes is told against the last sound one, by which workers go:"
        console.print(said, style="bold red", soft_wrap=True)
        for fault in head.faults:
            console.print(f"  {fault}", markup=False, highlight=False)
    if head.deleted:
        console.print(f"Note: {POINTER_DELETED}", markup=False, highlight=False, soft_wrap=True)
    if not changes:
        return
    out = Console(highlight=False)
    for document, own in groupby(changes, key=lambda change: change.document):
        for number, change in enumerate(own):
            if not change.field:
                out.print(Text.assemble((document, "bold"), f": {'new' if change.kind == 'added' else 'removed'}"))
                continue
            if number == 0:
                out.print(Text(document, style="bold"))
            said = f"{change.field}: {shortened(change.before)} → {shortened(change.after)}"
            out.print(Padding(Text(said, overflow="fold"), (0, 0, 0, 2), expand=False))
    counts = {kind: sum(change.kind == kind for change in changes) for kind in ("added", "changed", "removed")}
    made = "" if revision is None else f" → {shortened(revision.id)}"
    typer.echo(", ".join(f"{count} {kind}" for kind, count in counts.items() if count) + made)


def shortened(value: object) -> str:
    """A value on one line, digests and long texts cut."""
    if value is None:
        return "-"
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    text = _DIGEST.sub(r"\1…", text)
    return text if len(text) <= _VALUE_LENGTH_MAX else f"{text[: _VALUE_LENGTH_MAX - 1]}…"


def _change_json(change: Change) -> dict[str, Any]:
    return {
        "document": change.document,
        "field": change.field,
        "change": change.kind,
        "before": change.before,
        "after": change.after,
    }


# --- get --------------------------------------------------------------------------------------------------------------


@registry_app.command("get", epilog="Example: model-broker get routes credit-decision -o yaml")
def get(
    kind: Annotated[str, typer.Argument(help="routes, models, modelversions or featureviews; singular works too.")],
    name: Annotated[str | None, typer.Argument(help="Only this document.")] = None,
    output: Annotated[
        Literal["table", "yaml", "json"],
        typer.Option("-o", "--output", help="yaml can be applied again; json has the status too."),
    ] = "table",
    as_json: Json = False,
) -> None:
    """Show documents of the current revision."""
    try:
        wanted = KINDS.get(kind.lower().removesuffix("s"))
        if wanted is None:
            raise ConfigurationError(f"no kind {kind}: use {', '.join(f'{known}s' for known in KINDS)}")
        published = read_published(Settings())
        if published is None:
            raise ConfigurationError("no revision was published yet: `model-broker apply -f DIR`")
        found = [each for each in published.revision.documents if each.kind == wanted]
        documents = [each for each in found if name is None or each.metadata.name == name]
        if name is not None and not documents:
            names = ", ".join(each.metadata.name for each in found) or "none"
            raise ConfigurationError(f"no {wanted} {name} in {published.revision.id}; there is {names[:500]}")
    except BrokerError as error:
        fail(error, as_json=as_json)
    if as_json or output == "json":
        contents = [content_of(document) for document in documents]
        typer.echo(orjson.dumps({"revision": published.revision.id, "documents": contents}))
    elif output == "yaml":
        written = [content_of(document) for document in without_status(documents)]
        typer.echo(yaml.safe_dump_all(written, sort_keys=False, allow_unicode=True), nl=False)
    else:
        Console().print(_documents_table(wanted, documents, published.revision))


def _documents_table(kind: str, documents: list[Document], revision: Revision) -> Table:
    columns = {
        "Route": ("name", "path", "deadline", "rules", "models"),
        "Model": ("name", "owner", "aliases", "versions"),
        "ModelVersion": ("name", "model", "version", "backend", "features", "approved by"),
        "FeatureView": ("name", "entities", "features", "project"),
    }[kind]
    table = Table(*columns, box=SIMPLE_HEAD, caption=revision.id, caption_justify="left")
    for column in table.columns:
        column.overflow = "fold"
    for document in sorted(documents, key=lambda each: each.metadata.name):
        table.add_row(document.metadata.name, *_cells(document, revision))
    return table


def _cells(document: Document, revision: Revision) -> tuple[str, ...]:
    if isinstance(document, Route):
        route = document.spec
        models = dict.fromkeys(task.model for rule in route.rules for task in rule.tasks)
        rules = ", ".join(rule.name for rule in route.rules)
        return route.path, format_duration(route.deadline), rules, ", ".join(models)
    if isinstance(document, Model):
        aliases = ", ".join(f"{alias}: {version}" for alias, version in document.spec.aliases.items())
        versions = sorted(version for model, version in revision.versions if model == document.metadata.name)
        return document.spec.owner, aliases, ", ".join(versions)
    if isinstance(document, ModelVersion):
        version, backend = document.spec, document.spec.backend
        served = ", ".join(backend.endpoints) if isinstance(backend, HttpBackend) else f"pool {backend.pool}"
        approved = version.governance.approved_by if version.governance else "-"
        return version.model, version.version, served, str(len(version.features)), approved
    view = document.spec
    entities = ", ".join(f"{entity.name} ({entity.type})" for entity in view.entities)
    if isinstance(view.source, HttpSource):
        source = f"http: {', '.join(view.source.endpoints)}"
    else:
        source = "on demand" if view.source is None else view.project
    return entities or "-", ", ".join(view.types), source


# --- errors -----------------------------------------------------------------------------------------------------------


def fail(error: BrokerError, *, as_json: bool, publishing: bool = False) -> NoReturn:
    """End the command: each fault a line, and with ``--json`` all of them as its document.

    ``publishing``: the command would have published, and says that it did not.
    """
    faults = error.faults if isinstance(error, DocumentsRefused) else ()
    if as_json:
        listed = [dataclasses.asdict(fault) for fault in faults]
        typer.echo(orjson.dumps({"error": str(error) if not faults else "documents refused", "faults": listed}))
    for fault in faults:
        typer.echo(f"error: {fault}", err=True)
    if faults:
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        typer.echo(f"{count}: nothing was published." if publishing else f"{count}.", err=True)
    else:
        typer.echo(f"error: {error}", err=True)
    raise typer.Exit(exit_code(error)) from error
