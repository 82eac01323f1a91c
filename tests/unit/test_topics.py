"""The topics' documents make the topics of the contract."""

from pathlib import Path

import pytest

from app.adapters.topics import AGGREGATED, COPARTITIONED, WINDOWED, is_kept, own_topics, read_documents, wanted_topics
from app.domain.errors import ConfigurationError
from app.settings import Settings

DAY = "86400000"


def test_topics_of_others_are_not_ours() -> None:
    """What the documents make for any pool is; the rest of a cluster is not, whatever it ends in."""
    documents = read_documents()
    wanted = {topic.name for topic in wanted_topics(documents, Settings(), ["gpu-1"])}
    others = {"orders-dlt", "inference.tasks.-dlt", "inference.tasks.A-dlt", "x.inference.requests-dlt", "audit-dlt"}
    assert own_topics(wanted | others, Settings(), documents) == wanted
    prefixed = Settings(topic_prefix="x.")
    assert own_topics(wanted | others, prefixed, documents) == {"x.inference.requests-dlt"}


def test_which_topics_hold_the_broker_s_own_records() -> None:
    """Every topic that a document makes but that of replies; a topic of somebody's own is not."""
    made = {topic.name for topic in wanted_topics(read_documents(), Settings(), ["gpu-1", "default"])}
    assert {name for name in made if not is_kept(name)} == {"inference.replies"}
    assert {*AGGREGATED, *COPARTITIONED, *WINDOWED} <= made
    assert not any(map(is_kept, ("loans.replies", "inference.tasksize", "features.updates.replies", "a-changelog")))


def test_the_contract_s_topics() -> None:
    """Every topic of the contract, with its cleanup and retention, under the prefix."""
    settings = Settings(topic_prefix="p.", partitions=3)
    topics = {topic.name: topic for topic in wanted_topics(read_documents(), settings, ["gpu", "cpu"])}
    kept = {name: (each.config["cleanup.policy"], each.config.get("retention.ms")) for name, each in topics.items()}
    dead_letters = ("delete", str(30 * int(DAY)))
    assert kept == {
        "p.inference.requests": ("delete", str(7 * int(DAY))),
        "p.inference.requests-dlt": dead_letters,
        "p.inference.tasks.cpu": ("delete", DAY),
        "p.inference.tasks.cpu-dlt": dead_letters,
        "p.inference.tasks.gpu": ("delete", DAY),
        "p.inference.tasks.gpu-dlt": dead_letters,
        "p.inference.results": ("delete", DAY),
        "p.inference.results-dlt": dead_letters,
        "p.inference.replies": ("delete", DAY),
        "p.inference.audit": ("delete", str(30 * int(DAY))),
        "p.inference.audit-dlt": dead_letters,
        "p.features.updates": ("delete", str(7 * int(DAY))),
        "p.features.updates-dlt": dead_letters,
        "p.broker.registry": ("compact", None),
        "p.decide-joins-changelog": ("compact", None),
        "p.rollouts-windows-changelog": ("compact", None),
        "p.features-aggregates-changelog": ("compact", None),
    }
    partitions = {name: each.partitions for name, each in topics.items()}
    assert partitions.pop("p.broker.registry") == 1
    assert set(partitions.values()) == {3}
    assert {settings.topic(name) for name in (*COPARTITIONED, *WINDOWED, *AGGREGATED)} <= partitions.keys()
    assert topics["p.inference.requests"].config["message.timestamp.type"] == "LogAppendTime"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no topic documents"),
        ("name: [", "a.yaml"),
        ("name: a\nconfig: {}\ncolour: red\n", "colour"),
        ("name: a\nconfig: {retention.ms: soon}\n", "not a duration"),
    ],
)
def test_documents_that_cannot_be_read(tmp_path: Path, text: str | None, said: str) -> None:
    """The file and the reason are named."""
    if text is not None:
        (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        read_documents(tmp_path)


def test_a_dead_letter_topic_needs_its_document(tmp_path: Path) -> None:
    """A topic is not left without the dead-letter topic that it asks for."""
    (tmp_path / "a.yaml").write_text("name: a\ndeadLetter: true\nconfig: {}\n")
    with pytest.raises(ConfigurationError, match="no document describes one"):
        wanted_topics(read_documents(tmp_path), Settings(), [])
