"""What `model-broker get` shows of documents, and how `apply` and `rollback` publish: when, and beside others."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from rich.console import Console

from app.adapters.registry_topic import Head, Pointer, Published
from app.commands import registry as registry_module
from app.commands.pace import Pace
from app.commands.registry import Draft, Offered, _documents_table, offer
from app.domain.documents import Document
from app.domain.errors import PublisherFenced, RevisionConflict
from app.domain.registry import Revision, compile_revision
from app.domain.rollout_status import statuses_of, with_status
from app.settings import Settings
from tests.support.registry_documents import changed, document, revision, sound, task

COMPUTED = document(
    "FeatureView",
    "ratio",
    {
        "features": [{"name": "double", "type": "DOUBLE"}],
        "onDemand": {"double": "inputs.amount * 2.0"},
    },
)


@pytest.mark.parametrize(
    ("view", "features"),
    [
        ("applicant", "age, history, age_mean_30d, age_mean_7d, count_1h"),
        ("ratio", "double"),
    ],
)
def test_a_view_is_shown_with_all_that_it_serves(view: str, features: str) -> None:
    """The features that updates carry, those that are aggregated from them, and those computed on demand."""
    aggregate = [{"of": "age", "op": "mean", "windows": ["30d", "7d"]}, {"op": "count", "windows": ["1h"]}]
    made = revision([*changed(sound(), "applicant", "spec.aggregate", aggregate), COMPUTED])
    console = Console(width=200)
    with console.capture() as capture:
        documents: list[Document] = [each for each in made.documents if each.kind == "FeatureView"]
        console.print(_documents_table("FeatureView", documents, made))
    (line,) = [line for line in capture.get().splitlines() if line.split()[:1] == [view]]
    assert features in line


# --- publishing -------------------------------------------------------------------------------------------------------

ROLLOUT = {"to": "2", "steps": [5, 50, 100], "every": "10m"}
SHOWN_MS, CONFIRMED_MS = 1_000_000, 1_030_000


@dataclass
class Topic:
    """The registry's topic, as `offer` sees it, and a clock; ``meanwhile`` happens before each publication, in turn."""

    head: Head = field(default_factory=lambda: Head(None, None))
    now_ms: int = SHOWN_MS
    meanwhile: list[Callable[[], None]] = field(default_factory=list)
    published: list[tuple[Revision, int]] = field(default_factory=list)
    slept_s: list[float] = field(default_factory=list)

    def publish(self, _: Settings, new: Revision, *, expected: Head, now_ms: int, message: str | None) -> None:
        """``publish_revision``."""
        if self.meanwhile:
            self.meanwhile.pop(0)()
        if expected.id != self.head.id:
            raise RevisionConflict("another one is current")
        self.published.append((new, now_ms))
        self.put(new)

    def put(self, new: Revision) -> None:
        """Make it the current one."""
        self.head = Head(new.id, Published(Pointer(new.id, None, 1, 1), new), new)

    def confirm(self) -> None:
        """Somebody looks at the difference for half a minute."""
        self.now_ms = CONFIRMED_MS

    @property
    def pace(self) -> Pace:
        """Its clock; chance is one half, and sleep takes no time."""
        return Pace(lambda: self.now_ms, lambda: 0.5, self.slept_s.append)


@pytest.fixture
def topic(monkeypatch: pytest.MonkeyPatch) -> Topic:
    """A topic on which nothing was published."""
    made = Topic()
    monkeypatch.setattr(registry_module, "publish_revision", made.publish)
    monkeypatch.setattr(registry_module, "read_head", lambda _: made.head)
    monkeypatch.setattr(registry_module, "_create_pool_topics", lambda *_: None)
    monkeypatch.setattr(registry_module, "_confirm", made.confirm)
    return made


def offered(topic: Topic, owner: str = "risk", *, rolling: bool = False, **options: Any) -> Offered:
    """What `apply` makes of the sound documents of ``owner``."""
    rollout = {"rollout": ROLLOUT} if rolling else {}
    documents = changed(sound(), "credit", "spec.rules.0.tasks.0", task(select={"version": "1"}, **rollout))
    written = revision(changed(documents, "credit-pd", "spec.owner", owner))
    draft = Draft(
        lambda head, now_ms: with_status(written.documents, head.carried, now_ms),
        lambda drawn: written if drawn == written.documents else compile_revision(drawn),
    )
    given: dict[str, Any] = {"message": None, "dry_run": False, "yes": False, "as_json": True, **options}
    return offer(Settings(), draft, topic.head, pace=topic.pace, **given)


def fence() -> None:
    raise PublisherFenced("another publisher took over")


def test_what_is_published_begins_when_it_is_published(topic: Topic) -> None:
    """However long somebody looked at the difference: a rollout's first step is not over by then."""
    made = offered(topic, rolling=True)
    ((new, published_ms),) = topic.published
    assert published_ms == CONFIRMED_MS
    assert [each.since for each in statuses_of(new.documents).values()] == [CONFIRMED_MS]
    assert (made.published, made.revision.id, made.as_json()["revision"]) == (True, new.id, new.id)


def test_an_id_that_is_not_known_yet_is_not_told(topic: Topic, capsys: pytest.CaptureFixture[str]) -> None:
    """A rollout that begins has its moment in the revision; what has none is called by its id."""
    looked = offered(topic, rolling=True, dry_run=True, as_json=False)
    assert "sha256:" not in capsys.readouterr().out
    assert "the moment of its publication" in looked.named
    assert orjson.loads(orjson.dumps(looked.as_json()))["revision"] is None
    published = offered(topic, rolling=True)
    assert offered(topic, rolling=True, dry_run=True).as_json()["revision"] == published.revision.id
    plain = offered(topic, "others", rolling=True, dry_run=True, as_json=False)
    assert "\u2192 sha256:" in capsys.readouterr().out
    assert plain.named == plain.as_json()["revision"] == plain.revision.id


def test_who_is_fenced_steps_aside(topic: Topic) -> None:
    """For a random time that grows, or two publishers would fence one another again and again."""
    topic.meanwhile += [fence, fence]
    assert offered(topic).published
    assert topic.slept_s == [0.5, 1.0]
    assert len(topic.published) == 1


def test_who_is_fenced_without_end_gives_up(topic: Topic) -> None:
    """And says so."""
    topic.meanwhile += [fence] * 20
    with pytest.raises(PublisherFenced):
        offered(topic)
    assert not topic.published
    assert len(topic.slept_s) == 6


def test_who_is_fenced_by_other_documents_does_not_overwrite_them(topic: Topic) -> None:
    """They are a conflict; the very same ones are nothing to publish."""

    def others() -> None:
        topic.put(revision(changed(sound(), "credit-pd", "spec.owner", "others")))
        fence()

    topic.meanwhile.append(others)
    with pytest.raises(RevisionConflict, match="look at the difference again"):
        offered(topic)
    assert not topic.published
    assert offered(topic).published
    first = topic.head

    def same() -> None:
        topic.head = first
        fence()

    topic.put(revision(changed(sound(), "credit-pd", "spec.owner", "others")))
    topic.meanwhile.append(same)
    assert offered(topic).unchanged
    assert len(topic.published) == 1
