"""`dlt list`, `show` and `redrive` as they are run, on real Kafka: output, JSON, exit codes, and nothing sent twice."""

import struct
import subprocess
import sys
from typing import Any

import orjson
import pytest
import typer
from confluent_kafka import Consumer, Producer, TopicPartition
from typer.testing import CliRunner, Result

from app.adapters.dead_letter_topics import DeadLetterTopics
from app.adapters.dead_letters import dead_letter
from app.adapters.topics import TopicAdmin, read_documents, wanted_topics
from app.commands.dlt import dlt_app
from app.domain.requests import InboundRecord
from app.ports.log import OutboundRecord
from app.settings import Settings

PARTITIONS = 2


@pytest.fixture
def settings(kafka_bootstrap: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings that the commands read from the environment; the topics are there."""
    monkeypatch.setenv("BROKER_KAFKA_BOOTSTRAP", kafka_bootstrap)
    monkeypatch.setenv("BROKER_TOPIC_PREFIX", topic_prefix)
    monkeypatch.setenv("BROKER_PARTITIONS", str(PARTITIONS))
    monkeypatch.setenv("COLUMNS", "250")
    settings = Settings()
    TopicAdmin(settings).apply(wanted_topics(read_documents(), settings, []))
    return settings


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.add_typer(dlt_app)
    return CliRunner().invoke(app, ["dlt", *arguments])


def run_json(*arguments: str, code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return orjson.loads(result.stdout)


def bury(settings: Settings, numbers: range, *, partition: int = 0, value: bytes = b'{"path": 1}') -> str:
    """Dead letters of the request topic, one a number; the dead-letter topic's name."""
    topic = settings.topic("inference.requests")
    for number in numbers:
        record = InboundRecord(
            topic,
            partition,
            1_000 + number,
            1_700_000_000_000,
            b"key-%d" % number,
            value,
            (("request-id", b"r-%d" % number), ("kafka_correlationId", b"\x00\xff"), ("request-id", b"twice")),
        )
        send(settings, dead_letter(record, f"letter {number} is malformed", "request_malformed", "decide"))
    return f"{topic}-dlt"


def send(settings: Settings, *records: OutboundRecord) -> None:
    producer = Producer({"bootstrap.servers": settings.kafka_bootstrap})
    for record in records:
        producer.produce(
            record.topic, record.value, record.key, record.partition or 0, headers=[*record.headers] or None
        )
    assert producer.flush(10) == 0


def arrived(settings: Settings, partition: int = 0) -> list[tuple[bytes | None, bytes | None, Any]]:
    """Key, value and headers of everything in one partition of the request topic."""
    consumer = Consumer({"bootstrap.servers": settings.kafka_bootstrap, "group.id": "t", "enable.partition.eof": True})
    place = TopicPartition(settings.topic("inference.requests"), partition, 0)
    found: list[tuple[Any, Any, Any]] = []
    try:
        consumer.assign([place])
        while (message := consumer.poll(10)) is not None and message.error() is None:
            found.append((message.key(), message.value(), message.headers()))
        assert message is not None, "the partition could not be read"
    finally:
        consumer.close()
    return found


def test_letters_are_listed_and_shown(settings: Settings) -> None:
    """Counts and the latest letters of each topic; a letter's place, account, headers, key and value."""
    listed = run_json("list")["topics"]
    assert {each["topic"].removeprefix(settings.topic_prefix) for each in listed} == {
        "features.updates-dlt",
        "inference.audit-dlt",
        "inference.requests-dlt",
        "inference.results-dlt",
    }
    assert {(each["letters"], each["waiting"]) for each in listed} == {(0, 0)}

    topic = bury(settings, range(3))
    bury(settings, range(3, 5), partition=1, value=b"\xff\x00")
    (told,) = run_json("list", "--topic", "inference.requests", "--latest", "4")["topics"]
    assert (told["topic"], told["letters"], told["waiting"], len(told["latest"])) == (topic, 5, 5, 4)
    assert {each["letter"] for each in told["latest"]} == {f"{topic}/{at}" for at in ("1/1", "1/0", "0/2", "0/1")}
    assert {each["original"] for each in told["latest"]} >= {f"{topic.removesuffix('-dlt')}/1/1004"}
    text = run("list")
    assert text.exit_code == 0
    assert "letter 4 is malformed" in text.stdout
    assert "request_malformed" in text.stdout

    shown = run_json("show", f"{topic}/0/1")
    assert shown["original"] == f"{topic.removesuffix('-dlt')}/0/1001"
    assert (shown["kind"], shown["reason"], shown["group"]) == (
        "request_malformed",
        "letter 1 is malformed",
        "decide",
    )
    assert shown["state"] == "waiting"
    assert (shown["key"], shown["value"]) == ({"text": "key-1"}, {"text": '{"path": 1}'})
    assert [each["name"] for each in shown["headers"]] == ["request-id", "kafka_correlationId", "request-id"]
    assert shown["headers"][1]["value"] == {"hex": "00ff"}
    assert run_json("show", "inference.requests/1/0")["value"] == {"hex": "ff00"}
    assert "2 bytes, hex: ff00" in run("show", f"{topic}/1/0").stdout


def test_what_is_not_there_is_said(settings: Settings) -> None:
    """A wrong place is an error that names what there is."""
    topic = bury(settings, range(2))
    assert "holds offsets 0 to 1" in run("show", f"{topic}/0/7").stderr
    assert "partition is empty" in run("show", f"{topic}/1/0").stderr
    assert "partitions 0 to 1" in run("show", f"{topic}/9/0").stderr
    nothing = run("redrive", "other", "--yes")
    assert (nothing.exit_code, "no dead-letter topic other" in nothing.stderr) == (1, True)
    assert run("show", topic).exit_code == 2
    assert run("show", f"{topic}/0/x").exit_code == 2
    assert run("redrive", topic, "--again").exit_code == 2


def test_a_topic_is_redriven_once(settings: Settings) -> None:
    """Letters go back as they came, to where they came from; a second redrive sends nothing, a later letter goes."""
    topic = bury(settings, range(45))
    bury(settings, range(45, 48), partition=1)
    asked = run("redrive", topic)
    assert (asked.exit_code, "48 letters" in asked.stderr) == (1, True)
    looked = run_json("redrive", topic, "--dry-run")
    assert (looked["dry_run"], len(looked["sent"]), looked["refused"]) == (True, 48, [])
    assert arrived(settings) == []

    sent = run_json("redrive", topic, "--yes")
    assert (len(sent["sent"]), sent["refused"]) == (48, [])
    back = arrived(settings)
    assert back == [
        (
            b"key-%d" % number,
            b'{"path": 1}',
            [("request-id", b"r-%d" % number), ("kafka_correlationId", b"\x00\xff"), ("request-id", b"twice")],
        )
        for number in range(45)
    ]
    assert [key for key, _, _ in arrived(settings, 1)] == [b"key-45", b"key-46", b"key-47"]

    assert run_json("redrive", topic, "--yes")["sent"] == []
    (told,) = run_json("list", "--topic", topic)["topics"]
    assert (told["letters"], told["waiting"], {each["state"] for each in told["latest"]}) == (48, 0, {"past"})
    bury(settings, range(48, 49))
    assert run_json("redrive", topic, "--yes")["sent"] == [f"{topic}/0/45"]
    assert len(arrived(settings)) == 46


def test_a_letter_is_redriven_out_of_order_and_not_again(settings: Settings) -> None:
    """One letter goes before its elders, is not sent again with them, and is sent again only when asked to be."""
    topic = bury(settings, range(4))
    assert run_json("redrive", f"{topic}/0/2")["sent"] == [f"{topic}/0/2"]
    (told,) = run_json("list", "--topic", topic)["topics"]
    assert told["waiting"] == 3
    assert run_json("show", f"{topic}/0/2")["state"] == "past"
    refused = run("redrive", f"{topic}/0/2")
    assert (refused.exit_code, "--again" in refused.stderr) == (1, True)
    assert run_json("redrive", f"{topic}/0/2", "--dry-run")["sent"] == []
    assert run_json("redrive", topic, "--yes")["sent"] == [f"{topic}/0/{offset}" for offset in (0, 1, 3)]
    assert run_json("redrive", f"{topic}/0/2", "--again")["sent"] == [f"{topic}/0/2"]
    assert [key for key, _, _ in arrived(settings)] == [b"key-2", b"key-0", b"key-1", b"key-3", b"key-2"]


def test_what_cannot_go_back_stays_and_is_told(settings: Settings) -> None:
    """A letter of another topic, one without an account, one whose value is gone, or whose partition is not there."""
    topic = bury(settings, range(1))
    own = topic.removesuffix("-dlt")
    account = (("kafka_dlt-original-topic", own.encode()), ("kafka_dlt-original-offset", struct.pack(">q", 5)))
    here, gone = ("kafka_dlt-original-partition", struct.pack(">i", 0)), struct.pack(">i", 40)
    other = (("kafka_dlt-original-topic", b"payments"), here)
    send(
        settings,
        OutboundRecord(topic, b"other", None, 0, other),
        OutboundRecord(topic, b"bare", None, 0),
        OutboundRecord(topic, None, None, 0, (*account, here, ("kafka_dlt-value-bytes-dropped", b"1048570"))),
        OutboundRecord(topic, b"nowhere", None, 0, (*account, ("kafka_dlt-original-partition", gone))),
    )
    result = run_json("redrive", topic, "--yes", code=1)
    assert result["sent"] == [f"{topic}/0/0"]
    reasons = {each["letter"]: each["reason"] for each in result["refused"]}
    assert "payments" in reasons[f"{topic}/0/1"]
    assert "where it came from" in reasons[f"{topic}/0/2"]
    assert f"{own}/0/5" in reasons[f"{topic}/0/3"]
    assert "partition" in reasons[f"{topic}/0/4"].lower()
    assert len(arrived(settings)) == 1
    assert "payments" in run("redrive", f"{topic}/0/1").stderr
    assert run_json("list", "--topic", topic)["topics"][0]["waiting"] == 4


def test_letters_that_a_forgotten_commit_may_cover_count_as_redriven(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a commit, a letter older than Kafka remembers commits is not sent unless it is named with --again."""
    topic = bury(settings, range(2))
    monkeypatch.setattr(DeadLetterTopics, "_remembered_ms", lambda _: -60_000)
    assert run_json("redrive", topic, "--yes")["sent"] == []
    assert run_json("list", "--topic", topic)["topics"][0]["waiting"] == 0
    assert run_json("redrive", f"{topic}/0/1", "--again")["sent"] == [f"{topic}/0/1"]


def test_two_redrives_at_once_send_each_letter_once(settings: Settings) -> None:
    """A second process that redrives the same topic meanwhile repeats nothing; what either leaves, the next sends."""
    topic = bury(settings, range(60))
    bury(settings, range(60, 120), partition=1)
    command = [sys.executable, "-c", f"from app.commands.dlt import dlt_app; dlt_app(['redrive', '{topic}', '--yes'])"]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [racer.communicate(timeout=120) for racer in racers]
    run("redrive", topic, "--yes")
    keys = [key for partition in range(PARTITIONS) for key, _, _ in arrived(settings, partition)]
    assert sorted(keys, key=lambda key: int((key or b"")[4:])) == [b"key-%d" % number for number in range(120)], said
