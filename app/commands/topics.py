"""``model-broker topics apply|check``: Kafka's topics made, or compared, as their documents declare them."""

from typing import Annotated

import orjson
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from app.adapters.registry_topic import read_head
from app.adapters.topics import REGISTRY_TOPIC, TopicAdmin, read_documents, wanted_topics
from app.commands.failures import failed
from app.domain.errors import BrokerError
from app.domain.registry import pools_of
from app.settings import Settings

topics_app = typer.Typer(
    name="topics",
    help="Kafka's topics, as the documents in topics/ declare them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

Pool = Annotated[
    list[str] | None,
    typer.Option("--pool", help="A pool whose task topics are wanted too, beside those that the registry names."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@topics_app.command(epilog="Example: model-broker topics apply --pool default")
def apply(pool: Pool = None, as_json: Json = False) -> None:
    """Create missing topics and alter configurations that differ; partition counts are never changed."""
    settings = Settings()
    try:
        admin = TopicAdmin(settings)
        topics = wanted_topics(read_documents(), settings, _pools(settings, admin, pool))
        applied = admin.apply(topics)
    except BrokerError as error:
        raise failed(error) from error
    if as_json:
        document = {
            "created": applied.created,
            "altered": [
                {"topic": each.topic, "config": each.what, "from": each.found, "to": each.wanted}
                for each in applied.altered
            ],
            "unchanged": applied.unchanged,
        }
        typer.echo(orjson.dumps(document))
        return
    table = Table("topic", "partitions", "what was done", box=SIMPLE_HEAD)
    for topic in topics:
        changes = [f"{each.what}: {each.found} → {each.wanted}" for each in applied.altered if each.topic == topic.name]
        done = "created" if topic.name in applied.created else "\n".join(changes) or "unchanged"
        table.add_row(topic.name, str(topic.partitions), done)
    Console().print(table)


@topics_app.command(epilog="Example: model-broker topics check --json")
def check(pool: Pool = None, as_json: Json = False) -> None:
    """List in what Kafka's topics differ from their documents; exit 1 if they do."""
    settings = Settings()
    try:
        admin = TopicAdmin(settings)
        topics = wanted_topics(read_documents(), settings, _pools(settings, admin, pool))
        differences = admin.differences(topics)
    except BrokerError as error:
        raise failed(error) from error
    if as_json:
        listed = [
            {"topic": each.topic, "what": each.what, "wanted": each.wanted, "found": each.found} for each in differences
        ]
        typer.echo(orjson.dumps({"topics": [topic.name for topic in topics], "differences": listed}))
    elif differences:
        table = Table("topic", "what", "should be", "is", box=SIMPLE_HEAD)
        for each in differences:
            table.add_row(each.topic, each.what, each.wanted, each.found or "missing")
        Console().print(table)
        typer.echo("Mend it: model-broker topics apply")
    else:
        typer.echo(f"All {len(topics)} topics are as declared.")
    if differences:
        raise typer.Exit(1)


def _pools(settings: Settings, admin: TopicAdmin, named: list[str] | None) -> set[str]:
    pools = set(named or ())
    if settings.topic(REGISTRY_TOPIC) in admin.partition_counts():
        published = read_head(settings).published
        if published is not None:
            pools |= pools_of(published.revision)
    return pools
