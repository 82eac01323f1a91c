"""A load of feature updates: published in parts that are acknowledged as a whole, and waited for until stored.

A journal beside the local state says how far a load came, so that one that was killed goes on where it was. Updates of
the part that was under way are sent again; their ids and event times make that the same as sending them once. A journal
of records that Kafka has no more is void, for nobody can tell whether they were stored: all rows are published again.

What a worker has committed is stored, or lies in the dead-letter topic. So that topic is read from where it ended
before the load, and letters that carry an id of the load's tell which rows were refused.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from app.adapters.dead_letter_topics import DeadLetter
from app.adapters.dead_letters import ORIGINAL_TOPIC, SUFFIX
from app.adapters.feast_codec import encode_values
from app.adapters.redis_feast import too_long
from app.adapters.topic_reader import ends_of, marks_of, read_topic
from app.adapters.topics import CONNECT_WITHIN_S, TopicAdmin, refused_by_kafka
from app.domain.errors import ConfigurationError, PublishFailed, StoreUnavailable
from app.domain.feature_rows import RowRefused, Update
from app.domain.feature_updates import FeatureRow
from app.settings import Settings

UPDATES_TOPIC: Final = "features.updates"
FEATURES_GROUP: Final = "features"
UPDATE_ID_HEADER: Final = "update-id"
PART_ROWS: Final = 5_000
_RECORD_OVERHEAD_BYTES: Final = 24_000
"""What Kafka adds to a record and a batch, and more: an update that was found to fit is never refused for that."""
_ACKNOWLEDGED_WITHIN_S: Final = 60.0
_POLL_S: Final = 0.2


@dataclass(slots=True)
class Journal:
    """How far a load came: rows that are published, and where in each partition they start and end.

    ``letters``: where each partition of the dead-letter topic ended when it began. ``topics``: the ids of both topics.
    """

    path: Path
    rows: int = 0
    starts: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    letters: dict[int, int] = field(default_factory=dict)
    topics: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, settings: Settings, file: Path, **options: Any) -> "Journal":
        """The journal of this load, begun before or new: of the same file, unchanged, with the same options."""
        stat = file.stat()
        place = (settings.kafka_bootstrap, settings.topic_prefix)
        of = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, *place, options]
        digest = hashlib.sha256(orjson.dumps(of, option=orjson.OPT_SORT_KEYS)).hexdigest()
        path = settings.data_dir / "loads" / f"{digest[:32]}.json"
        try:
            held = orjson.loads(path.read_bytes())
            starts, ends, letters = (
                {int(partition): offset for partition, offset in held[name].items()}
                for name in ("starts", "ends", "letters")
            )
            return cls(path, held["rows"], starts, ends, letters, dict(held["topics"]))
        except FileNotFoundError:
            return cls(path)
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ConfigurationError(
                f"{path}, the journal of this load, cannot be read ({error}): remove it"
            ) from error

    def save(self) -> None:
        """Write it, whole or not at all."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_suffix(".new")
            held = {
                "rows": self.rows,
                "starts": self.starts,
                "ends": self.ends,
                "letters": self.letters,
                "topics": self.topics,
            }
            beside.write_bytes(orjson.dumps(held, option=orjson.OPT_NON_STR_KEYS))
            os.replace(beside, self.path)
        except OSError as error:
            raise ConfigurationError(
                f"{self.path}: the journal cannot be written ({error}): set BROKER_DATA_DIR to a place that can"
            ) from error

    def void(self, updates: "TopicNow", letters: "TopicNow") -> str | None:
        """Why it says nothing of these topics; None where it holds."""
        for topic in (updates, letters):
            if self.topics.get(topic.name) != topic.id:
                return f"topic {topic.name} was created anew since an earlier run published"
        held = [(updates, self.starts, self.ends), (letters, self.letters, self.letters)]
        for topic, starts, ends in held:
            for partition, end in ends.items():
                first, last = topic.marks.get(partition, (0, 0))
                if end > last:
                    return f"partition {partition} of {topic.name} ends at {last}, and an earlier run saw it at {end}"
                if starts[partition] < first:
                    return (
                        f"Kafka has deleted records of partition {partition} of {topic.name} since an earlier run "
                        "published, so what was stored of it is not known"
                    )
        return None

    def clear(self) -> None:
        """It says nothing any more, as that of a load that is new."""
        self.rows = 0
        for each in (self.starts, self.ends, self.letters, self.topics):
            each.clear()

    def remove(self) -> None:
        """The load is through: the next one of this file begins anew."""
        self.path.unlink(missing_ok=True)


class TopicNow(NamedTuple):
    """A topic as it is: its full name, its id, and where each partition begins and ends."""

    name: str
    id: str
    marks: Mapping[int, tuple[int, int]]


def begin_anew(settings: Settings, journal: Journal) -> str | None:
    """Clear a journal that holds no longer, and say why; None where it goes on, or is new.

    Raises:
        ConfigurationError, StoreUnavailable: Kafka does not answer, or has no such topics.
    """
    if not journal.rows:
        return None
    names = _topics_of(settings)
    marks = [marks_of(settings, name) for name in names]
    ids = TopicAdmin(settings).ids(names)
    updates, letters = (TopicNow(name, ids[name], each) for name, each in zip(names, marks, strict=True))
    why = journal.void(updates, letters)
    if why is not None:
        journal.clear()
    return why


def _topics_of(settings: Settings) -> tuple[str, str]:
    topic = settings.topic(UPDATES_TOPIC)
    return topic, topic + SUFFIX


def refuse_oversized(update: Update, row: FeatureRow, settings: Settings) -> None:
    """Raises RowRefused where Kafka would not take the update, or the features worker not store one of its values."""
    encoded = encode_values(row.values, row.types)
    if (fault := too_long(row.names, encoded, settings.feature_value_bytes_max)) is not None:
        raise RowRefused(f"values.{fault}")
    size = len(update.key) + len(update.value) + len(UPDATE_ID_HEADER) + len(update.id)
    if size > settings.record_bytes_max:
        raise RowRefused(
            f"its update has {size} bytes, and BROKER_RECORD_BYTES_MAX allows {settings.record_bytes_max} to one that "
            "Kafka takes: load its columns in two files"
        )


def publish(settings: Settings, updates: Iterator[Update], journal: Journal, progress: Callable[[int], None]) -> None:
    """Publish ``updates``, those after the journal's rows; ``progress`` is told how many rows are through.

    Raises:
        ConfigurationError: Kafka does not answer, or has no such topic.
        PublishFailed: it did not acknowledge a part; the journal says how far it came.
    """
    topic = settings.topic(UPDATES_TOPIC)
    if not journal.letters:
        journal.letters = ends_of(settings, topic + SUFFIX)
    producer = Producer(
        {
            "bootstrap.servers": settings.kafka_bootstrap,
            "enable.idempotence": True,
            "acks": "all",
            "partitioner": "murmur2_random",
            "linger.ms": 20,
            "message.max.bytes": settings.record_bytes_max + _RECORD_OVERHEAD_BYTES,
            "allow.auto.create.topics": False,
            "log_level": 0,
        }
    )
    try:
        known = producer.list_topics(topic, timeout=CONNECT_WITHIN_S).topics[topic]
    except KafkaException as error:
        raise refused_by_kafka(settings.kafka_bootstrap, f"publishing to {topic}", error) from error
    if known.error is not None:
        raise ConfigurationError(f"no topic {topic}: create it with `model-broker topics apply`")
    if not journal.topics:
        journal.topics = TopicAdmin(settings).ids(_topics_of(settings))
    failures: list[str] = []
    starts, ends = journal.starts, journal.ends

    def delivered(error: Any, message: Any) -> None:
        if error is not None:
            failures.append(error.str())
        else:
            partition, offset = message.partition(), message.offset()
            starts[partition] = min(starts.get(partition, offset), offset)
            ends[partition] = max(ends.get(partition, 0), offset + 1)

    sent = 0
    for update in updates:
        while True:
            try:
                producer.produce(
                    topic, update.value, update.key, on_delivery=delivered, headers=[(UPDATE_ID_HEADER, update.id)]
                )
                break
            except BufferError:
                producer.poll(_POLL_S)
            except KafkaException as error:
                raise PublishFailed(f"{topic}: {error.args[0].str()}") from error
        sent += 1
        if sent == PART_ROWS:
            _acknowledge(producer, topic, failures)
            journal.rows += sent
            sent = 0
            journal.save()
            progress(journal.rows)
    _acknowledge(producer, topic, failures)
    journal.rows += sent
    journal.save()
    progress(journal.rows)


def _acknowledge(producer: Producer, topic: str, failures: list[str]) -> None:
    give_up = time.monotonic() + _ACKNOWLEDGED_WITHIN_S
    # In short turns, for an interrupt is noticed only between two of them.
    while (waiting := producer.flush(_POLL_S)) and not failures and time.monotonic() < give_up:
        pass
    if failures:
        raise PublishFailed(f"{topic} did not take {len(failures)} updates: {failures[0]}; run the same load again")
    if waiting:
        raise PublishFailed(
            f"{topic} did not acknowledge {waiting} updates within {_ACKNOWLEDGED_WITHIN_S:.0f} s; run the load again"
        )


def await_stored(
    settings: Settings, ends: Mapping[int, int], timeout_s: float, progress: Callable[[int], None]
) -> None:
    """Wait until the features workers have committed everything before ``ends``; ``progress``: records still ahead.

    Raises:
        StoreUnavailable: they have committed nothing new for ``timeout_s``, and are not through.
    """
    topic, group = settings.topic(UPDATES_TOPIC), f"{settings.topic_prefix}{FEATURES_GROUP}"
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka_bootstrap,
            "group.id": group,
            "enable.auto.commit": False,
            "log_level": 0,
        }
    )
    give_up, least = 0.0, sum(ends.values()) + 1
    try:
        while True:
            asked = [TopicPartition(topic, partition) for partition in ends]
            committed = {each.partition: max(each.offset, 0) for each in consumer.committed(asked, timeout=10.0)}
            ahead = sum(max(0, end - committed.get(partition, 0)) for partition, end in ends.items())
            progress(ahead)
            if not ahead:
                return
            if ahead < least:
                give_up, least = time.monotonic() + timeout_s, ahead
            elif time.monotonic() > give_up:
                raise StoreUnavailable(
                    f"published, but group {group} has {ahead} records of {topic} to go, and stored none of them for "
                    f"{timeout_s:.0f} s: does `model-broker worker features` run? Run the same load again to wait on"
                )
            time.sleep(_POLL_S)
    except KafkaException as error:
        raise StoreUnavailable(f"Kafka at {settings.kafka_bootstrap}: {error.args[0].str()}") from error
    finally:
        consumer.close()


def refused_updates(settings: Settings, journal: Journal) -> dict[bytes, str]:
    """Why updates were refused since the load began, by their ids; those of others are among them.

    Raises:
        ConfigurationError, StoreUnavailable: the dead-letter topic cannot be read.
    """
    topic = settings.topic(UPDATES_TOPIC)
    refused: dict[bytes, str] = {}
    reasons: dict[str, str] = {}
    for record in read_topic(settings, topic + SUFFIX, since=journal.letters):
        letter = DeadLetter(record, redriven=False)
        identity = letter.header(UPDATE_ID_HEADER)
        if identity is not None and letter.text(ORIGINAL_TOPIC) == topic:
            # A cause is mostly that of many, and each has its text once.
            reason = letter.reason or "the letter does not say why"
            refused[identity] = reasons.setdefault(reason, reason)
    return refused
