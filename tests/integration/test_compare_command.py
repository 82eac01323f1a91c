"""`compare` as it is run, on real Kafka: what is young enough is compared, and nothing is an error."""

import time
from typing import Any

import orjson
import pytest
import typer
from confluent_kafka import Producer
from typer.testing import CliRunner, Result

from app.adapters.topics import TopicAdmin, read_documents, wanted_topics
from app.commands.compare import compare_app
from app.settings import Settings
from tests.support.audit_records import audit_record

PARTITIONS = 2
HOUR_MS = 3_600_000


@pytest.fixture
def settings(kafka_bootstrap: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings that the command reads from the environment; the topics are there."""
    monkeypatch.setenv("BROKER_KAFKA_BOOTSTRAP", kafka_bootstrap)
    monkeypatch.setenv("BROKER_TOPIC_PREFIX", topic_prefix)
    monkeypatch.setenv("BROKER_PARTITIONS", str(PARTITIONS))
    monkeypatch.setenv("COLUMNS", "200")
    settings = Settings()
    TopicAdmin(settings).apply(wanted_topics(read_documents(), settings, []))
    return settings


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.add_typer(compare_app)
    app.command("nothing")(lambda: None)  # one command alone would not be named
    return CliRunner().invoke(app, ["compare", *arguments])


def record(settings: Settings, count: int, *, age_ms: int, flipped: bool, segment: str) -> None:
    producer = Producer({"bootstrap.servers": settings.kafka_bootstrap})
    stamp = time.time_ns() // 1_000_000 - age_ms
    for number in range(count):
        evidence: dict[str, Any] = {
            "task": "pd",
            "champion": "3",
            "shadow": "4",
            "outputs": {"champion": {"probability": 0.25}, "shadow": {"probability": 0.75 if flipped else 0.25}},
            "result": {"champion": {"decision": "approve"}, "shadow": {"decision": "refer" if flipped else "approve"}},
            "flipped": flipped,
            "segment": segment,
            "latency_ms": 7.5,
        }
        made = audit_record(
            number, f"{segment}-{number}", f"{segment}-{age_ms}-{number}", kind="shadow", evidence=evidence
        )
        producer.produce(
            settings.topic("inference.audit"),
            made.value,
            made.key,
            number % PARTITIONS,
            headers=list(made.headers),
            timestamp=stamp + number,
        )
    assert producer.flush(30) == 0


def test_what_is_young_enough_is_compared(settings: Settings) -> None:
    """Every partition is read, from the moment asked for; JSON and tables say the same."""
    record(settings, 10, age_ms=2 * HOUR_MS, flipped=True, segment="web")
    record(settings, 30, age_ms=60_000, flipped=False, segment="web")
    record(settings, 10, age_ms=30_000, flipped=True, segment="branch")
    answer = run("credit-decision", "pd", "--json")
    assert answer.exit_code == 0, answer.output
    (shadow,) = orjson.loads(answer.stdout)["shadows"]
    assert (shadow["version"], shadow["champions"]) == ("4", ["3"])
    assert (shadow["overall"]["compared"], shadow["overall"]["flips"], shadow["overall"]["flip_rate"]) == (40, 10, 0.25)
    assert shadow["segments"]["branch"]["flip_rate"] == 1
    assert shadow["segments"]["web"]["flip_rate"] == 0
    assert shadow["overall"]["outputs"]["probability"]["mean_difference"] == pytest.approx(0.125)
    longer = orjson.loads(run("credit-decision", "pd", "--json", "--since", "3h").stdout)
    assert longer["shadows"][0]["overall"]["compared"] == 50
    shown = run("credit-decision", "pd")
    assert shown.exit_code == 0
    assert "25.00%" in shown.stdout
    assert "branch" in shown.stdout


def test_nothing_to_compare_is_an_error_that_says_why(settings: Settings) -> None:
    """An empty log, or one without such a shadow: exit 1; a duration that is none: exit 2."""
    assert run("credit-decision", "pd").exit_code == 1
    record(settings, 3, age_ms=60_000, flipped=True, segment="web")
    answer = run("credit-decision", "fraud", "--json")
    assert answer.exit_code == 1
    assert "no shadow of credit-decision/fraud is recorded in the last 1h" in answer.stderr
    assert orjson.loads(answer.stdout)["shadows"] == []
    assert run("credit-decision", "pd", "--since", "soon").exit_code == 2
