"""`topics`, `apply`, `get` and `explain` as they are run, on real Kafka: output, JSON and exit codes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from confluent_kafka import Producer
from typer.testing import CliRunner, Result

from app.adapters.registry_topic import POINTER_KEY, read_head
from app.adapters.topics import read_documents, wanted_topics
from app.cli import app
from app.settings import Settings
from tests.support.registry_documents import changed, sound

REQUEST = ["--entities", "applicant_id=17", "--inputs", '{"amount": 5}']


@pytest.fixture
def settings(kafka_bootstrap: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that the commands read from the environment."""
    monkeypatch.setenv("BROKER_KAFKA_BOOTSTRAP", kafka_bootstrap)
    monkeypatch.setenv("BROKER_TOPIC_PREFIX", topic_prefix)
    monkeypatch.setenv("BROKER_PARTITIONS", "2")
    monkeypatch.setenv("COLUMNS", "200")
    return Settings()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def run_json(*arguments: str, code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return orjson.loads(result.stdout)


def write(directory: Path, documents: Sequence[dict[str, Any]]) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "all.yaml").write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return str(directory)


def test_from_nothing_to_an_explained_request(settings: Settings, tmp_path: Path) -> None:
    """An operator makes topics, applies documents, looks at them, and asks what would happen to a request."""
    documents = write(tmp_path / "registry", sound())
    missing = run("apply", "-f", documents, "--yes")
    assert missing.exit_code == 2
    assert "topics apply" in missing.stderr
    assert "get" not in missing.stdout

    assert run("topics", "check").exit_code == 1
    wanted = {each.name for each in wanted_topics(read_documents(), settings, [])}
    assert set(run_json("topics", "apply")["created"]) == wanted
    assert run_json("topics", "check")["differences"] == []
    assert run("topics", "check").exit_code == 0
    assert "unchanged" in run("topics", "apply").stdout
    for command in (["get", "routes"], ["explain", "/credit/card"]):
        nothing = run(*command)
        assert nothing.exit_code == 2
        assert "no revision was published yet" in nothing.stderr

    looked = run_json("apply", "-f", documents, "--dry-run")
    assert (looked["published"], looked["previous"], len(looked["changes"])) == (False, None, 5)
    asked = run("apply", "-f", documents)
    assert asked.exit_code == 2
    assert "--yes" in asked.stderr
    assert read_head(settings).id is None

    applied = run_json("apply", "-f", documents, "--yes")
    assert applied["published"]
    assert read_head(settings).id == applied["revision"]
    # The pool's topics came with the revision that names it.
    assert settings.topic("inference.tasks.default-dlt") in run_json("topics", "check")["topics"]
    again = run("apply", "-f", documents)
    assert (again.exit_code, "Nothing to publish" in again.stdout) == (0, True)

    for kind in ("routes", "Route", "ROUTES"):
        assert "/credit/{product}" in run("get", kind).stdout
    assert [each["metadata"]["name"] for each in run_json("get", "modelversions")["documents"]] == [
        "credit-pd-1",
        "credit-pd-2",
    ]
    for kind in ("models", "featureviews", "modelversions"):
        assert run("get", kind).exit_code == 0
    assert "there is credit" in run("get", "route", "other").stderr
    assert "no kind things" in run("get", "things").stderr

    told = run_json("explain", "/credit/card", *REQUEST, "--metadata", "channel=web")
    assert (told["route"], told["rule"], told["placeholders"]) == ("credit", "default", {"product": "card"})
    assert [arm["percent"] for arm in told["tasks"][0]["arms"]] == [90, 10]
    (drawn,) = run_json("explain", "/credit/card", *REQUEST, "--request-id", "r-1")["tasks"]
    assert drawn["version"] in {"1", "2"}
    text = run("explain", "/credit/card", *REQUEST)
    assert text.exit_code == 0
    assert "fetch     applicant of applicant_id=17" in text.stdout
    assert "timeout 80ms, retries 1, concurrency 64" in text.stdout
    assert text.stdout.count("an endpoint is ejected after 5 failures in a row, for 5s to 1m") == 1
    assert "timeout 80ms\n" in text.stdout, "a queued version has no more"
    assert run_json("explain", "/other", code=1)["rejected"]["code"] == "path_unknown"
    assert "entity_missing" in run("explain", "/credit/card").stdout
    assert run("explain", "/credit/card", "--inputs", "amount").exit_code == 2
    assert run("explain", "/credit/card", "--inputs", "{").exit_code == 2
    assert run("explain", "credit").exit_code == 2


def test_what_get_writes_can_be_applied_again(settings: Settings, tmp_path: Path) -> None:
    """`get -o yaml` of every kind makes the same revision."""
    run_json("topics", "apply")
    revision = run_json("apply", "-f", write(tmp_path / "one", sound()), "--yes")["revision"]
    (tmp_path / "two").mkdir()
    for kind in ("routes", "models", "modelversions", "featureviews"):
        (tmp_path / "two" / f"{kind}.yaml").write_text(run("get", kind, "-o", "yaml").stdout)
    assert "250ms" in (tmp_path / "two" / "routes.yaml").read_text()
    assert run_json("apply", "-f", str(tmp_path / "two"))["revision"] == revision


def test_a_change_is_shown_field_by_field(settings: Settings, tmp_path: Path) -> None:
    """A person sees old and new; a program gets them as values."""
    run_json("topics", "apply")
    run_json("apply", "-f", write(tmp_path, sound()), "--yes")
    directory = write(tmp_path, changed(sound(), "credit", "spec.deadline", "300ms"))
    assert run_json("apply", "-f", directory, "--dry-run")["changes"] == [
        {"document": "Route credit", "field": "deadline", "change": "changed", "before": "250ms", "after": "300ms"}
    ]
    shown = run("apply", "-f", directory, "--yes").stdout
    assert "deadline" in shown
    assert "1 changed" in shown


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("y", 0)])
def test_a_person_is_asked(settings: Settings, tmp_path: Path, answer: str, code: int) -> None:
    """On a terminal `apply` shows the difference and asks before it publishes."""
    run_json("topics", "apply")
    ours, theirs = os.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", "apply", "-f", write(tmp_path, sound())],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
        shown = os.read(ours, 65_536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == code, done.stderr
    assert "Publish this revision?" in shown
    assert (read_head(settings).id is not None) == (code == 0)


def test_every_fault_is_listed_and_nothing_is_published(settings: Settings, tmp_path: Path) -> None:
    """Each fault has its file and line, document and field; a file that cannot be read is one among them."""
    run_json("topics", "apply")
    faulty = changed(sound(), "credit", "spec.rules.0.when", "1 +")
    directory = write(tmp_path / "faulty", changed(faulty, "credit-pd-1", "spec.policy.hedgeAfter", "p95"))
    (tmp_path / "faulty" / "other.yaml").write_text("a: 1\na: 2\n")
    faults = run_json("apply", "-f", directory, "--yes", code=1)["faults"]
    assert {(each["document"], each["field"]) for each in faults} == {
        ("", ""),
        ("", "kind"),
        ("Route credit", "spec.rules[default].when"),
        ("ModelVersion credit-pd-1", "spec.policy.hedgeAfter"),
    }
    assert all(each["origin"].startswith(directory) for each in faults)
    shown = run("apply", "-f", directory, "--yes")
    assert shown.exit_code == 1
    assert "4 faults: nothing was published" in shown.stderr
    assert read_head(settings).id is None
    (tmp_path / "faulty" / "all.yaml").write_text("---\n")
    (tmp_path / "faulty" / "other.yaml").write_text("")
    assert "no documents" in run("apply", "-f", directory, "--yes").stderr


def test_a_deleted_head_is_published_again(settings: Settings, tmp_path: Path) -> None:
    """`get` and `explain` say what happened to the current revision, `apply` says it too and publishes anew."""
    run_json("topics", "apply")
    documents = write(tmp_path, sound())
    published = run_json("apply", "-f", documents, "--yes")
    producer = Producer({"bootstrap.servers": settings.kafka_bootstrap})
    producer.produce(settings.topic("broker.registry"), key=POINTER_KEY, value=None, partition=0)
    assert producer.flush(10) == 0
    for command in (["get", "routes"], ["explain", "/credit/card"]):
        deleted = run(*command)
        assert deleted.exit_code == 2
        assert "was deleted; workers keep the last good one; publish again" in deleted.stderr
    applied = run("apply", "-f", documents, "--yes")
    assert applied.exit_code == 0
    assert "was deleted" in applied.stderr
    assert run_json("get", "routes")["revision"] == published["revision"]


def test_a_head_written_by_hand_is_replaced(settings: Settings, tmp_path: Path) -> None:
    """`apply` says that the current revision is refused, and publishes a sound one over it."""
    run_json("topics", "apply")
    producer = Producer({"bootstrap.servers": settings.kafka_bootstrap})
    producer.produce(settings.topic("broker.registry"), key=POINTER_KEY, value=b"{", partition=0)
    assert producer.flush(10) == 0
    assert run("topics", "check").exit_code == 0
    looked = run("get", "routes")
    assert looked.exit_code == 1
    assert "the pointer to the current revision cannot be read" in looked.stderr
    assert "nothing was published" not in looked.stderr
    applied = run("apply", "-f", write(tmp_path, sound()), "--yes")
    assert applied.exit_code == 0
    assert "is refused" in applied.stderr
    assert read_head(settings).published is not None
    producer.produce(settings.topic("broker.registry"), key=b"sha256:" + b"a" * 64, value=b"by hand", partition=0)
    assert producer.flush(10) == 0
    assert "refused: " in run("history").stdout
    refused, sound_one = run_json("history")["publications"]
    assert "zstd" in refused["refused"]
    assert (sound_one["refused"], sound_one["current"]) == (None, True)
    producer.produce(settings.topic("broker.registry"), key=POINTER_KEY, value=b"{", partition=0)
    assert producer.flush(10) == 0
    told = run_json("history")
    assert [each["current"] for each in told["publications"]] == [False, True]
    assert "the pointer to the current revision cannot be read" in told["faults"][0]
    assert "go by the revision marked *" in run("history").stderr
    looked = run("apply", "-f", write(tmp_path, sound()), "--dry-run")
    assert "added" not in looked.stdout
    assert "is refused" in looked.stderr
