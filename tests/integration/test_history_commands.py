"""`apply` while rollouts progress, `history` and `rollback`, as they are run, on real Kafka."""

import datetime
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
import zstandard
from confluent_kafka import Producer
from typer.testing import CliRunner, Result

from app.adapters.registry_topic import POINTER_KEY, Pointer, publish_revision, read_head
from app.adapters.topics import REGISTRY_TOPIC, ROLLOUT_WINDOWS, TopicAdmin, read_documents, wanted_topics
from app.cli import app
from app.commands import history as history_module
from app.commands import registry as registry_module
from app.domain.documents import Route
from app.domain.registry import canonical, compile_revision
from app.domain.rollout_status import statuses_of
from app.domain.route_documents import RolloutStatus, RouteStatus
from app.settings import Settings
from tests.support.registry_documents import changed, sound, task

THERE = ("credit", "default/pd")
ROLLOUT = {"to": "2", "steps": [5, 50, 100], "every": "10m"}


@pytest.fixture
def settings(kafka_bootstrap: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that the commands read from the environment; the registry's topic exists."""
    monkeypatch.setenv("BROKER_KAFKA_BOOTSTRAP", kafka_bootstrap)
    monkeypatch.setenv("BROKER_TOPIC_PREFIX", topic_prefix)
    monkeypatch.setenv("BROKER_PARTITIONS", "2")
    monkeypatch.setenv("COLUMNS", "200")
    settings = Settings()
    registry = settings.topic(REGISTRY_TOPIC)
    TopicAdmin(settings).apply(
        [each for each in wanted_topics(read_documents(), settings, []) if each.name == registry]
    )
    return settings


@pytest.fixture
def files(tmp_path: Path) -> str:
    """The sound documents, with a rollout."""
    return write(tmp_path / "registry", rolling())


def rolling(**changes: Any) -> list[dict[str, Any]]:
    """The sound documents with a rollout of version 2."""
    rollout = {**ROLLOUT, **changes}
    return changed(sound(), "credit", "spec.rules.0.tasks.0", task(select={"version": "1"}, rollout=rollout))


def write(directory: Path, documents: list[dict[str, Any]]) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "all.yaml").write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return str(directory)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def run_json(*arguments: str, code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return orjson.loads(result.stdout)


def status(settings: Settings) -> RolloutStatus:
    published = read_head(settings).published
    assert published is not None
    return statuses_of(published.revision.documents)[THERE]


def move(settings: Settings, **changes: Any) -> str:
    """Publish the current revision with its rollout moved, as a rollouts worker does; the new revision's id."""
    head = read_head(settings)
    assert head.published is not None
    moved = RouteStatus(rollouts={"default/pd": status(settings).model_copy(update=changes)})
    revision = compile_revision(
        each.model_copy(update={"status": moved}) if isinstance(each, Route) else each
        for each in head.published.revision.documents
    )
    publish_revision(settings, revision, expected=head.id, now_ms=time.time_ns() // 1_000_000, message="moved")
    return revision.id


def test_apply_leaves_rollouts_where_they_are(settings: Settings, tmp_path: Path, files: str) -> None:
    """A rollout begins with its first revision; the same files are nothing new, however far it is by then."""
    began_ms = time.time_ns() // 1_000_000
    first = run_json("apply", "-f", files, "--yes")
    begun = status(settings)
    assert (begun.state, begun.step, begun.since >= began_ms) == ("progressing", 0, True)
    assert run_json("apply", "-f", files) == {**first, "previous": first["revision"], "changes": [], "published": False}
    advanced = move(settings, step=1)
    again = run("apply", "-f", files)
    assert (again.exit_code, again.stdout) == (0, f"Nothing to publish: {advanced} is the current revision.\n")

    slower = write(tmp_path / "slower", changed(rolling(), "credit", "spec.deadline", "1s"))
    (change,) = run_json("apply", "-f", slower, "--yes")["changes"]
    assert change["field"] == "deadline"
    assert status(settings).step == 1
    shorter = write(tmp_path / "shorter", rolling(steps=[50, 100]))
    shown = run("apply", "-f", shorter, "--yes")
    assert "status.rollouts.default/pd.step: 1 → 0" in shown.stdout
    assert status(settings).step == 0
    gone = run_json("apply", "-f", write(tmp_path / "gone", sound()), "--yes")
    assert "status" in {change["field"] for change in gone["changes"]}


def test_a_rollout_that_moves_meanwhile_is_no_conflict(
    settings: Settings, tmp_path: Path, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was shown still holds: it is published over the step; other people's documents are never overwritten."""
    run_json("apply", "-f", files, "--yes")
    meanwhile: list[Callable[[], object]] = [lambda: move(settings, step=1), lambda: move(settings, step=2)]

    def after_another(*arguments: Any, **options: Any) -> object:
        if meanwhile:
            meanwhile.pop(0)()
        return publish_revision(*arguments, **options)

    monkeypatch.setattr(registry_module, "publish_revision", after_another)
    slower = write(tmp_path / "slower", changed(rolling(), "credit", "spec.deadline", "1s"))
    (change,) = run_json("apply", "-f", slower, "--yes")["changes"]
    assert change["field"] == "deadline"
    assert status(settings).step == 2
    assert not meanwhile

    other = write(tmp_path / "other", changed(rolling(), "credit", "spec.deadline", "2s"))
    meanwhile.append(lambda: run_json("apply", "-f", other, "--yes"))
    lost = run("apply", "-f", files, "--yes")
    assert lost.exit_code != 0
    assert "nothing was published; look at the difference again" in lost.stderr
    assert "2s" in run("get", "routes").stdout
    # Somebody else published the very same: there is nothing left to do.
    meanwhile.extend([lambda: move(settings, step=0), lambda: run_json("apply", "-f", files, "--yes")])
    same = run("apply", "-f", files, "--yes")
    assert same.exit_code == 0
    assert "Nothing to publish" in same.stdout
    assert not meanwhile


def test_a_status_is_not_written_by_people(settings: Settings, tmp_path: Path, files: str) -> None:
    """`apply` refuses one by file, document and field; `get` leaves it out of what can be applied."""
    run_json("apply", "-f", files, "--yes")
    at = move(settings, step=2)
    (route,) = run_json("get", "routes", "-o", "json")["documents"]
    assert route["status"]["rollouts"]["default/pd"]["step"] == 2
    text = run("get", "routes", "-o", "yaml").stdout
    assert "rollout:" in text
    assert "status" not in text
    kept = [each for each in rolling() if each["kind"] != "Route"]
    back = write(tmp_path / "back", [*kept, yaml.safe_load(text)])
    assert run_json("apply", "-f", back)["revision"] == at
    by_hand = write(tmp_path / "hand", [*kept, changed([route], "credit", "spec.deadline", "soon")[0]])
    faults = run_json("apply", "-f", by_hand, "--yes", code=1)["faults"]
    assert {(each["document"], each["field"]) for each in faults} == {
        ("Route credit", "status"),
        ("Route credit", "spec.deadline"),
    }
    assert all(each["origin"].startswith(by_hand) for each in faults)


def test_a_head_written_by_hand_does_not_begin_rollouts_anew(settings: Settings, files: str) -> None:
    """What `apply` puts over it goes on from the revision that workers still decide by."""
    run_json("apply", "-f", files, "--yes")
    move(settings, state="promoted", step=2)
    head = read_head(settings)
    assert head.published is not None
    route = next(each for each in head.published.revision.documents if isinstance(each, Route))
    lost = RouteStatus(rollouts={"default/other": status(settings)})
    publish_unsound(settings, route.model_copy(update={"status": lost}))
    assert read_head(settings).faults
    assert run_json("apply", "-f", files, "--yes")["published"]
    assert status(settings).state == "promoted"


def publish_unsound(settings: Settings, route: Route) -> None:
    """Put a route on the topic as the whole registry, past every check."""
    content = canonical([route])
    identity = f"sha256:{hashlib.sha256(content).hexdigest()}"
    producer = Producer({"bootstrap.servers": settings.kafka_bootstrap})
    topic = settings.topic(REGISTRY_TOPIC)
    producer.produce(topic, key=identity.encode(), value=zstandard.compress(content), partition=0)
    producer.produce(topic, key=POINTER_KEY, value=Pointer(identity, None, 1, 1).as_bytes(), partition=0)
    assert producer.flush(20) == 0


def test_history_tells_what_was_published_and_why(settings: Settings, tmp_path: Path) -> None:
    """Newest first, the current one marked, the message of each; as many as were asked for."""
    assert "No revision was published yet" in run("history").stdout
    assert run_json("history") == {"publications": [], "total": 0, "faults": []}
    one = run_json("apply", "-f", write(tmp_path, sound()), "--yes", "--message", "the [first] one")["revision"]
    changed_ = write(tmp_path, changed(sound(), "credit", "spec.deadline", "300ms"))
    two = run_json("apply", "-f", changed_, "--yes")["revision"]
    told = run_json("history")
    assert [each["revision"] for each in told["publications"]] == [two, one]
    newest, oldest = told["publications"]
    assert (newest["current"], newest["previous"], newest["documents"], newest["message"]) == (True, one, 5, None)
    assert (oldest["current"], oldest["previous"], oldest["message"]) == (False, None, "the [first] one")
    assert newest["published_at"] >= oldest["published_at"]
    shown = run("history").stdout
    assert shown.index(two[:19]) < shown.index(one[:19])
    assert "the [first] one" in shown
    day = datetime.datetime.fromtimestamp(newest["published_at"] / 1_000, datetime.UTC)
    assert f"{day:%Y-%m-%d %H:%M:%S}" in shown
    limited = run("history", "--limit", "1").stdout
    assert one[:19] not in limited
    assert "1 older ones: --limit 2" in limited
    assert run_json("history", "--limit", "1")["total"] == 2
    for message in ("", "two\nlines", "x" * 501):
        refused = run("apply", "-f", changed_, "--yes", "--message", message)
        assert refused.exit_code == 2
        assert "--message: one line" in refused.stderr


def test_rollback_publishes_the_old_documents(settings: Settings, tmp_path: Path) -> None:
    """As the next revision, after the difference was shown; in the history it is one publication more."""
    one = run_json("apply", "-f", write(tmp_path, sound()), "--yes")["revision"]
    directory = write(tmp_path, changed(sound(), "credit", "spec.deadline", "300ms"))
    two = run_json("apply", "-f", directory, "--yes")["revision"]
    looked = run("rollback", one[:19], "--dry-run")
    assert looked.exit_code == 0
    assert "deadline: 300ms → 250ms" in looked.stdout
    assert "Nothing was published" in looked.stdout
    asked = run("rollback", one[:19])
    assert (asked.exit_code, "--yes" in asked.stderr) == (2, True)
    assert read_head(settings).id == two
    back = run_json("rollback", one[7:19], "--yes")
    assert (back["revision"], back["previous"], back["restored"], back["published"]) == (one, two, one, True)
    assert back["changes"] == [
        {"document": "Route credit", "field": "deadline", "change": "changed", "before": "300ms", "after": "250ms"}
    ]
    assert read_head(settings).id == one
    assert "Nothing to publish" in run("rollback", one).stdout
    assert "Published" in run("rollback", two, "--yes", "--message", "forth").stdout
    told = run_json("history")["publications"]
    assert [(each["revision"], each["message"]) for each in told] == [
        (two, "forth"),
        (one, f"rollback to {one[:19]}"),
        (two, None),
        (one, None),
    ]
    assert [each["current"] for each in told] == [True, False, False, False]
    unknown = run("rollback", "0" * 64, "--yes")
    assert unknown.exit_code == 2
    assert "model-broker history" in unknown.stderr
    assert run("rollback", "latest", "--yes").exit_code == 2


def test_rollback_never_resumes_a_rollout_half_way(settings: Settings, tmp_path: Path, files: str) -> None:
    """It is paused at its step of then, for a reason; what was aborted since stays aborted."""
    run_json("apply", "-f", files, "--yes")
    half_way = move(settings, step=1)
    move(settings, state="promoted", step=2)
    assert run_json("rollback", half_way, "--yes")["published"]
    paused = status(settings)
    assert (paused.state, paused.step, paused.reason) == ("paused", 1, f"rolled back to {half_way[:19]}")
    assert "Nothing to publish" in run("rollback", half_way, "--yes").stdout
    move(settings, state="aborted", reason="errorRate 0.4 above 0.02")
    slower = write(tmp_path / "slower", changed(rolling(), "credit", "spec.deadline", "1s"))
    run_json("apply", "-f", slower, "--yes")
    assert run_json("rollback", half_way, "--yes")["published"]
    assert (status(settings).state, status(settings).reason) == ("aborted", "errorRate 0.4 above 0.02")


def test_rollback_refuses_what_may_not_be_used_any_more(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that has ended since is refused in each use, as by `apply`, and nothing is published."""
    one = run_json("apply", "-f", write(tmp_path, sound()), "--yes")["revision"]
    documents = sound()
    for name in ("credit-pd-1", "credit-pd-2"):
        documents = changed(documents, name, "spec.governance.validUntil", "2028-06-30")
    two = run_json("apply", "-f", write(tmp_path, documents), "--yes")["revision"]
    monkeypatch.setattr(history_module, "today", lambda: datetime.date(2027, 7, 1))
    faults = run_json("rollback", one, "--yes", code=1)["faults"]
    at = f"revision {one[:19]}"
    assert {(each["origin"], each["document"], each["field"]) for each in faults} == {
        (at, "ModelVersion credit-pd-1", "spec.governance.validUntil"),
        (at, "ModelVersion credit-pd-2", "spec.governance.validUntil"),
        (at, "Route credit", "spec.rules[default].tasks[pd].select.split[1]"),
        (at, "Route credit", "spec.rules[default].tasks[pd].select.split[2]"),
    }
    assert read_head(settings).id == two


@pytest.mark.parametrize("value", [b"not json", None, Pointer("sha256:a", None, 1, 1).as_bytes()])
def test_orders_are_given_while_the_pointer_is_bad(settings: Settings, files: str, value: bytes | None) -> None:
    """A rollout that workers go by can be paused and taken back; what is wrong with the pointer is said each time."""
    wanted = wanted_topics(read_documents(), settings, [])
    names = {settings.topic(ROLLOUT_WINDOWS), settings.topic("inference.audit")}
    TopicAdmin(settings).apply([each for each in wanted if each.name in names])
    run_json("apply", "-f", files, "--yes")
    spoil(settings, value)
    listed = run("rollouts", "list", "--json")
    assert listed.stderr.startswith("warning: ")
    assert "pointer" in listed.stderr or "is not on the topic" in listed.stderr
    assert [each["state"] for each in orjson.loads(listed.stdout)["rollouts"]] == ["progressing"]
    paused = run("rollouts", "pause", "credit/default/pd")
    assert paused.exit_code == 0, paused.output
    assert status(settings).state == "paused"
    spoil(settings, value)
    aborted = run("rollouts", "abort", "credit/default/pd")
    assert aborted.exit_code == 0, aborted.output
    assert status(settings).state == "aborted"


def spoil(settings: Settings, value: bytes | None) -> None:
    """Write a pointer by hand."""
    producer = Producer({"bootstrap.servers": settings.kafka_bootstrap})
    producer.produce(settings.topic(REGISTRY_TOPIC), key=POINTER_KEY, value=value, partition=0)
    assert producer.flush(20) == 0
