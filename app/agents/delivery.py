"""Delivery: events of a Faust stream in, each handled once here and acknowledged only after it is done.

Faust by itself commits past unfinished events and skips events whose handler raises. So every agent reads its stream
through an ``Intake``: a bounded fan-out of our own tasks, and per partition an ordered account of what is finished,
which alone is committed (``faust_app.committable``). A rebalance starts a new generation: what the old one had
unfinished comes again, to us or to the new owner, and what is finished late for it means nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, cast

import faust
import structlog
from faust.types import TP, EventT
from mode.utils.queues import ThrowableQueue
from prometheus_client import Counter, Gauge

from app.adapters.faust_app import committable
from app.domain.acks import OrderedAcks
from app.domain.errors import NotOwner
from app.domain.requests import InboundRecord
from app.observability import labelled

log = structlog.get_logger()

_IN_FLIGHT = Gauge("broker_events_in_flight", "Events being handled", ["topic"])
_CONSUMED = Counter("broker_events_consumed", "Events taken from a stream", ["topic"])
_in_flight, _consumed = labelled(_IN_FLIGHT), labelled(_CONSUMED)


def inbound(event: EventT[Any]) -> InboundRecord:
    """The record that a Faust event carries, bytes as they came."""
    message = event.message
    headers = message.headers
    # Faust types header names as text or bytes; Kafka's are text. One without a value counts as empty.
    pairs = cast(Iterable[tuple[str, bytes | None]], headers.items() if isinstance(headers, dict) else headers or ())
    return InboundRecord(
        message.topic,
        message.partition,
        message.offset,
        int(message.timestamp * 1000),
        message.key,
        message.value,
        tuple((name, value or b"") for name, value in pairs),
    )


class Intake:
    """What one agent has taken from its stream and not yet finished.

    ``in_flight_max`` bounds the events handled at once; past it the stream waits and Faust pauses the partition.
    """

    def __init__(self, app: faust.App, *, in_flight_max: int) -> None:
        self._app = app
        self._slots = asyncio.Semaphore(in_flight_max)
        self._partitions: dict[TP, OrderedAcks[EventT[Any]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._between_assignments = False
        self._draining = False
        self._idle = asyncio.Event()
        self.finished: dict[TP, int] = {}
        """The offset up to which each assigned partition may be committed."""
        self._committable = committable(app)
        app.on_partitions_revoked.connect(self._on_revoked)
        app.on_partitions_assigned.connect(self._on_assigned)

    async def _on_revoked(self, *_: object, **__: object) -> None:
        # A stream may still hand over an event of before; it comes again after the assignment, so it is left alone.
        self._between_assignments = True
        self._partitions.clear()
        for tp in self.finished:
            self._committable.pop(tp, None)
        self.finished.clear()
        self._idle.set()

    async def _on_assigned(self, *_: object, **__: object) -> None:
        self._between_assignments = False

    async def each(
        self, stream: faust.Stream[bytes], handle: Callable[[InboundRecord], Coroutine[Any, Any, None]]
    ) -> None:
        """Handle every event in a task of its own, as many at once as there are slots."""
        async for event in stream.noack().events():
            await self._begin(event, handle)
            # Faust gives each event a turn of the event loop. What else has arrived is taken in this one: that costs
            # less, and what is begun together shares its reads and calls.
            queue: ThrowableQueue[EventT[Any]] = cast(faust.Channel[Any], stream.channel).queue
            while not queue.empty() and self._app.flow_control.is_active():
                await self._begin(queue.get_nowait(), handle)

    async def _begin(self, event: EventT[Any], handle: Callable[[InboundRecord], Coroutine[Any, Any, None]]) -> None:
        """Handle an event as soon as there is a slot; leave it alone where it is not ours to handle."""
        await self._slots.acquire()
        if not self._admit(event):
            self._slots.release()
            return
        task = asyncio.create_task(self._handle(event, handle(inbound(event))))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, event: EventT[Any], work: Awaitable[None]) -> None:
        gauge = _in_flight(event.message.topic)
        gauge.inc()
        try:
            await work
        except NotOwner:
            # The new owner gets this event; acknowledging it here would hide it from nobody but us.
            return
        except Exception as error:  # noqa: BLE001 - the crash carries it
            await self._crash(event, error)
            return
        except asyncio.CancelledError:
            if was_cancelled():
                raise
            await self._crash(event, _gave_up())
            return
        finally:
            gauge.dec()
            self._slots.release()
        self._finish(event)

    async def batches(
        self,
        stream: faust.Stream[bytes],
        handle: Callable[[int, Sequence[InboundRecord]], Awaitable[None]],
        *,
        records_max: int,
        bytes_max: int,
        wait_ms: int,
    ) -> None:
        """Handle events in batches, one partition's at a time and in order.

        A batch closes at ``records_max`` records, ``bytes_max`` bytes of values, or ``wait_ms`` after its first record.
        """
        queues: dict[TP, asyncio.Queue[EventT[Any]]] = {}
        async for event in stream.noack().events():
            await self._slots.acquire()
            if not self._admit(event):
                self._slots.release()
                continue
            tp = event.message.tp
            if tp not in queues:
                queues[tp] = asyncio.Queue()
                task = asyncio.create_task(
                    self._batch_partition(queues[tp], handle, records_max, bytes_max, wait_ms / 1000)
                )
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            queues[tp].put_nowait(event)

    async def _batch_partition(
        self,
        queue: asyncio.Queue[EventT[Any]],
        handle: Callable[[int, Sequence[InboundRecord]], Awaitable[None]],
        records_max: int,
        bytes_max: int,
        wait_s: float,
    ) -> None:
        while True:
            batch = await _gather(queue, records_max, bytes_max, wait_s)
            current = [event for event in batch if self._is_current(event)]
            try:
                if current:
                    await handle(current[0].message.partition, [inbound(event) for event in current])
                    for event in current:
                        self._finish(event)
            except NotOwner:
                pass
            except Exception as error:  # noqa: BLE001 - the crash carries it
                await self._crash(current[0], error)
                return
            except asyncio.CancelledError:
                if was_cancelled():
                    raise
                await self._crash(current[0], _gave_up())
                return
            finally:
                for _ in batch:
                    self._slots.release()

    def _is_current(self, event: EventT[Any]) -> bool:
        """Whether no rebalance has come since the event was fetched."""
        generation: object = getattr(event.message, "generation_id", None)
        return generation is None or generation == self._app.consumer_generation_id

    def _admit(self, event: EventT[Any]) -> bool:
        if self._draining or self._between_assignments or not self._is_current(event):
            return False
        _consumed(event.message.topic).inc()
        tp = event.message.tp
        acks = self._partitions.get(tp)
        if acks is None:
            acks = self._partitions[tp] = OrderedAcks()
        return acks.start(event.message.offset, event)

    def _finish(self, event: EventT[Any]) -> None:
        acks = self._partitions.get(event.message.tp)
        if acks is None or not self._is_current(event):
            return
        for done in acks.finish(event.message.offset):
            tp, end = done.message.tp, done.message.offset + 1
            self.finished[tp] = self._committable[tp] = max(end, self.finished.get(tp, end))
        if not any(self._partitions.values()):
            self._idle.set()

    async def _crash(self, event: EventT[Any], error: Exception) -> None:
        # Going on would either skip the event or spin on it; a restart sees it again from a clean state.
        log.error("handler_failed", position=str(event.message.tp), offset=event.message.offset, exc_info=error)
        await self._app.crash(error)

    async def drain(self, timeout_s: float) -> bool:
        """Take no more events and wait for those in flight; whether all of them finished in time."""
        self._draining = True
        if not any(self._partitions.values()):
            return True
        self._idle.clear()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    @property
    def in_flight(self) -> int:
        """How many events are started and not yet acknowledged."""
        return sum(len(acks) for acks in self._partitions.values())

    async def close(self) -> None:
        """Cancel what still runs."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def was_cancelled() -> bool:
    """Whether a CancelledError was meant for this task; otherwise it comes from something that it waited for.

    One that nobody meant would end the task without a word, as a cancelled task is nobody's error.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _gave_up() -> RuntimeError:
    return RuntimeError("what it waited for was cancelled, and this was not: it is handled anew after a restart")


async def _gather(
    queue: asyncio.Queue[EventT[Any]], records_max: int, bytes_max: int, wait_s: float
) -> list[EventT[Any]]:
    first = await queue.get()
    batch, size = [first], len(first.message.value or b"")
    try:
        async with asyncio.timeout(wait_s):
            while len(batch) < records_max and size < bytes_max:
                event = await queue.get()
                batch.append(event)
                size += len(event.message.value or b"")
    except TimeoutError:
        pass
    return batch
