"""Publishes what is known about the applicants: `python -m examples.credit.features [--event-time T] [--json]`.

One FeatureUpdate (JSON) an applicant goes to `features.updates`, keyed by the entity, so that updates of one applicant
keep their order. The features worker takes them from there into the store. Where Kafka is comes from
`BROKER_KAFKA_BOOTSTRAP` and `BROKER_TOPIC_PREFIX`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.progress import Progress

from app.settings import Settings
from examples.credit.applicants import PROJECT, VIEW, Applicant, applicants

TOPIC = "features.updates"
SENDS_AT_ONCE = 100
TOPIC_SECONDS = 10.0  # a topic created just before takes a moment to be known
SEND_SECONDS = 30.0  # of one group of sends, first connection included; the demo's machines are slow


def update_of(applicant: Applicant, event_time: datetime) -> tuple[bytes, bytes]:
    """An applicant's FeatureUpdate: key and JSON value."""
    update: dict[str, Any] = {
        "project": PROJECT,
        "view": VIEW,
        "entities": {"applicant_id": applicant.applicant_id},
        "values": dict(applicant.features),
        "event_time": event_time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return f"applicant_id={applicant.applicant_id}".encode(), orjson.dumps(update)


async def publish(settings: Settings, people: Sequence[Applicant], event_time: datetime, console: Console) -> int:
    """Publish an update for each applicant; returns how many Kafka has acknowledged.

    Raises KafkaError or TimeoutError when it does not acknowledge them.
    """
    topic = settings.topic(TOPIC)
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka_bootstrap, acks="all", enable_idempotence=True, linger_ms=5
    )
    published = 0
    try:
        async with asyncio.timeout(SEND_SECONDS):
            await producer.start()
        try:
            async with asyncio.timeout(TOPIC_SECONDS):
                await producer.partitions_for(topic)
        except TimeoutError as error:
            raise TimeoutError(f"the topic was not there for {TOPIC_SECONDS:.0f} s") from error
        with Progress(console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(f"features to {topic}", total=len(people))
            for start in range(0, len(people), SENDS_AT_ONCE):
                group = people[start : start + SENDS_AT_ONCE]
                async with asyncio.timeout(SEND_SECONDS):
                    updates = (update_of(person, event_time) for person in group)
                    sends = [await producer.send(topic, value, key=key) for key, value in updates]
                    await asyncio.gather(*sends)
                published += len(group)
                progress.update(bar, completed=published)
    finally:
        await producer.stop()
    return published


def main(arguments: Sequence[str] | None = None) -> int:
    """Publish all applicants' features and say how many there were."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.credit.features", description="Publish the applicants' features to Kafka."
    )
    parser.add_argument(
        "--event-time", type=datetime.fromisoformat, help="when they were true, ISO 8601 (default: now)"
    )
    parser.add_argument("--json", action="store_true", help="print what was published as JSON")
    options = parser.parse_args(arguments)
    settings = Settings()
    # The client logs each attempt of its retries; the one line at the end says what came of them.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    event_time = options.event_time or datetime.now(UTC)
    if event_time.tzinfo is None:
        event_time = event_time.replace(tzinfo=UTC)
    try:
        published = asyncio.run(publish(settings, applicants(), event_time, Console(stderr=True)))
    except (KafkaError, TimeoutError) as error:
        print(
            f"cannot publish to {settings.topic(TOPIC)} at {settings.kafka_bootstrap}: "
            f"{str(error) or 'no answer in time'}; check BROKER_KAFKA_BOOTSTRAP and that "
            "`model-broker topics apply` has run",
            file=sys.stderr,
        )
        return 1
    if options.json:
        print(orjson.dumps({"topic": settings.topic(TOPIC), "published": published}).decode())
    else:
        print(f"{published} feature updates in {settings.topic(TOPIC)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
