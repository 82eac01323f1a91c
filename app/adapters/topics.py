"""Topics as their documents in ``topics/`` declare them, and as Kafka has them: compared, created, altered.

A document names a topic, its configuration, and whether a dead-letter topic stands beside it. The number of partitions
is one setting for all of them (a document may fix its own), for requests, results, audit and the joins changelog must
have as many. Partitions of an existing topic are never changed: keys would move to other partitions, and with them
decisions away from their duplicates.
"""

import functools
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from app.domain.errors import ConfigurationError, Unreachable
from app.durations import parse_duration_ms
from app.resources import resource_dir
from app.settings import Settings

REGISTRY_TOPIC: Final = "broker.registry"
REPLIES_TOPIC: Final = "inference.replies"
JOINS_CHANGELOG: Final = "decide-joins-changelog"
COPARTITIONED: Final = ("inference.requests", "inference.results", "inference.audit", JOINS_CHANGELOG)
"""Topics whose equal partitions one decide worker holds together."""
ROLLOUT_WINDOWS: Final = "rollouts-windows-changelog"
WINDOWED: Final = ("inference.audit", ROLLOUT_WINDOWS)
"""Topics whose equal partitions one rollouts worker holds together."""
AGGREGATES_CHANGELOG: Final = "features-aggregates-changelog"
AGGREGATED: Final = ("features.updates", AGGREGATES_CHANGELOG)
"""Topics whose equal partitions one features worker holds together."""

_POOL: Final = "<pool>"
_TOPIC: Final = "<topic>"
_POOL_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_DONE_WITHIN_S: Final = 30.0
CONNECT_WITHIN_S: Final = 5.0
"""Of a command: a Kafka that is there answers the first question within a second, and a person waits for the answer."""
_POLL_S: Final = 0.05


def pool_topic(pool: str) -> str:
    """The contract name of a pool's tasks.

    >>> pool_topic("default")
    'inference.tasks.default'
    """
    return f"inference.tasks.{pool}"


def dead_letter_topic(topic: str) -> str:
    """The topic beside ``topic`` that takes what cannot be processed.

    >>> dead_letter_topic("inference.requests")
    'inference.requests-dlt'
    """
    return f"{topic}-dlt"


def _in_milliseconds(config: dict[str, str]) -> dict[str, str]:
    return {key: str(parse_duration_ms(value)) if key.endswith(".ms") else value for key, value in config.items()}


class TopicDocument(BaseModel):
    """One document of ``topics/``; a name with ``<pool>`` or ``<topic>`` is a template of several."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    partitions: int | None = Field(None, gt=0, description="default: the setting's")
    dead_letter: bool = Field(False, alias="deadLetter")
    config: Annotated[dict[str, str], AfterValidator(_in_milliseconds)]


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as it should be; ``name`` is the full one, with the prefix."""

    name: str
    partitions: int
    config: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which Kafka's topic differs from its document; ``found`` None: there is none."""

    topic: str
    what: str
    wanted: str
    found: str | None

    def __str__(self) -> str:
        if self.what == "topic":
            return f"{self.topic}: does not exist"
        return f"{self.topic}: {self.what} is {self.found}, and should be {self.wanted}"


@dataclass(frozen=True, slots=True)
class Applied:
    """What ``TopicAdmin.apply`` did."""

    created: tuple[str, ...] = ()
    altered: tuple[Difference, ...] = ()
    unchanged: tuple[str, ...] = field(default=())


def read_documents(directory: Path | None = None) -> tuple[TopicDocument, ...]:
    """The documents of ``directory``, or those that ship with the package.

    Raises:
        ConfigurationError: there are none, or one cannot be read; the message names the file.
    """
    directory = directory or resource_dir("topics")
    documents = []
    for path in sorted(directory.glob("*.yaml")):
        try:
            documents.append(TopicDocument.model_validate(yaml.safe_load(path.read_text())))
        except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path} does not describe a topic: {error}") from error
    if not documents:
        raise ConfigurationError(f"{directory} holds no topic documents (*.yaml)")
    return tuple(documents)


def wanted_topics(documents: Iterable[TopicDocument], settings: Settings, pools: Collection[str]) -> tuple[Topic, ...]:
    """Every topic that ``documents`` make, with the tasks of ``pools``, dead-letter topics and the prefix."""
    documents = tuple(documents)
    dead_letter = next((document for document in documents if _TOPIC in document.name), None)
    topics: list[Topic] = []
    for document in documents:
        if document is dead_letter:
            continue
        is_template = _POOL in document.name
        names = [document.name.replace(_POOL, pool) for pool in sorted(pools)] if is_template else [document.name]
        partitions = document.partitions or settings.partitions
        for name in names:
            topics.append(Topic(settings.topic(name), partitions, document.config))
            if document.dead_letter:
                if dead_letter is None:
                    raise ConfigurationError(f"topic {name} wants a dead-letter topic, and no document describes one")
                topics.append(Topic(settings.topic(dead_letter_topic(name)), partitions, dead_letter.config))
    return tuple(topics)


def is_kept(name: str) -> bool:
    """Whether ``name``, without the prefix, is a topic of the broker's own records: a reply there would be read as a
    request, a revision, a worker's state. Every document's is, but that of replies, and every dead-letter topic.

    >>> is_kept("features-aggregates-changelog"), is_kept("inference.tasks.batch"), is_kept("inference.replies")
    (True, True, False)
    """
    names, prefixes = _kept()
    return name in names or name.startswith(prefixes) or name.endswith(dead_letter_topic(""))


@functools.cache
def _kept() -> tuple[frozenset[str], tuple[str, ...]]:
    """The names, and what those begin with that are made by template."""
    names = [document.name for document in read_documents() if _TOPIC not in document.name]
    return (
        frozenset(name for name in names if _POOL not in name and name != REPLIES_TOPIC),
        tuple(name.partition(_POOL)[0] for name in names if _POOL in name),
    )


class TopicAdmin:
    """Kafka's topics, by its admin protocol. Every call is bounded by ``timeout_s``.

    Each method raises ConfigurationError where Kafka does not answer or refuses; the message says what.
    """

    def __init__(self, settings: Settings, *, timeout_s: float = 15.0) -> None:
        self._bootstrap = settings.kafka_bootstrap
        self._timeout_s = timeout_s
        self._replication_factor = settings.replication_factor
        # The client's own log lines repeat what the exceptions say.
        self._admin = AdminClient({"bootstrap.servers": self._bootstrap, "log_level": 0})

    def partition_counts(self) -> dict[str, int]:
        """The number of partitions of every topic that can be used: each partition has a leader."""
        try:
            topics = self._admin.list_topics(timeout=min(self._timeout_s, CONNECT_WITHIN_S)).topics
        except KafkaException as error:
            raise self._failed("listing topics", error) from error
        return {
            name: len(topic.partitions)
            for name, topic in topics.items()
            if topic.error is None and all(partition.leader >= 0 for partition in topic.partitions.values())
        }

    def ids(self, names: Sequence[str]) -> dict[str, str]:
        """What tells each topic from one of its name that was there before, or comes later."""
        asked = self._admin.describe_topics(TopicCollection(list(names)), request_timeout=self._timeout_s)
        return {name: str(self._result(future, f"looking up {name}").topic_id) for name, future in asked.items()}

    def differences(self, topics: Sequence[Topic]) -> tuple[Difference, ...]:
        """In what Kafka's topics differ from ``topics``."""
        counts = self.partition_counts()
        found = [topic for topic in topics if topic.name in counts]
        configs = self._configs([topic.name for topic in found])
        differences = [
            Difference(topic.name, "topic", "to exist", None) for topic in topics if topic.name not in counts
        ]
        for topic in found:
            if counts[topic.name] != topic.partitions:
                differences.append(Difference(topic.name, "partitions", str(topic.partitions), str(counts[topic.name])))
            actual = configs[topic.name]
            differences += [
                Difference(topic.name, key, value, actual.get(key))
                for key, value in topic.config.items()
                if actual.get(key) != value
            ]
        return tuple(differences)

    def apply(self, topics: Sequence[Topic]) -> Applied:
        """Create what is missing and alter configurations that differ.

        Raises:
            ConfigurationError: a topic has another number of partitions, and then nothing at all is changed; or Kafka
                refuses.
        """
        differences = self.differences(topics)
        partitions = [difference for difference in differences if difference.what == "partitions"]
        if partitions:
            raise ConfigurationError(
                "; ".join(map(str, partitions))
                + ". Partitions of an existing topic are not changed, for its keys would move: set BROKER_PARTITIONS "
                "to what is there, or use new topics under another BROKER_TOPIC_PREFIX. Nothing was changed"
            )
        missing = {difference.topic for difference in differences if difference.what == "topic"}
        self._create([topic for topic in topics if topic.name in missing])
        altered = tuple(difference for difference in differences if difference.what != "topic")
        self._alter(altered)
        touched = missing | {difference.topic for difference in altered}
        return Applied(
            tuple(topic.name for topic in topics if topic.name in missing),
            altered,
            tuple(topic.name for topic in topics if topic.name not in touched),
        )

    def _configs(self, names: Sequence[str]) -> dict[str, dict[str, str | None]]:
        if not names:
            return {}
        asked = self._admin.describe_configs(
            [ConfigResource(ResourceType.TOPIC, name) for name in names], request_timeout=self._timeout_s
        )
        return {
            resource.name: {key: entry.value for key, entry in self._result(future, f"reading {resource.name}").items()}
            for resource, future in asked.items()
        }

    def _create(self, topics: Sequence[Topic]) -> None:
        if not topics:
            return
        new = [
            NewTopic(
                topic.name,
                num_partitions=topic.partitions,
                replication_factor=self._replication_factor,
                config=dict(topic.config),
            )
            for topic in topics
        ]
        asked = self._admin.create_topics(new, operation_timeout=_DONE_WITHIN_S, request_timeout=_DONE_WITHIN_S)
        for name, future in asked.items():
            self._result(future, f"creating {name}", unless=KafkaError.TOPIC_ALREADY_EXISTS)
        names = {topic.name for topic in topics}
        self._await(
            lambda: names <= self.partition_counts().keys(),
            f"created {', '.join(sorted(names))}, but they have no leaders",
        )

    def _await(self, done: Callable[[], bool], otherwise: str) -> None:
        """Kafka answers before every broker knows of a change, and who comes next may ask any broker."""
        give_up_at = time.monotonic() + _DONE_WITHIN_S
        while not done():
            if time.monotonic() > give_up_at:
                raise ConfigurationError(
                    f"Kafka at {self._bootstrap}: {otherwise} after {_DONE_WITHIN_S:.0f} s; are all brokers up?"
                )
            time.sleep(_POLL_S)

    def _alter(self, differences: Sequence[Difference]) -> None:
        by_topic: dict[str, list[Difference]] = {}
        for difference in differences:
            by_topic.setdefault(difference.topic, []).append(difference)
        if not by_topic:
            return
        asked = self._admin.incremental_alter_configs(
            [
                ConfigResource(
                    ResourceType.TOPIC,
                    name,
                    incremental_configs=[
                        ConfigEntry(each.what, each.wanted, incremental_operation=AlterConfigOpType.SET)
                        for each in changes
                    ],
                )
                for name, changes in by_topic.items()
            ],
            request_timeout=self._timeout_s,
        )
        for resource, future in asked.items():
            self._result(future, f"altering {resource.name}")
        self._await(
            lambda: all(self._configs([each.topic])[each.topic].get(each.what) == each.wanted for each in differences),
            f"altered {', '.join(by_topic)}, but the brokers do not say so",
        )

    def _result(self, future: "Future[Any]", doing: str, unless: int | None = None) -> Any:
        try:
            return future.result(timeout=_DONE_WITHIN_S + self._timeout_s)
        except KafkaException as error:
            if error.args[0].code() == unless:
                return None
            raise self._failed(doing, error) from error
        except TimeoutError as error:
            raise ConfigurationError(f"Kafka at {self._bootstrap}: {doing}: no answer; is it overloaded?") from error

    def _failed(self, doing: str, error: KafkaException) -> ConfigurationError:
        return refused_by_kafka(self._bootstrap, doing, error)


def refused_by_kafka(bootstrap: str, doing: str, error: KafkaException) -> ConfigurationError:
    """What a command says where Kafka does not answer, or refuses."""
    reason = error.args[0]
    said = f"Kafka at {bootstrap}: {doing}: {reason.str()}"
    if reason.code() in (KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._ALL_BROKERS_DOWN):
        return Unreachable(f"{said}; is it running, and is BROKER_KAFKA_BOOTSTRAP right?")
    return ConfigurationError(said)


def own_topics(names: Iterable[str], settings: Settings, documents: Iterable[TopicDocument]) -> frozenset[str]:
    """Those of ``names`` that the documents make for some pool: others' topics in the cluster are not ours to show."""
    patterns = [
        (document.name.partition(_POOL), bool(document.dead_letter))
        for document in documents
        if _TOPIC not in document.name
    ]
    ours = set()
    for name in names:
        for (head, template, tail), dead_letter in patterns:
            begin = settings.topic(head)
            for end in (tail, dead_letter_topic(tail)) if dead_letter else (tail,):
                pool = name[len(begin) : len(name) - len(end)]
                if name == begin + pool + end and _POOL_NAME.fullmatch(pool) if template else name == begin + end:
                    ours.add(name)
    return frozenset(ours)


def check_copartitioned(settings: Settings, topics: Sequence[str] = COPARTITIONED) -> int:
    """The partition count that ``topics`` (contract names) share; a worker checks it before it starts.

    Raises:
        ConfigurationError: one does not exist, they differ, or Kafka does not answer.
    """
    counts = TopicAdmin(settings).partition_counts()
    names = [settings.topic(topic) for topic in topics]
    missing = [name for name in names if name not in counts]
    if missing:
        raise ConfigurationError(f"no topic {', '.join(missing)}: create with `model-broker topics apply`")
    found = {name: counts[name] for name in names}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in found.items())
        raise ConfigurationError(
            f"these topics must have the same number of partitions, for a worker holds equal ones together: {listed}; "
            "make new ones with `model-broker topics apply` under another BROKER_TOPIC_PREFIX"
        )
    return found[names[0]]
