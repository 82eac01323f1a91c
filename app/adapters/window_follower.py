"""Following the windows of every partition: a plain consumer of their compacted changelog, from its beginning.

A rollouts worker counts in the partitions that it owns; who judges needs them all. And before a rollout goes on, what
was in the audit's log at the end of its step must have been counted: ``ends`` marks that place, ``reached`` tells
whether every worker has committed past it and its windows are here.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from app.adapters.changelog import entry_epoch, entry_key
from app.adapters.kafka_clients import REQUEST_TIMEOUT_MS, close_clients
from app.domain.errors import ConfigurationError, StoreUnavailable
from app.domain.windows import check_window
from app.settings import Settings

log = structlog.get_logger()

_POLL_MS: Final = 200
_RETRY_S: Final = 1.0
_ASK_WITHIN_S: Final = 10.0


class WindowFollower:
    """All entries of the topic ``changelog``, by partition.

    They count the records of ``log_topic``, of as many ``partitions``, as far as ``group`` has committed them.
    """

    def __init__(
        self, settings: Settings, *, changelog: str, log_topic: str, partitions: int, group: str, client_id: str
    ) -> None:
        self._bootstrap = settings.kafka_bootstrap
        self._changelog = changelog
        self._log_topic = log_topic
        self._group = group
        self._client_id = client_id
        self._entries: dict[int, dict[str, bytes]] = {number: {} for number in range(partitions)}
        self._epochs: dict[tuple[int, str], int] = {}
        self._took = asyncio.Event()
        self._consumer: AIOKafkaConsumer | None = None
        self._admin: AIOKafkaAdminClient | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def partitions(self) -> Mapping[int, Mapping[str, bytes]]:
        """Every partition's entries, by key."""
        return self._entries

    @property
    def healthy(self) -> bool:
        """Whether the next entry would be noticed."""
        return self._reading is not None and not self._reading.done()

    async def start(self, *, timeout_s: float = 30.0) -> None:
        """Read what is there, then follow.

        Raises:
            ConfigurationError: Kafka does not answer within ``timeout_s``.
        """
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            client_id=f"{self._client_id}-windows",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        self._consumer = consumer
        self._admin = AIOKafkaAdminClient(bootstrap_servers=self._bootstrap, client_id=f"{self._client_id}-progress")
        try:
            async with asyncio.timeout(timeout_s):
                await self._admin.start()
                await consumer.start()
                assigned = self._of(self._changelog)
                consumer.assign(assigned)
                await consumer.seek_to_beginning(*assigned)
                ends = await consumer.end_offsets(assigned)
                while not await self._at(ends):
                    self._take(await consumer.getmany(timeout_ms=_POLL_MS))
        except (KafkaError, TimeoutError) as error:
            await self.stop()
            raise ConfigurationError(
                f"Kafka at {self._bootstrap}: reading {self._changelog}: "
                f"{error or f'no answer within {timeout_s:.0f} s'}; is it running, and is BROKER_KAFKA_BOOTSTRAP right?"
            ) from error
        except BaseException:
            await self.stop()
            raise
        self._reading = asyncio.create_task(self._follow(), name="window-follower")

    async def stop(self) -> None:
        """Stop following; the entries stay."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._consumer is not None:
            await close_clients(self._consumer.stop())
            self._consumer = None
        if self._admin is not None:
            await close_clients(self._admin.close())
            self._admin = None

    async def ends(self) -> Mapping[int, int]:
        """Where the log ends in each partition. Raises StoreUnavailable."""
        consumer, _ = self._clients()
        try:
            async with asyncio.timeout(_ASK_WITHIN_S):
                found = await consumer.end_offsets(self._of(self._log_topic))
        except (KafkaError, TimeoutError) as error:
            raise StoreUnavailable(f"Kafka does not say where {self._log_topic} ends: {error!r}") from error
        return {tp.partition: end for tp, end in found.items()}

    async def reached(self, ends: Mapping[int, int]) -> bool:
        """Whether all records before ``ends`` are counted, and the windows that count them are here.

        Raises:
            StoreUnavailable: Kafka does not say.
        """
        consumer, admin = self._clients()
        try:
            async with asyncio.timeout(_ASK_WITHIN_S):
                counted = await admin.list_consumer_group_offsets(self._group)
                partitions = self._of(self._log_topic)
                first = await consumer.beginning_offsets(partitions)
                for tp in partitions:
                    committed = counted[tp].offset if tp in counted else -1
                    if max(committed, first[tp]) < ends.get(tp.partition, 0):
                        return False
                # An entry is acknowledged before its records are committed, so by now it lies before these ends.
                written = await consumer.end_offsets(self._of(self._changelog))
                while not await self._at(written):
                    self._took.clear()
                    await self._took.wait()
        except (KafkaError, TimeoutError) as error:
            raise StoreUnavailable(f"Kafka does not say how far {self._group} is: {error!r}") from error
        return True

    def _clients(self) -> tuple[AIOKafkaConsumer, AIOKafkaAdminClient]:
        if self._consumer is None or self._admin is None:
            raise StoreUnavailable("the windows are not being followed")
        return self._consumer, self._admin

    def _of(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, number) for number in self._entries]

    async def _at(self, ends: Mapping[TopicPartition, int]) -> bool:
        assert self._consumer is not None  # noqa: S101 - asked while it runs
        return all([await self._consumer.position(tp) >= end for tp, end in ends.items()])

    def _take(self, batches: Mapping[TopicPartition, list[Any]]) -> None:
        for tp, records in batches.items():
            entries = self._entries[tp.partition]
            for record in records:
                key = entry_key(tp.topic, tp.partition, record.offset, record.key, record.value, check_window)
                if key is None:
                    continue
                epoch = entry_epoch(record.headers)
                if epoch < self._epochs.get((tp.partition, key), 0):
                    # An earlier owner that was frozen wrote it, behind what its successor counted since.
                    continue
                if record.value is None:
                    entries.pop(key, None)
                    self._epochs.pop((tp.partition, key), None)
                else:
                    entries[key] = record.value
                    self._epochs[tp.partition, key] = epoch
        self._took.set()

    async def _follow(self) -> None:
        assert self._consumer is not None  # noqa: S101 - it is there while this runs
        while True:
            try:
                self._take(await self._consumer.getmany(timeout_ms=_POLL_MS))
            except KafkaError as error:
                log.warning("windows_read_failed", error=repr(error))
                await asyncio.sleep(_RETRY_S)
