"""``model-broker dlt list|show|redrive``: what could not be handled, looked at and sent back."""

import string
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import orjson
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from app.adapters.dead_letter_topics import DeadLetter, DeadLetterTopics, Redrive
from app.commands.failures import failed
from app.domain.errors import BrokerError
from app.settings import Settings

dlt_app = typer.Typer(
    name="dlt",
    help="Dead letters: records that could not be handled.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

_SHOWN_BYTES_MAX: Final = 4_096
_REASON_LENGTH_MAX: Final = 300
_PRINTABLE: Final = frozenset(string.printable) - frozenset("\x0b\x0c\r")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@dlt_app.command("list", epilog="Example: model-broker dlt list --topic inference.requests --latest 50")
def list_letters(
    topic: Annotated[
        str | None, typer.Option("--topic", help="Only this one, as inference.requests; default: all.")
    ] = None,
    latest: Annotated[int, typer.Option("--latest", min=0, help="How many letters a topic to show.")] = 10,
    as_json: Json = False,
) -> None:
    """Count the letters of each dead-letter topic and show the latest."""
    try:
        letters = DeadLetterTopics(Settings())
        topics = letters.topics() if topic is None else dict([letters.named(topic)])
        found = []
        for name, partitions in topics.items():
            states = letters.states(name, partitions)
            count, waiting = sum(each.end - each.first for each in states), sum(each.waiting for each in states)
            found.append((name, count, waiting, letters.latest(name, partitions, latest) if count else ()))
    except BrokerError as error:
        raise failed(error) from error
    if as_json:
        documents = [
            {"topic": name, "letters": count, "waiting": waiting, "latest": [_summary(each) for each in newest]}
            for name, count, waiting, newest in found
        ]
        typer.echo(orjson.dumps({"topics": documents}))
        return
    console = Console()
    counts = Table("dead-letter topic", "letters", "waiting", box=SIMPLE_HEAD)
    for name, count, waiting, _ in found:
        counts.add_row(name, str(count), Text(str(waiting), style="bold red" if waiting else ""))
    console.print(counts)
    for name, count, _, newest in found:
        if newest:
            console.print(Text(f"{name}: the latest {len(newest)} of {count}", style="bold"))
            print_letters(console, newest)


@dlt_app.command(epilog="Example: model-broker dlt show inference.requests-dlt/3/41")
def show(
    position: Annotated[str, typer.Argument(help="TOPIC/PARTITION/OFFSET, as `dlt list` prints it.")],
    as_json: Json = False,
) -> None:
    """Show one letter: why it is here, its headers, key and value."""
    topic, partition, offset = _parse(position)
    if partition is None or offset is None:
        raise typer.BadParameter(f"{position}: write TOPIC/PARTITION/OFFSET")
    try:
        letter = DeadLetterTopics(Settings()).read(topic, partition, offset)
    except BrokerError as error:
        raise failed(error) from error
    if as_json:
        document = _summary(letter) | {
            "group": letter.group,
            "headers": [{"name": name, "value": _readable(value)} for name, value in letter.own_headers],
            "key": _readable(letter.record.key),
            "value": _readable(letter.record.value),
        }
        typer.echo(orjson.dumps(document))
        return
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name, value in (*_summary(letter).items(), ("group", letter.group)):
        facts.add_row(name, Text("-" if value is None else str(value), overflow="fold"))
    for name, header in letter.own_headers:
        facts.add_row(f"header {name}", Text(_shown(header), overflow="fold"))
    facts.add_row("key", Text(_shown(letter.record.key), overflow="fold"))
    facts.add_row("value", Text(_shown(letter.record.value), overflow="fold"))
    console.print(facts)


@dlt_app.command(epilog="Example: model-broker dlt redrive inference.requests-dlt --yes")
def redrive(
    letters: Annotated[str, typer.Argument(metavar="TOPIC[/PARTITION/OFFSET]", help="One letter, or a whole topic.")],
    yes: Annotated[bool, typer.Option("--yes", help="Needed for a whole topic.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Of one letter: even if it was redriven before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Send letters back to the topic and partition that they came from; those sent before are left alone."""
    topic, partition, offset = _parse(letters)
    if again and offset is None:
        raise typer.BadParameter("--again goes with one letter: TOPIC/PARTITION/OFFSET")
    try:
        topics = DeadLetterTopics(Settings())
        name, partitions = topics.named(topic)
        if partition is not None and offset is not None:
            letter = topics.read(name, partition, offset)
            if dry_run:
                result = _preview([letter] if again or not letter.redriven else [])
            else:
                result = topics.redrive_one(letter, again=again)
        elif dry_run:
            result = _preview(list(topics.waiting(name, partitions)))
        elif not yes:
            waiting = sum(state.waiting for state in topics.states(name, partitions))
            typer.echo(f"error: {waiting} letters of {name} would be sent back; say --yes, or --dry-run", err=True)
            raise typer.Exit(1)
        else:
            result = topics.redrive_all(name, partitions)
    except BrokerError as error:
        raise failed(error) from error
    if as_json:
        typer.echo(
            orjson.dumps(
                {
                    "topic": name,
                    "dry_run": dry_run,
                    "sent": result.sent,
                    "refused": [{"letter": place, "reason": reason} for place, reason in result.refused],
                }
            )
        )
    else:
        done = "would be redriven" if dry_run else "redriven"
        for place in result.sent if offset is not None or dry_run else ():
            typer.echo(f"{place}: {done}")
        for place, reason in result.refused:
            typer.echo(f"{place}: not redriven: {reason}", err=True)
        typer.echo(f"{len(result.sent)} of {name} {done}, {len(result.refused)} not.")
    if result.refused:
        raise typer.Exit(1)


def _preview(letters: Sequence[DeadLetter]) -> Redrive:
    reasons = {letter.record.position: letter.refusal() for letter in letters}
    return Redrive(
        tuple(place for place, reason in reasons.items() if reason is None),
        tuple((place, reason) for place, reason in reasons.items() if reason is not None),
    )


def _parse(text: str) -> tuple[str, int | None, int | None]:
    topic, *rest = text.split("/")
    if topic and not rest:
        return topic, None, None
    if not topic or len(rest) != 2 or not all(part.isdecimal() for part in rest):
        raise typer.BadParameter(f"{text}: write TOPIC or TOPIC/PARTITION/OFFSET")
    return topic, int(rest[0]), int(rest[1])


def _summary(letter: DeadLetter) -> dict[str, Any]:
    return {
        "letter": letter.record.position,
        "time": datetime.fromtimestamp(letter.record.timestamp_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        "original": letter.original,
        "kind": letter.kind,
        "reason": letter.reason,
        "state": "past" if letter.redriven else "waiting",
    }


def print_letters(console: Console, letters: Sequence[DeadLetter]) -> None:
    """Two lines a letter, for reasons are sentences: what it is, and under it where it came from and why."""
    rows = []
    for letter in letters:
        told = _summary(letter)
        place = f"{letter.record.partition}/{letter.record.offset}"
        reason = " ".join((told["reason"] or "-").split())
        reason = reason if len(reason) <= _REASON_LENGTH_MAX else f"{reason[: _REASON_LENGTH_MAX - 1]}…"
        rows.append(((place, told["time"][:19], told["kind"] or "-", told["state"]), told["original"], reason))
    widths = [max(len(row[column]) for row, _, _ in rows) for column in range(4)]
    for row, original, reason in rows:
        line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        console.print(Text(line, overflow="fold"))
        origin = f"of {original}: " if original else ""
        console.print(Padding(Text(f"{origin}{reason}", overflow="fold"), (0, 0, 0, 4), expand=False))


def _readable(value: bytes | None) -> dict[str, str] | None:
    """Bytes as JSON: ``text`` where they are some, else ``hex``."""
    if value is None:
        return None
    text = _text(value)
    return {"hex": value.hex()} if text is None else {"text": text}


def _shown(value: bytes | None) -> str:
    if value is None:
        return "none"
    text = _text(value)
    if text is None:
        shown = value[: _SHOWN_BYTES_MAX // 2].hex(" ", 2)
        return f"{len(value)} bytes, hex: {shown}{' …' if len(value) > _SHOWN_BYTES_MAX // 2 else ''}"
    return text if len(text) <= _SHOWN_BYTES_MAX else f"{text[:_SHOWN_BYTES_MAX]}… ({len(value)} bytes)"


def _text(value: bytes) -> str | None:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return None
    return text if all(character in _PRINTABLE or character.isprintable() for character in text) else None
