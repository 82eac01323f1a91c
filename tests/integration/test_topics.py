"""Topics on real Kafka: created as declared, mended where they differ, refused where mending would move keys."""

import pytest

from app.adapters.topics import (
    COPARTITIONED,
    JOINS_CHANGELOG,
    Difference,
    Topic,
    TopicAdmin,
    check_copartitioned,
    read_documents,
    wanted_topics,
)
from app.domain.errors import ConfigurationError
from app.settings import Settings


@pytest.fixture
def settings(kafka_bootstrap: str, topic_prefix: str) -> Settings:
    """Settings whose prefix is this test's alone."""
    return Settings(kafka_bootstrap=kafka_bootstrap, topic_prefix=topic_prefix, partitions=3)


def test_topics_are_created_once_and_mended(settings: Settings) -> None:
    """What is missing is created, what differs is altered, what is right is left alone, and each is told."""
    admin, wanted = TopicAdmin(settings), wanted_topics(read_documents(), settings, ["default"])
    names = tuple(topic.name for topic in wanted)
    assert {difference.what for difference in admin.differences(wanted)} == {"topic"}
    assert admin.apply(wanted).created == names
    assert admin.differences(wanted) == ()
    assert admin.apply(wanted).unchanged == names

    audit = settings.topic("inference.audit")
    shorter = [Topic(audit, 3, {"retention.ms": "1000"})]
    (altered,) = admin.apply(shorter).altered
    assert altered == Difference(audit, "retention.ms", "1000", "2592000000")
    (difference,) = admin.differences(wanted)
    assert str(difference) == f"{audit}: retention.ms is 1000, and should be 2592000000"
    assert admin.apply(wanted).altered == (difference,)
    assert admin.differences(wanted) == ()


def test_another_partition_count_is_refused_and_nothing_is_changed(settings: Settings) -> None:
    """Keys would move, so the operator is told what to set; not even missing topics are created."""
    admin, wanted = TopicAdmin(settings), wanted_topics(read_documents(), settings, [])
    admin.apply([topic for topic in wanted if topic.name == settings.topic("inference.requests")])
    more = wanted_topics(read_documents(), settings.model_copy(update={"partitions": 5}), [])
    with pytest.raises(ConfigurationError, match=r"partitions is 3, and should be 5.*BROKER_PARTITIONS"):
        admin.apply(more)
    assert settings.topic("inference.audit") not in admin.partition_counts()


def test_copartitioned_topics_are_checked(settings: Settings) -> None:
    """A decide worker starts only where requests, results, audit and changelog can be assigned together."""
    with pytest.raises(ConfigurationError, match="topics apply"):
        check_copartitioned(settings)
    admin = TopicAdmin(settings)
    config = {"cleanup.policy": "delete"}
    first, *others = [settings.topic(name) for name in COPARTITIONED]
    admin.apply([Topic(first, 2, config), *(Topic(name, 3, config) for name in others)])
    with pytest.raises(ConfigurationError, match=rf"{first} has 2, .*{settings.topic(JOINS_CHANGELOG)} has 3"):
        check_copartitioned(settings)
    other = settings.model_copy(update={"topic_prefix": f"{settings.topic_prefix}other."})
    admin.apply([Topic(other.topic(name), 3, config) for name in COPARTITIONED])
    assert check_copartitioned(other) == 3


def test_what_kafka_refuses_is_said(settings: Settings) -> None:
    """A replication factor that the cluster cannot keep, a value that Kafka does not know, and no Kafka at all."""
    wanted = [Topic(settings.topic("a"), 1, {"cleanup.policy": "delete"})]
    with pytest.raises(ConfigurationError, match=f"creating {settings.topic('a')}"):
        TopicAdmin(settings.model_copy(update={"replication_factor": 9})).apply(wanted)
    admin = TopicAdmin(settings)
    admin.apply(wanted)
    with pytest.raises(ConfigurationError, match=f"altering {settings.topic('a')}"):
        admin.apply([Topic(settings.topic("a"), 1, {"cleanup.policy": "burn"})])
    with pytest.raises(ConfigurationError, match="is it running"):
        TopicAdmin(settings.model_copy(update={"kafka_bootstrap": "127.0.0.1:1"}), timeout_s=1.0).apply(wanted)
