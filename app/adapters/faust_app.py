"""The Faust application of a worker, with every setting that loses data or time by default set on purpose."""

import asyncio
from collections.abc import Container, Coroutine, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

import faust
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    InconsistentGroupProtocolError,
    InvalidGroupIdError,
    InvalidSessionTimeoutError,
)
from faust import Topic
from faust.sensors import Monitor
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport
from faust.types import TP, AppT
from faust.types.settings import Settings as FaustSettings
from mode.services import WaitArgT, WaitResults

from app.adapters.kafka_clients import close_clients
from app.adapters.membership import membership
from app.domain.errors import ConfigurationError
from app.settings import Settings

_FETCH_WAIT_MS: Final = 50
"""How long a fetch waits at the broker for new records.

aiokafka has one fetch under way a broker, for those partitions whose records it has handed over; the others wait
until it returns. Faust sets 1,500 ms, which is what a busy worker's requests then waited.
"""

_COMMIT_WITHIN_S: Final = 3.0
_HEARTBEAT_S: Final = 0.5

_COMMITTABLE: Final["WeakKeyDictionary[AppT, dict[TP, int]]"] = WeakKeyDictionary()


def committable(app: AppT) -> MutableMapping[TP, int]:
    """The offsets up to which the app's consumer commits each partition; whoever handles events keeps them."""
    return _COMMITTABLE.setdefault(app, {})


class _Active:
    """Which partitions may be fetched, as they are when it is asked.

    aiokafka takes an empty set for all partitions, and Faust's becomes empty while a fetch waits: records of paused
    partitions would be handed over, passed by, and counted as consumed. This is never taken for empty.
    """

    def __init__(self, partitions: Container[TP] | None) -> None:
        self._partitions = partitions

    def __contains__(self, tp: TP) -> bool:
        return self._partitions is None or tp in self._partitions


class _Settings(FaustSettings):
    """Faust's settings as they are set here.

    Faust would also take them from the environment, over what the code says, under names that others use too
    (``APP_VERSION``), and two of which are settings of ours in other units.
    """

    def getenv(self, env_name: str) -> Any:
        return None

    def _init_env_prefix(self, *args: Any, **kwargs: Any) -> None:
        super()._init_env_prefix(env={})


class _App(faust.App):
    Settings = _Settings


def join_failure(error: BaseException, app: AppT) -> BaseException:
    """What ended the consumer's part in its group: what an operator can mend, as ConfigurationError."""
    cause = error.__cause__ or error
    group = app.conf.id
    if isinstance(cause, InvalidSessionTimeoutError):
        return ConfigurationError(
            f"Kafka refuses a session timeout of {app.conf.broker_session_timeout:g} s for group {group}: set "
            "BROKER_SESSION_TIMEOUT between the brokers' group.min.session.timeout.ms and group.max.session.timeout.ms"
        )
    if isinstance(cause, InconsistentGroupProtocolError):
        return ConfigurationError(
            f"group {group} is used by consumers of another kind: end them, or set BROKER_TOPIC_PREFIX for this broker"
        )
    if isinstance(cause, InvalidGroupIdError | GroupAuthorizationFailedError):
        return ConfigurationError(f"Kafka does not let this process join group {group}: {cause!r}")
    return error


class _ConsumerThread(AIOKafkaConsumerThread):
    async def on_start(self) -> None:
        await super().on_start()
        self._watch_membership()

    async def on_thread_stop(self) -> None:
        await super(AIOKafkaConsumerThread, self).on_thread_stop()
        if self._consumer is not None:
            membership(self.consumer.app).leave()
            # A static member that stops says nothing, and its partitions are nobody's for the session timeout. What
            # ends in good order leaves, as a member without a name does (KIP-345): others go on at once.
            coordinator: Any = self._consumer._coordinator
            coordinator._group_instance_id = None
            # Faust's own way ends the thread, and its app's stop, where a broker is away.
            await close_clients(self._consumer.stop())

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        """As Faust's, within a bound: aiokafka tries for as long as its coordinator is away, and all that commits
        waits for it, a worker that is to stop among them. What is not committed is tried again."""
        try:
            async with asyncio.timeout(_COMMIT_WITHIN_S):
                return await super()._commit(offsets)
        except TimeoutError:
            return False

    def _watch_membership(self) -> None:
        """Have the group's answers renew the lease; no hook of aiokafka's tells of them."""
        app = self.consumer.app
        mine = membership(app)
        coordinator: Any = self._ensure_consumer()._coordinator
        beat, joined = coordinator._do_heartbeat, coordinator._on_join_complete

        async def heartbeat() -> bool:
            sent_s = mine.now()
            answered = bool(await beat())
            if answered:
                mine.confirm(sent_s)
            else:
                mine.refuse()
            return answered

        async def join_complete(generation: int, member_id: str, *rest: Any) -> None:
            if not mine.join(member_id, generation):
                said = (
                    f"expelled from group {app.conf.id} again and again: another process runs as instance "
                    f"{app.conf.broker_client_id}; give each an --instance of its own"
                )
                asyncio.run_coroutine_threadsafe(app.crash(ConfigurationError(said)), app.loop)
            await joined(generation, member_id, *rest)

        coordinator._do_heartbeat, coordinator._on_join_complete = heartbeat, join_complete
        push = coordinator._push_error_to_user

        async def push_error(error: BaseException) -> Any:
            self._on_coordination_failed(error)
            return await push(error)

        coordinator._push_error_to_user = push_error
        coordinator._coordination_task.add_done_callback(self._on_coordination_ended)

    def _on_coordination_ended(self, task: "asyncio.Future[Any]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_coordination_failed(error)

    def _on_coordination_failed(self, error: BaseException) -> None:
        """After an error that it takes for fatal aiokafka joins no more until somebody reads records.

        Faust reads none without partitions, so the worker would idle.
        """
        if not getattr(error, "retriable", False):
            app = self.consumer.app
            asyncio.run_coroutine_threadsafe(app.crash(join_failure(error, app)), app.loop)

    async def _fetch_records(
        self,
        consumer: Any,
        active_partitions: Any,
        timeout: float | None = None,  # noqa: ASYNC109 - Faust's signature
        max_records: int | None = None,
    ) -> Any:
        asked = cast("set[TP]", _Active(active_partitions))  # all that aiokafka does with it is to look into it
        return await super()._fetch_records(consumer, asked, timeout, max_records)

    def _create_worker_consumer(self, transport: Transport) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = _FETCH_WAIT_MS
        return consumer


class _Consumer(Consumer):
    """Commits what ``committable`` says, and nothing else; fetches nothing for streams before they may have it.

    Faust's own account cannot be kept: it acknowledges events that its streams skip, as they do with all that is
    buffered when the app stops or rebalances, and would commit past them; and it forgets a commit that failed.

    Faust also lets partitions be fetched before it seeks them to what is committed. What comes by that is skipped by
    streams that are not to run yet, and dropped as read already when it comes again.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._confirmed: dict[TP, int] = {}
        self._waiting: set[TP] = set()
        self._sought = False

    def ack(self, message: Any) -> bool:
        self._unacked_messages.discard(message)
        return False

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        return iter(tuple(committable(self.app)))

    def _new_offset(self, tp: TP) -> int | None:
        return committable(self.app).get(tp)

    def _should_commit(self, tp: TP, offset: int) -> bool:
        return self._confirmed.get(tp) != offset

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        done = await super()._commit(offsets)
        if done:
            self._confirmed.update(offsets)
        return done

    def pause_partitions(self, tps: Iterable[TP]) -> None:
        paused = set(tps)
        if self._streams(paused):
            # A rebalance begins: what an interrupted one was about to resume is not to be.
            self._sought = False
            self._waiting -= paused
        super().pause_partitions(paused)

    def resume_partitions(self, tps: Iterable[TP]) -> None:
        streams = self._streams(tps)
        self._waiting |= streams
        super().resume_partitions(set(tps) - streams)

    async def wait_first(self, *coros: WaitArgT, timeout: Any = None) -> WaitResults:  # noqa: ASYNC109
        """As Faust's, which hands each record to its channel by this, and makes four tasks for it.

        They let a rebalance interrupt one that has to wait: for the flow, or for room in a queue. Where there is
        nothing to wait for, the record is handed over here and now.
        """
        if len(coros) == 2 and timeout is None and self._flows():
            handing, suspended = coros
            if isinstance(handing, Coroutine) and isinstance(suspended, Coroutine):
                suspended.close()
                await handing
                return WaitResults([], [], stopped=False)
        return await super().wait_first(*coros, timeout=timeout)

    def _flows(self) -> bool:
        """Whether a record can be put into any channel's queue at once."""
        return self.app.flow_control.is_active() and not any(
            cast(Topic, channel).queue.full() for channel in self.app.topics
        )

    def _streams(self, tps: Iterable[TP]) -> set[TP]:
        changelogs = self.app.tables.changelog_topics
        return {tp for tp in tps if tp.topic not in changelogs}

    async def perform_seek(self) -> None:
        await super().perform_seek()
        self._sought = True

    def resume_flow(self) -> None:
        if self._sought and self._waiting:
            super().resume_partitions(self._waiting)
            self._waiting.clear()
        super().resume_flow()

    async def verify_all_partitions_active(self) -> None:
        """Nothing: Faust's watch over its streams only logs, at level error, and cannot see what it watches.

        It takes a partition that has records left for stuck where the monitor saw none go into its stream, which ours
        does not count, or where Faust committed none, which ours does by its own account; and it reckons from the
        process's start, so any quiet partition looks stuck five minutes later. ``/livez`` holds what is finished
        against what is committed, and ``broker_events_consumed_total`` and the group's lag tell of records that are
        not taken.
        """

    def verify_recovery_event_path(self, now: float, tp: TP) -> None:
        """Nothing, as above: a changelog's partition that comes late was not fetched since the process's start."""

    def on_buffer_drop(self, tp: TP) -> None:
        if self.app.rebalancing:
            # A stream that empties its buffer must not wake a partition that is paused.
            self._buffered_partitions.discard(tp)
        else:
            super().on_buffer_drop(tp)

    def _new_consumer_thread(self) -> AIOKafkaConsumerThread:
        return _ConsumerThread(self, loop=self.loop, beacon=self.beacon)


class _QuietMonitor(Monitor):
    """Keeps no account of single messages: that costs each of them, and the metrics here say what it would."""

    def on_message_in(self, tp: TP, offset: int, message: Any) -> None:
        """Nothing."""

    def on_stream_event_in(self, tp: TP, offset: int, stream: Any, event: Any) -> None:
        """Nothing."""

    def on_stream_event_out(self, tp: TP, offset: int, stream: Any, event: Any, state: Any = None) -> None:
        """Nothing."""

    def on_message_out(self, tp: TP, offset: int, message: Any) -> None:
        """Nothing."""

    def track_tp_end_offset(self, tp: TP, offset: int) -> None:
        """Nothing."""


class _Transport(Transport):
    Consumer = _Consumer


def create_app(settings: Settings, *, role: str, instance: str) -> faust.App:
    """An app of the consumer group ``<prefix><role>``; agents are attached to it before it starts."""
    session_s = settings.session_timeout / 1000
    rebalance_s = max(session_s, 10.0)
    datadir = settings.data_dir / instance
    try:
        datadir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{datadir} cannot be made ({error}): set BROKER_DATA_DIR to a place that can"
        ) from error
    app = _App(
        f"{settings.topic_prefix}{role}",
        broker=[f"kafka://{server.strip()}" for server in settings.kafka_bootstrap.split(",")],
        broker_client_id=instance,
        consumer_group_instance_id=instance,
        consumer_auto_offset_reset="earliest",
        broker_session_timeout=session_s,
        # By its answers members learn that others come and go.
        broker_heartbeat_interval=min(session_s / 3, _HEARTBEAT_S),
        broker_rebalance_timeout=rebalance_s,
        # A join waits for the others that long; what waits longer waits for a broker that is gone, and is silent until
        # then: for 90 s by Faust's default.
        broker_request_timeout=rebalance_s + 15.0,
        broker_commit_interval=settings.commit_interval / 1000,
        # A handler may take as long as its deadline; liveness watches progress, so this bound only has to exist.
        broker_max_poll_interval=600.0,
        broker_max_poll_records=500,
        stream_buffer_maxsize=1_024,
        stream_wait_empty=False,
        stream_publish_on_commit=False,
        stream_recovery_delay=0.0,
        table_standby_replicas=0,
        store="memory://",
        datadir=str(datadir),
        topic_allow_declare=False,
        topic_disable_leader=True,
        web_enabled=False,
        web_tables_enabled=False,
        key_serializer="raw",
        value_serializer="raw",
        Monitor=_QuietMonitor,
        loghandlers=[],
        logging_config=None,
    )
    app.transport = _Transport(app.conf.broker_consumer, app)
    return app
