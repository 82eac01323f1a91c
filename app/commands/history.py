"""``model-broker history`` and ``rollback``: which revisions counted when, and back to one of them."""

import dataclasses
import datetime
from typing import Annotated

import orjson
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.adapters.registry_topic import Publication, find_revision, read_history
from app.commands.registry import Draft, DryRun, Json, Message, Yes, check_message, fail, offer, shortened, today
from app.domain.errors import BrokerError
from app.domain.registry import compile_revision
from app.domain.rollout_status import restored
from app.settings import Settings

history_app = typer.Typer(rich_markup_mode=None, add_completion=False)


@history_app.command("history", epilog="Example: model-broker history --limit 5")
def history(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="So many publications at most.")] = 20,
    as_json: Json = False,
) -> None:
    """List what was published, the newest first; the current revision is marked, and what workers refuse."""
    try:
        found = read_history(Settings())
    except BrokerError as error:
        fail(error, as_json=as_json)
    publications = found.publications
    shown = publications[:limit]
    if as_json:
        listed = [dataclasses.asdict(each) for each in shown]
        faults = [str(each) for each in found.faults]
        typer.echo(orjson.dumps({"publications": listed, "total": len(publications), "faults": faults}))
        return
    if not shown:
        typer.echo("No revision was published yet: `model-broker apply -f DIR`.")
        return
    for fault in found.faults:
        typer.echo(f"Workers refuse what was published last, and go by the revision marked *: {fault}", err=True)
    Console(highlight=False).print(_table(shown))
    if len(publications) > limit:
        typer.echo(f"{len(publications) - limit} older ones: --limit {len(publications)}")


def _table(publications: tuple[Publication, ...]) -> Table:
    table = Table("", "revision", "published (UTC)", "documents", "message", box=SIMPLE_HEAD)
    for column in table.columns:
        # An id or a moment that is broken in two is neither; messages have room below.
        column.no_wrap, column.overflow = column.header != "message", "fold"
    table.columns[3].justify = "right"
    for each in publications:
        when = datetime.datetime.fromtimestamp(each.published_at / 1_000, datetime.UTC)
        table.add_row(
            "*" if each.current else "",
            shortened(each.revision),
            f"{when:%Y-%m-%d %H:%M:%S}",
            "-" if each.documents is None else str(each.documents),
            Text(each.message or "-") if each.refused is None else Text(f"refused: {each.refused}", style="red"),
        )
    return table


@history_app.command("rollback", epilog="Example: model-broker rollback sha256:4f1c --message 'limits too low'")
def rollback(
    revision: Annotated[str, typer.Argument(help="Its id, or as much of it as no other one begins with.")],
    message: Message = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Publish an old revision's documents as the next revision.

    Its rollouts are paused, for an operator to resume, and what was aborted since stays aborted. Versions whose
    validity has ended are refused, as by apply.
    """
    settings = Settings()
    try:
        check_message(message)
        found = find_revision(settings, revision)
        target = found.revision
        called = target.id[:19]

        draft = Draft(
            lambda head, now_ms: restored(target.documents, head.carried, now_ms, reason=f"rolled back to {called}"),
            lambda documents: compile_revision(documents, today=today(), origin=f"revision {called}"),
        )
        offered = offer(
            settings,
            draft,
            found.head,
            message=message or f"rollback to {called}",
            dry_run=dry_run,
            yes=yes,
            as_json=as_json,
        )
    except BrokerError as error:
        fail(error, as_json=as_json, publishing=True)
    if as_json:
        typer.echo(orjson.dumps({**offered.as_json(), "restored": target.id}))
    elif offered.published:
        typer.echo(f"Published {offered.revision.id}: the documents of {target.id}.")
    elif offered.unchanged:
        typer.echo(f"Nothing to publish: {offered.revision.id} is the current revision.")
    else:
        typer.echo(f"Sound: the documents of {target.id} make {offered.named}. Nothing was published.")
