"""A worker process: a Faust app, run until it is told to stop, watched from outside.

Start: connect, recover, serve. SIGTERM or SIGINT: take no more events, finish those in flight, commit, leave. A crash
of any part ends the process with a non-zero code: one that is started again beats one that half works.
"""

import asyncio
import contextlib
import fcntl
import gc
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import faust
import structlog
import uvloop
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from faust.types import TP
from prometheus_client import Gauge

from app.adapters.kafka_clients import close_clients
from app.adapters.membership import membership
from app.agents.delivery import Intake
from app.agents.health import HealthServer
from app.domain.errors import BrokerError, ConfigurationError, StoreUnavailable
from app.settings import Settings

log = structlog.get_logger()

_LAG = Gauge("broker_commit_lag", "Finished records whose offset is not committed yet, by the group's own account")
_LOOP_LAG = Gauge("broker_event_loop_lag_seconds", "How late the event loop ran its last tick")
_WATCH_EVERY_S: Final = 2.0
_ASK_WITHIN_S: Final = 5.0
_STALL_S: Final = 1.0
_LAG_MAX_S: Final = 30.0
"""Commits come every ``commit_interval``; one that is this late will not come (faust-streaming issues 175, 596)."""
_JOIN_WITHIN_S: Final = 180.0
"""A join waits for the session timeout of who was here before, 90 s at most, and for a rebalance, at most as long."""
_STOP_TIMEOUT_S: Final = 15.0
_COMMIT_WITHIN_S: Final = 5.0
"""Where Kafka is away: what is finished and not committed is read again, and answered as before."""
_GC_THRESHOLDS: Final = (20_000, 50, 50)


@dataclass(slots=True)
class Liveness:
    """Whether this process is of its group, and its finished offsets reach Kafka: since when not though they should."""

    behind_since: dict[TP, tuple[int, float]] = field(default_factory=dict)
    outside_since: float | None = None

    def observe_group(self, *, joined: bool, kafka_answers: bool, now_s: float) -> None:
        """Note whether it ever joined, at steady time ``now_s``. While Kafka does not answer nobody can, nor commit."""
        if not kafka_answers:
            self.behind_since.clear()
        if joined or not kafka_answers:
            self.outside_since = None
        elif self.outside_since is None:
            self.outside_since = now_s

    def observe(self, finished: Mapping[TP, int], committed: Mapping[TP, int], now_s: float) -> None:
        """Hold what is finished against what the group has committed, at steady time ``now_s``."""
        for tp in set(self.behind_since) - set(finished):
            del self.behind_since[tp]
        for tp, offset in finished.items():
            at = committed.get(tp, -1)
            if at >= offset:
                self.behind_since.pop(tp, None)
            elif self.behind_since.get(tp, (None, 0.0))[0] != at:
                self.behind_since[tp] = (at, now_s)

    def fault(self, now_s: float) -> str | None:
        """What is wrong, or None."""
        for tp, (at, since) in self.behind_since.items():
            if now_s - since > _LAG_MAX_S:
                return f"{tp.topic}/{tp.partition}: the commit stands at {at} for {now_s - since:.0f} s; restart"
        if self.outside_since is not None and now_s - self.outside_since > _JOIN_WITHIN_S:
            return f"Kafka answers, and this process has not joined its group for {now_s - self.outside_since:.0f} s"
        return None


class Worker:
    """Runs ``app`` as one process.

    ``intakes`` are drained in their order, so what finishes another's work comes after it.
    ``ready_checks`` are named coroutines that raise BrokerError while what they name is not usable. ``begins_after``
    returns once there is what no record can be handled without: until then the group is not joined, so that partitions
    stay with those who have it.
    """

    def __init__(
        self,
        app: faust.App,
        *,
        settings: Settings,
        role: str,
        instance: str,
        http_port: int,
        intakes: Sequence[Intake],
        ready_checks: Mapping[str, Callable[[], Awaitable[None]]],
        background: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
        begins_after: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._app = app
        self._settings = settings
        self._role = role
        self._instance = instance
        self._intakes = intakes
        self._background = background
        self._begins_after = begins_after
        self._begun = False
        self._assigned = False
        self._stop = asyncio.Event()
        self._liveness = Liveness()
        self._health = HealthServer(
            port=http_port,
            live=self._live,
            ready_checks={"running": self._check_running, "assigned": self._check_assigned, **ready_checks},
        )
        app.on_partitions_revoked.connect(self._on_revoked)
        app.on_rebalance_complete.connect(self._on_settled)

    async def _on_revoked(self, *_: object, **__: object) -> None:
        self._assigned = False

    async def _on_settled(self, *_: object, **__: object) -> None:
        self._assigned = True

    async def _check_running(self) -> None:
        if self._stop.is_set():
            raise StoreUnavailable("this process was told to stop: it ends what it has begun")

    async def _check_assigned(self) -> None:
        if not self._assigned:
            raise StoreUnavailable("no settled assignment: joining the group or recovering")

    def _live(self) -> str | None:
        return self._liveness.fault(asyncio.get_running_loop().time())

    async def run(self) -> int:
        """Run until stopped; the process's exit code."""
        loop = asyncio.get_running_loop()
        if not isinstance(loop, uvloop.Loop):
            raise RuntimeError("workers run on uvloop; start them by run_worker")
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._stop.set)
        with _sole_instance(self._settings.data_dir / self._instance, self._instance):
            return await self._run()

    async def _run(self) -> int:
        await self._health.start()
        _settle_memory()
        log.info("starting", role=self._role, instance=self._instance, http_port=self._health.port)
        background = [asyncio.create_task(self._guard(run)) for run in (self._watch, *self._background)]
        start = asyncio.create_task(self._guard(self._begin))
        stop = asyncio.create_task(self._stop.wait())
        crash = asyncio.create_task(self._app.wait_until_stopped())
        try:
            await asyncio.wait({stop, crash}, return_when=asyncio.FIRST_COMPLETED)
            failed = self._app.crashed
            if not failed and self._begun:
                await self._drain()
        finally:
            for task in (*background, start, stop, crash):
                task.cancel()
            if self._begun:
                await _within(_STOP_TIMEOUT_S, self._app.stop())
            for intake in self._intakes:
                await intake.close()
            await self._health.stop()
        if isinstance(self._app.crash_reason, ConfigurationError):
            # A restart would not mend it: the line that says what would, and the exit code of a start that fails.
            raise self._app.crash_reason
        if failed:
            log.error("crashed", role=self._role, instance=self._instance, reason=repr(self._app.crash_reason))
            return 1
        log.info("stopped", role=self._role, instance=self._instance)
        return 0

    async def _begin(self) -> None:
        if self._begins_after is not None:
            await self._begins_after()
        self._begun = True
        await self._app.start()

    async def _guard(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await run()
        except Exception as error:  # a process without its timers or its watch only looks alive
            log.exception("background_failed")
            await self._app.crash(error)

    async def _drain(self) -> None:
        log.info("draining", in_flight=sum(intake.in_flight for intake in self._intakes))
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._settings.drain_timeout / 1000
        # One after the other: a duplicate among the requests may wait for what only the results bring.
        drained = [await intake.drain(max(0.0, end_s - loop.time())) for intake in self._intakes]
        if not all(drained):
            log.warning("drain_incomplete", in_flight=sum(intake.in_flight for intake in self._intakes))
        await _within(_COMMIT_WITHIN_S, self._app.consumer.commit())

    async def _watch(self) -> None:
        """Hold the loop's ticks against the clock, and our finished offsets against the group's commits."""
        loop = asyncio.get_running_loop()
        admin = AIOKafkaAdminClient(
            bootstrap_servers=self._settings.kafka_bootstrap, client_id=f"{self._instance}-watch"
        )
        started = False
        try:
            while True:
                before = loop.time()
                await asyncio.sleep(_WATCH_EVERY_S)
                late_s = max(0.0, loop.time() - before - _WATCH_EVERY_S)
                _LOOP_LAG.set(late_s)
                if late_s > _STALL_S:
                    log.warning("event_loop_stalled", seconds=round(late_s, 1), hint="one step kept all others waiting")
                if not self._begun:
                    continue
                joined = bool(membership(self._app).member_id)
                finished = {tp: offset for intake in self._intakes for tp, offset in intake.finished.items()}
                try:
                    async with asyncio.timeout(_ASK_WITHIN_S):
                        if not started:
                            await admin.start()
                            started = True
                        offsets = await admin.list_consumer_group_offsets(self._app.conf.id)
                except (KafkaError, OSError, TimeoutError):
                    # Kafka's own outage is not this worker's fault: a restart would not mend it.
                    self._liveness.observe_group(joined=joined, kafka_answers=False, now_s=loop.time())
                    continue
                self._liveness.observe_group(joined=joined, kafka_answers=True, now_s=loop.time())
                committed = {TP(tp.topic, tp.partition): meta.offset for tp, meta in offsets.items()}
                _LAG.set(sum(max(0, offset - committed.get(tp, 0)) for tp, offset in finished.items()))
                self._liveness.observe(finished, committed, loop.time())
        finally:
            await close_clients(admin.close())


async def _within(timeout_s: float, step: Coroutine[Any, Any, Any]) -> None:
    """Wait for a step of Faust's for so long, whatever it does with a cancellation.

    A commit takes one for the end of the commit that it waits for, and begins anew: where Kafka is away,
    ``asyncio.wait_for`` would wait for that without end.
    """
    task = asyncio.ensure_future(step)
    done, _ = await asyncio.wait({task}, timeout=timeout_s)
    if not done:
        task.cancel()
        log.warning("stop_step_abandoned", step=getattr(step, "__qualname__", repr(step)), after_s=timeout_s)
    elif not task.cancelled() and (error := task.exception()) is not None:
        log.warning("stop_step_failed", reason=repr(error))


@contextlib.contextmanager
def _sole_instance(directory: Path, instance: str) -> Iterator[None]:
    """Hold an instance's name on this host; ConfigurationError where another process does.

    Two processes of one name would expel each other from their group, and decide the same requests in between. The
    lock goes with the process, however that ends.
    """
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(
                f"instance {instance} runs already (it holds {lock.name}): end it, or choose another --instance"
            ) from error
        yield


def _settle_memory() -> None:
    """Take what the imports and the wiring made out of the collector's sight, and let it look less often.

    A full collection walks every object that lives; over a worker's modules and its joins table that costs tens of
    milliseconds, at moments that callers notice.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def run_worker(main: Callable[[], Awaitable[int]]) -> int:
    """Run ``main`` on uvloop; a BrokerError that stops the start becomes one clear line and exit code 2."""

    async def guarded() -> int:
        return await main()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(guarded())
    except BrokerError as error:
        log.error("cannot_start", reason=str(error))  # noqa: TRY400 - one clear line, not a trace
        return 2
