"""The decider: one worker's live requests, from admission to the decision's last write.

A request whose tasks are all answered inline stays unacknowledged until it is decided; a crash redelivers it. One with
queued tasks becomes a durable pending join, its tasks go out, it is acknowledged, and whichever worker owns the
partition when a result or the deadline comes finishes it. Everything a request needs while it is live hangs on one
``Live`` value; its tasks are run by ``tasks``, and the ``Join`` in it decides exactly once.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final
from uuid import UUID, uuid5

import structlog
from prometheus_client import Counter, Gauge, Histogram

from app.adapters.record_codec import EntryHeader, EntryState
from app.adapters.task_codec import QueuedResult
from app.agents.admission import Admission, Arrival
from app.agents.delivery import was_cancelled
from app.agents.ledger import Ledger, Recipient
from app.agents.live import Live
from app.agents.shadows import Shadows
from app.agents.tasks import Tasks, tasks_barred
from app.agents.timers import Timers
from app.agents.turns import Turns
from app.domain.decisions import (
    DecisionRecord,
    Kind,
    TaskRecord,
    deadline_of,
    decide,
    is_referral,
    is_referred,
    refuse,
)
from app.domain.dispatch import TaskStatus
from app.domain.errors import BrokerError, Code, NotOwner, Problem, RecordTooLarge, RequestRefused, StoreUnavailable
from app.domain.features import recorded
from app.domain.join import Join, Status
from app.domain.registry import Revision
from app.domain.requests import InboundRecord, Request, read_address
from app.domain.routing import Plan, Refused, TaskPlan, find_route, plan_of, route
from app.observability import LATENCY_BUCKETS_S, labelled
from app.ports.clock import Clock
from app.ports.registry import Registry
from app.settings import Settings

log = structlog.get_logger()

_DECISIONS = Counter("broker_decisions", "Decisions by status and route", ["status", "route"])
_LATENCY = Histogram(
    "broker_decision_seconds", "From a request's arrival to its reply", ["route"], buckets=LATENCY_BUCKETS_S
)
_DUPLICATES = Counter("broker_duplicates", "Requests whose id was known: repeated, in_flight, conflict", ["kind"])
_TASKS = Counter("broker_tasks", "Tasks by model, version and status", ["model", "version", "status"])
_REFERRALS = Counter(
    "broker_referrals", "Tasks whose features' contracts left the decision to a person", ["route", "task"]
)
_RESULTS = Counter("broker_results", "Queued results by fate: joined, late, repeated, unknown", ["fate"])
_decisions, _latency, _tasks = labelled(_DECISIONS), labelled(_LATENCY), labelled(_TASKS)
_LIVE = Gauge("broker_requests_live", "Requests being decided or waiting for queued tasks")
_REFUSALS: Final = UUID("3c1f4f9e-7f0b-5d0e-9a55-6f0a0f6a7c11")
_RETRY_S: Final = 0.2
_AGAIN_MS: Final = 1_000
_GIVEN_UP: Final = "the partition went to another worker"
_TOPIC_SHOWN_MAX: Final = 249
FORGETTING_MAX: Final = 64
"""Tombstones of decisions whose window is over that are written at once."""
CATCH_UP_MS: Final = 2_000
"""For so long a worker that takes a partition over reads what pools answered meanwhile, before one counts as silent."""


class Decider:
    """Decides what the requests agent hands it. ``new_id`` makes execution ids."""

    def __init__(
        self,
        *,
        admission: Admission,
        ledger: Ledger,
        registry: Registry,
        tasks: Tasks,
        shadows: Shadows,
        timers: Timers,
        clock: Clock,
        new_id: Callable[[], str],
        settings: Settings,
        instance: str,
        on_crash: Callable[[BaseException], Coroutine[Any, Any, None]],
    ) -> None:
        self._admission = admission
        self._ledger = ledger
        self._registry = registry
        self._tasks = tasks
        tasks.pend_by(self._pend)
        self._shadows = shadows
        self._clock = clock
        self._new_id = new_id
        self._settings = settings
        self._instance = instance
        self._on_crash = on_crash
        self._live: dict[str, Live] = {}
        self._turns = Turns()
        self._pending = 0
        self._room = asyncio.Event()
        self._owned: frozenset[int] = frozenset()
        self._gained_ms: dict[int, int] = {}
        self._ended: deque[tuple[int, str]] = deque()
        """Entries whose window may be over, with their partitions."""
        self._forgetting = 0
        self._background: set[asyncio.Task[None]] = set()
        self._timers = timers
        _LIVE.set_function(lambda: len(self._live))

    # --- what the agents call -----------------------------------------------------------------------------------------

    async def on_request(self, record: InboundRecord) -> None:
        """Decide on one record of the request topic; returns when it may be acknowledged.

        Raises:
            NotOwner: the partition went away; the record is another worker's.
        """
        with self._turns.turn() as turn:
            arrival = await self._admit(record, lambda request_id: turn.take((record.partition, request_id)))
            # An id stands for what came first under it, whichever reply topic is found first.
            await turn.come()
        if arrival.mendable and arrival.problem is not None:
            await self._turn_away(arrival, arrival.problem)
            return
        if arrival.dead and arrival.problem is not None:
            await self._ledger.bury(record, arrival.problem.message, arrival.problem.code)
        while True:
            try:
                await self._on_arrival(arrival)
            except _BegunAnew:
                # What it waited for was given up; if the partition is still ours, nobody else will take this record.
                await self._ledger.owned(record.partition)
            else:
                return

    async def _on_arrival(self, arrival: Arrival) -> None:
        record = arrival.record
        known = self._live.get(arrival.request_id)
        if known is not None:
            await self._on_known(arrival, known)
            return
        await self._ledger.owned(record.partition)
        header = self._ledger.find(record.partition, arrival.request_id)
        known = self._live.get(arrival.request_id)
        if known is not None:
            await self._on_known(arrival, known)
        elif header is None:
            await self._on_new(arrival)
        elif header.state is EntryState.PENDING:
            resumed = await self._resume(record.partition, arrival.request_id)
            await (self._on_known(arrival, resumed) if resumed else self._on_decided(arrival, header))
        else:
            await self._on_decided(arrival, header)

    async def on_result(self, partition: int, result: QueuedResult) -> None:
        """Join one queued result; returns when it may be acknowledged."""
        if self._shadows.take(result):
            return
        await self._ledger.owned(partition)
        live = self._live.get(result.request_id)
        if live is None:
            header = self._ledger.find(partition, result.request_id)
            if header is None or header.state is EntryState.COMPLETED:
                _RESULTS.labels("unknown" if header is None else "late").inc()
                return
            if header.state is EntryState.DECIDED:
                _RESULTS.labels("late").inc()
                await self._announce_decided(partition, result.request_id)
                return
            live = await self._resume(partition, result.request_id)
        if live is None or live.join is None or live.plan is None:
            _RESULTS.labels("late").inc()
            return
        task = live.tasks.get(result.task)
        if task is None or result.execution_id != live.record.execution_id:
            # An execution id of a decision that was begun before a crash, or of an id used again: others' versions.
            _RESULTS.labels("unknown").inc()
            return
        if self._clock.now_ms() >= live.record.deadline_ms:
            # Read late, as after a time without a worker: the deadline's timer must not have to win a race.
            self._tasks.expire(live)
        fate, begun = await self._tasks.on_answer(live, task, result)
        _RESULTS.labels(fate).inc()
        await self._go_on(live, begun)

    def on_ownership(self, owned: frozenset[int], gained: frozenset[int], entries: "Entries") -> None:
        """A rebalance has settled: forget what went away, set the timers of what came."""
        lost = self._owned - (owned - gained)
        self._owned = owned
        now_ms = self._clock.now_ms()
        self._gained_ms = {p: now_ms if p in gained else self._gained_ms.get(p, now_ms) for p in owned}
        self._timers.drop(lost)
        for request_id in [key for key, live in self._live.items() if live.partition in lost]:
            self._abandon(self._live[request_id])
        pending = 0
        for partition in gained:
            for request_id, header in entries(partition):
                if header.state is EntryState.PENDING:
                    pending += 1
                    self._timers.at(header.time_ms, partition, request_id)
                elif header.state is EntryState.DECIDED:
                    self._spawn(self._announce_decided(partition, request_id))
                else:
                    self._timers.at(header.time_ms + self._settings.dedupe_window, partition, request_id)
        log.info("partitions", owned=sorted(owned), gained=sorted(gained), lost=sorted(lost), pending_joins=pending)

    async def run_timers(self) -> None:
        """Look at joins when it is time to, until cancelled."""
        await self._timers.run(self._on_due)

    async def close(self) -> None:
        """End what runs in the background; what is unfinished is durable or unacknowledged."""
        for task in tuple(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._shadows.close()

    # --- admission ----------------------------------------------------------------------------------------------------

    async def _admit(self, record: InboundRecord, named: Callable[[str], None]) -> Arrival:
        """What the record asks for; whatever goes wrong with that, it is answered, and the bytes are kept."""
        give_up_ms = record.timestamp_ms + self._settings.default_deadline
        while True:
            try:
                return await self._admission.admit(record, named)
            except StoreUnavailable as error:
                if self._clock.now_ms() >= give_up_ms:
                    return self._admission.unreadable(record, f"it could not be read in time: {error}")
                log.warning("admission_retried", position=record.position, reason=str(error))
                await asyncio.sleep(_RETRY_S)
                await self._ledger.owned(record.partition)
            except Exception as error:
                log.exception("admission_failed", position=record.position)
                return self._admission.unreadable(record, f"{type(error).__name__} while reading it")

    async def _on_known(self, arrival: Arrival, live: Live) -> None:
        """Its id is being decided here: wait for that decision, which stands for this record too."""
        if arrival.body != live.record.body:
            await self._refuse_conflict(arrival)
            return
        same = _same(arrival.record, live.record.source)
        if same and live.durable:
            # A redelivery of an acknowledged join, or one whose tasks may not be out: see to it that they are.
            await self._go_on(live)
            return
        decided = await asyncio.shield(self._done(live))
        if not same:
            _DUPLICATES.labels("in_flight").inc()
            await self._ledger.reply(decided, self._recipient(arrival), fate="repeated")

    async def _on_decided(self, arrival: Arrival, header: EntryHeader) -> None:
        """Its id was decided: the same reply for the same question, a refusal for another."""
        if arrival.body != header.body:
            await self._refuse_conflict(arrival)
            return
        partition, request_id = arrival.record.partition, arrival.request_id
        decided = self._ledger.read(partition, request_id)
        if decided is None:
            raise NotOwner(f"the entry of {request_id} went away while it was read")
        recipient = self._recipient(arrival)
        same = _same(arrival.record, decided.source)
        if not same:
            _DUPLICATES.labels("repeated").inc()
            if header.state is EntryState.DECIDED:
                # Whoever asked first is owed a reply, and this one its record.
                await self._announce_decided(partition, request_id)
        if same or not self._announced_here(decided):
            await self._ledger.announce_again(partition, request_id, [recipient])
        else:
            await self._ledger.reply(decided, recipient, fate="repeated")
        log.info("repeated", request_id=request_id, status=str(decided.status), position=arrival.record.position)

    async def _refuse_conflict(self, arrival: Arrival) -> None:
        """The id stands for another question."""
        _DUPLICATES.labels("conflict").inc()
        said = f"request id {arrival.request_id} was used for another request: use a new id"
        await self._turn_away(arrival, Problem(Code.REQUEST_ID_CONFLICT, said))

    async def _turn_away(self, arrival: Arrival, problem: Problem) -> None:
        """Refuse without deciding: the id stays as it is. The refusal's record is the same at every delivery."""
        moment = arrival.record.timestamp_ms
        execution_id = str(uuid5(_REFUSALS, arrival.record.position))
        record = replace(self._new_record(arrival, moment), kind=Kind.REFUSAL, execution_id=execution_id, instance="")
        if arrival.request is not None:
            record = replace(record, path=arrival.request.path)
        record = refuse(record, Status.REJECTED, (problem,), moment)
        await self._ledger.refuse(record, self._recipient(arrival))
        told = {"code": str(problem.code), "message": problem.message, "position": arrival.record.position}
        if problem.code is Code.REPLY_TOPIC_NOT_ALLOWED and (named := read_address(arrival.record.headers)) is not None:
            told["reply_topic"] = named.topic[:_TOPIC_SHOWN_MAX]
        log.info("refused", request_id=arrival.request_id, **told)

    # --- a new request ------------------------------------------------------------------------------------------------

    async def _on_new(self, arrival: Arrival) -> None:
        now_ms = self._clock.now_ms()
        live = self._live[arrival.request_id] = Live(self._new_record(arrival, now_ms), arrival.request)
        try:
            await self._decide_or_fail(live, arrival)
        except BaseException:
            # Also when cancelled: whoever waits for its decision would wait for ever.
            self._abandon(live)
            raise

    async def _decide_or_fail(self, live: Live, arrival: Arrival) -> None:
        try:
            await self._decide_new(live, arrival)
        except BrokerError:
            raise
        except Exception as error:  # whatever it is, the caller gets an answer, and the bytes are kept
            if live.abandoned:
                raise
            log.exception("decision_failed", request_id=arrival.request_id)
            await self._ledger.bury(arrival.record, repr(error), type(error).__name__)
            problem = Problem(Code.INTERNAL, f"{type(error).__name__} while deciding; the request is kept aside")
            await self._finish(live, refuse(live.record, Status.FAILED, (problem,), self._clock.now_ms()))

    async def _decide_new(self, live: Live, arrival: Arrival) -> None:
        if arrival.request is None:
            assert arrival.problem is not None  # noqa: S101 - an arrival has a request or a problem
            ours = arrival.problem.code is Code.INTERNAL
            await self._end(live, Status.FAILED if ours else Status.REJECTED, (arrival.problem,))
            return
        if not await self._plan(live, arrival.request):
            return
        assert live.plan is not None  # noqa: S101 - _plan returned True
        assert live.join is not None  # noqa: S101 - _plan returned True
        if live.outcome is not None:
            # The deadline came before its features did.
            await self._conclude(live)
            return
        begun = await self._tasks.begin(live)
        if begun and all(task.queued for task in begun) and not await self._pend(live):
            # Durable before its tasks are out: whichever worker gets a result must find its join.
            return
        pended = (live.record, live.join) if live.durable else None
        in_time = await self._tasks.run(live, begun)
        if live.outcome is None:
            if not in_time:
                self._tasks.expire(live)
            elif pended != (live.record, live.join) and not await self._pend(live):
                return
        if live.outcome is not None:
            await self._conclude(live)

    async def _plan(self, live: Live, request: Request) -> bool:
        """Route, fetch features and set up the join; False where the request has ended by that."""
        revision = await self._revision(live, request)
        if revision is None:
            return False
        live.record = replace(live.record, path=request.path, revision=revision.id)
        found = find_route(revision, request.path)
        if isinstance(found, Refused):
            await self._end(live, Status.REJECTED, (found.problem,))
            return False
        matched, _ = found
        deadline_ms = deadline_of(request, matched.spec.deadline, live.record.source.timestamp_ms)
        live.record = replace(live.record, route=matched.name, deadline_ms=deadline_ms)
        # Before anything is evaluated: what was too much for a worker must not be too much for the next one as well.
        now_ms = self._clock.now_ms()
        if now_ms >= deadline_ms:
            problem = Problem(Code.DEADLINE_EXCEEDED, _late(deadline_ms, live.record.source.timestamp_ms, now_ms))
            await self._end(live, Status.EXPIRED, (problem,))
            return False
        plan = plan_of(revision, found, request, live.record.received_ms)
        if isinstance(plan, Refused):
            live.record = replace(live.record, rule=plan.rule)
            tasks_barred(matched.name, plan.problem)
            await self._end(live, Status.REJECTED, (plan.problem,))
            return False
        live.record = replace(live.record, rule=plan.rule.spec.name)
        live.plan = plan
        tasks_barred(matched.name, *(task.barred for task in plan.tasks))
        ended = await self._tasks.prepare(live)
        if ended is not None:
            await self._end(live, *ended)
        return ended is None

    async def _revision(self, live: Live, request: Request) -> Revision | None:
        """The revision to decide by; None where the request has ended by there being none.

        Where nothing was ever published there is no path. Where something was, and none of it is sound, it would be
        untrue to say so: the request waits for a revision within its deadline.
        """
        deadline_ms = deadline_of(request, self._settings.default_deadline, live.record.source.timestamp_ms)
        while (revision := self._registry.current) is None:
            if self._registry.blank:
                said = "no registry revision is published: run `model-broker apply`"
                await self._end(live, Status.REJECTED, (Problem(Code.PATH_UNKNOWN, said),))
                return None
            if self._clock.now_ms() >= deadline_ms:
                live.record = replace(live.record, path=request.path, deadline_ms=deadline_ms)
                said = "no registry revision that was published is sound: run `model-broker apply`"
                await self._end(live, Status.EXPIRED, (Problem(Code.DEADLINE_EXCEEDED, said),))
                return None
            await asyncio.sleep(_RETRY_S)
            await self._ledger.owned(live.partition)
            live.check()
        return revision

    # --- the join -----------------------------------------------------------------------------------------------------

    async def _pend(self, live: Live) -> bool:
        """Make the join durable as it stands, and set its timer once; False where the request has ended."""
        assert live.join is not None  # noqa: S101 - only joins wait
        live.check()
        if not live.counted:
            await self._await_room(live)
            live.check()
            if live.outcome is not None and not live.concluding:
                await self._conclude(live)
                return False
            if live.concluding:
                # Its results were faster than the room.
                await asyncio.shield(self._done(live))
                return False
            live.counted = True
            self._pending += 1
        try:
            async with live.writing:
                if not live.concluding:
                    tasks, look_ms = self._tasks.waiting(live)
                    live.record = replace(live.record, tasks=tasks)
                    await self._ledger.pend(live.record, look_ms, live.check)
                    live.named = frozenset((task.name, task.version) for task in tasks)
                    self._set_timer(live)
                    return True
        except RecordTooLarge as error:
            problem = Problem(Code.RECORD_TOO_LARGE, str(error))
            await self._end(live, Status.FAILED, (problem,))
            return False
        await asyncio.shield(self._done(live))
        return False

    async def _await_room(self, live: Live) -> None:
        """Wait until another join may wait; at its deadline the request ends instead."""
        while self._pending >= self._settings.joins_pending_max:
            self._room.clear()
            wait_s = (live.record.deadline_ms - self._clock.now_ms()) / 1000
            try:
                # Not wait_for, which may lose a cancellation that comes together with the event (CPython issue 86296).
                async with asyncio.timeout(wait_s):
                    await self._room.wait()
            except TimeoutError:
                self._tasks.expire(live)
                return
            live.check()

    def _set_timer(self, live: Live) -> None:
        # Only now: a timer that finds no entry has nothing to end.
        if not live.durable:
            live.durable = True
            self._timers.at(live.record.deadline_ms, live.partition, live.record.request_id)

    def _on_due(self, partition: int, request_id: str) -> None:
        if partition not in self._owned:
            return
        header = self._ledger.find(partition, request_id)
        if header is not None and header.state is EntryState.COMPLETED:
            # After a time without workers all of a window's entries are due at once, and nobody waits for their end.
            self._ended.append((partition, request_id))
            if self._forgetting < FORGETTING_MAX:
                self._forgetting += 1
                self._spawn(self._forget_ended())
        else:
            self._spawn(self._due_or_again(partition, request_id))

    async def _forget_ended(self) -> None:
        try:
            while self._ended:
                partition, request_id = self._ended.popleft()
                if partition in self._owned:
                    await self._due_or_again(partition, request_id)
        finally:
            self._forgetting -= 1

    async def _due_or_again(self, partition: int, request_id: str) -> None:
        try:
            await self._due(partition, request_id)
        except NotOwner:
            # Should the partition stay ours after all, nothing else would set this timer again.
            self._timers.at(self._clock.now_ms() + _AGAIN_MS, partition, request_id)

    async def _due(self, partition: int, request_id: str) -> None:
        """A timer fired: a join's deadline, a pool's silence, or the end of a decision's window."""
        live, header = self._live.get(request_id), self._ledger.find(partition, request_id)
        if live is not None and live.partition != partition:
            # The same id under another key, which is another partition's: it says nothing of this entry.
            if header is not None and header.state is EntryState.PENDING:
                self._timers.at(self._clock.now_ms() + _AGAIN_MS, partition, request_id)
                return
            live = None
        if live is None and header is not None and header.state is EntryState.PENDING:
            live = await self._resume(partition, request_id)
        if live is not None:
            await self._look(live)
        elif header is None or header.state is EntryState.PENDING:
            return
        elif header.time_ms + self._settings.dedupe_window <= self._clock.now_ms():
            await self._ledger.forget(partition, request_id, header)

    async def _look(self, live: Live) -> None:
        """End a join whose deadline has come, or what its pools were silent to; run what whoever had it had begun."""
        if live.join is None or live.plan is None or live.concluding:
            return
        if self._clock.now_ms() >= live.record.deadline_ms:
            self._tasks.expire(live)
            await self._conclude(live)
            return
        begun = await self._tasks.give_up_silent(live)
        if begun is not None or self._tasks.has_more(live):
            await self._go_on(live, begun or ())

    async def _go_on(self, live: Live, begun: Sequence[TaskPlan] = ()) -> None:
        """A task of a join has ended or stayed silent: run ``begun``, which stands in, and what that set free; then
        write the decision, or the join.

        Also after a repeated result, for what brought it first may not have got as far, or not have written it; and
        after one that came too late, for the decision must stand before the result may be forgotten.
        """
        try:
            if live.outcome is None and not await self._tasks.run(live, begun):
                self._tasks.expire(live)
            if live.outcome is not None:
                await self._conclude(live)
            elif live.counted:
                await self._pend(live)
        except NotOwner:
            # Should the partition stay ours after all, what was begun and not done is begun anew, from the entry.
            self._abandon(live)
            self._timers.at(self._clock.now_ms() + _AGAIN_MS, live.partition, live.record.request_id)
            raise

    async def _resume(self, partition: int, request_id: str) -> Live | None:
        """A pending join that this worker did not begin, or began before a rebalance, made live from its entry."""
        record = self._ledger.read(partition, request_id)
        if record is None or not record.pending:
            return None
        read = await self._read_again(record)
        if known := self._live.get(request_id):
            return known
        record = self._ledger.read(partition, request_id)
        if record is None or not record.pending:
            return None
        request = None if isinstance(read, Problem) else read
        named = frozenset((task.name, task.version) for task in record.tasks)
        live = Live(record, request, counted=True, durable=True, named=named)
        self._pending += 1
        self._live[request_id] = live
        if isinstance(read, Problem):
            late = read.code is Code.DEADLINE_EXCEEDED
            await self._end(live, Status.EXPIRED if late else Status.FAILED, (read,))
            return None
        revision = None if record.revision is None else self._registry.get(record.revision)
        # As it was routed then: by what was valid when the request came, and with what stands in since.
        plan = None if revision is None else route(revision, read, record.received_ms)
        if not isinstance(plan, Plan):
            said = "the revision that this request began under is gone: ask again with a new id"
            await self._end(live, Status.FAILED, (Problem(Code.INTERNAL, said),))
            return None
        live.plan = plan
        live.join = _joined(plan, record)
        for task, recorded_task in zip(plan.tasks, record.tasks, strict=True):
            live.tasks[task.name] = standing = _as_recorded(task, recorded_task)
            version = standing.version
            live.inputs[task.name, version.version] = recorded(
                version.features, plan.revision.views, recorded_task.features
            )
            if (out := recorded_task.result) is not None and out.status is TaskStatus.PENDING:
                live.asked[task.name] = out.attempts[-1].started_ms
        live.gained_ms = self._gained_ms.get(partition, 0)
        live.patient_ms = live.gained_ms + CATCH_UP_MS
        self._timers.at(record.deadline_ms, partition, request_id)
        self._tasks.watch(live)
        return live

    async def _read_again(self, record: DecisionRecord) -> Request | Problem:
        """The request of a pending join; or what ends it, where it cannot be read, or not by the join's deadline."""
        while True:
            try:
                return await self._admission.read(record.source)
            except RequestRefused as error:
                said = f"the request was taken over from another worker and could not be read again: {error}"
                problem = Problem(Code.INTERNAL, said)
            except StoreUnavailable as error:
                if self._clock.now_ms() < record.deadline_ms:
                    await asyncio.sleep(_RETRY_S)
                    await self._ledger.owned(record.source.partition)
                    continue
                said = f"the request was taken over from another worker and could not be read by its deadline: {error}"
                problem = Problem(Code.DEADLINE_EXCEEDED, said)
            log.warning("resume_failed", request_id=record.request_id, reason=problem.message)
            return problem

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _conclude(self, live: Live) -> None:
        """Make the decision of a join that has decided; whoever comes second waits for the first."""
        done = self._done(live)
        if live.concluding:
            await asyncio.shield(done)
            return
        assert live.plan is not None  # noqa: S101 - a join has a plan
        assert live.outcome is not None  # noqa: S101 - what the caller saw
        outcome = live.outcome
        for task in live.tasks.values():
            version = task.version
            _tasks(version.model, version.version, outcome.results[task.name].status).inc()
            if is_referred(outcome) and outcome.results[task.name].referred:
                _REFERRALS.labels(live.plan.route.name, task.name).inc()
        await self._finish(live, decide(live.record, live.plan, outcome, self._clock.now_ms()))
        self._shadows.offer(live, busy=len(self._live) > self._settings.requests_in_flight_max // 2)

    async def _end(self, live: Live, status: Status, problems: tuple[Problem, ...]) -> None:
        await self._finish(live, refuse(live.record, status, problems, self._clock.now_ms()))

    async def _finish(self, live: Live, record: DecisionRecord) -> None:
        """Make the decision durable and known; whoever waits for it goes on, and whoever comes second waits."""
        done = self._done(live)
        if live.concluding:
            await asyncio.shield(done)
            return
        live.concluding = True
        recipient = _first_recipient(record)
        try:
            async with live.writing:
                record = await self._ledger.decide(record, [recipient], live.check, acknowledged=live.durable)
        except BaseException:
            self._abandon(live)
            raise
        self._forget(live)
        if not done.done():
            done.set_result(record)
        assert record.decided_ms is not None  # noqa: S101 - it is decided
        self._timers.at(record.decided_ms + self._settings.dedupe_window, live.partition, record.request_id)
        latency_ms = record.decided_ms - record.received_ms
        _decisions(str(record.status), record.route or "").inc()
        _latency(record.route or "").observe(max(0, latency_ms) / 1000)
        log.info(
            "decided",
            request_id=record.request_id,
            execution_id=record.execution_id,
            status=str(record.status),
            route=record.route,
            rule=record.rule,
            codes=[str(problem.code) for problem in record.problems],
            latency_ms=latency_ms,
            position=record.source.position,
        )

    def _announced_here(self, decided: DecisionRecord) -> bool:
        """Whether this process decided it since it owns the partition, so that its audit record is surely out."""
        since_ms = self._gained_ms.get(decided.source.partition)
        mine = decided.instance == self._instance and decided.decided_ms is not None
        return since_ms is not None and mine and (decided.decided_ms or 0) >= since_ms

    async def _announce_decided(self, partition: int, request_id: str) -> None:
        """A decision whose announcement a worker did not live to finish."""
        if request_id in self._live:
            return
        record = self._ledger.read(partition, request_id)
        if record is None or record.decided_ms is None:
            return
        await self._ledger.announce_again(partition, request_id, [_first_recipient(record)])
        self._timers.at(record.decided_ms + self._settings.dedupe_window, partition, request_id)

    # --- small things -------------------------------------------------------------------------------------------------

    def _done(self, live: Live) -> "asyncio.Future[DecisionRecord]":
        """Done once it is decided; of what was given up nobody would end it any more."""
        if live.abandoned:
            raise _BegunAnew(_GIVEN_UP)
        if live.done is None:
            live.done = asyncio.get_running_loop().create_future()
        return live.done

    def _forget(self, live: Live) -> None:
        if self._live.get(live.record.request_id) is live:
            del self._live[live.record.request_id]
        if live.counted:
            live.counted = False
            self._pending -= 1
            self._room.set()

    def _abandon(self, live: Live) -> None:
        """Stop standing for a request: whoever owns its partition begins anew, or goes on from the table."""
        if live.abandoned:
            return
        live.abandoned = True
        self._forget(live)
        # It may wait for room itself.
        self._room.set()
        if live.done is not None and not live.done.done():
            live.done.set_exception(_BegunAnew(_GIVEN_UP))
            live.done.exception()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except NotOwner:
                return
            except Exception as error:  # a lost timer would be a silent request; a restart rebuilds it
                log.exception("background_failed")
                await self._on_crash(error)
            except asyncio.CancelledError as error:
                if was_cancelled():
                    raise
                log.exception("background_failed")
                await self._on_crash(error)

        task = asyncio.create_task(guarded())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _new_record(self, arrival: Arrival, now_ms: int) -> DecisionRecord:
        return DecisionRecord(
            Kind.DECISION,
            arrival.request_id,
            self._new_id(),
            arrival.record,
            arrival.content_type,
            arrival.body,
            now_ms,
            now_ms + self._settings.default_deadline,
            self._instance,
        )

    def _recipient(self, arrival: Arrival) -> Recipient:
        return Recipient(arrival.address, arrival.traceparent, arrival.record.key)


class _BegunAnew(NotOwner):
    """The Live that was waited for was given up."""


def _same(one: InboundRecord, other: InboundRecord) -> bool:
    return (one.partition, one.offset) == (other.partition, other.offset)


Entries = Callable[[int], Iterable[tuple[str, EntryHeader]]]
"""The entries of a partition."""


def _first_recipient(record: DecisionRecord) -> Recipient:
    """Whoever asked first. A request whose reply topic cannot be used is never decided, so its address is sound."""
    headers = record.source.headers
    traceparent = next((value for name, value in headers if name == "traceparent"), None)
    return Recipient(read_address(headers), traceparent, record.source.key)


def _late(deadline_ms: int, arrived_ms: int, now_ms: int) -> str:
    """Why a request is ended before anything is done for it; it arrived when Kafka got it.

    >>> _late(1_000, 1_000, 1_005)
    'the deadline had passed when the request arrived: send it earlier, or give it longer'
    >>> _late(1_000, 900, 1_005)
    'the deadline passed before a worker was free, 105 ms after the request arrived: give it longer, or try later'
    """
    if deadline_ms <= arrived_ms:
        return "the deadline had passed when the request arrived: send it earlier, or give it longer"
    waited = f"{now_ms - arrived_ms} ms after the request arrived"
    return f"the deadline passed before a worker was free, {waited}: give it longer, or try later"


def _joined(plan: Plan, record: DecisionRecord) -> Join:
    """The join as the record left it."""
    join = Join.of([task.spec for task in plan.tasks], record.deadline_ms, plan.rule.spec.join)
    results = {
        task.name: replace(task.result, referred=is_referral(plan.revision, task, task.result))
        for task in record.tasks
        if task.result is not None and task.result.status is not TaskStatus.PENDING
    }
    return replace(join, results=results)


def _as_recorded(task: TaskPlan, record: TaskRecord) -> TaskPlan:
    """The task as the record left it: with the version that stood in last, and what is left to stand in."""
    for place, standby in enumerate(task.standbys):
        version = standby.version
        if record.earlier and version is not None and version.version == record.version:
            left = task.standbys[place + 1 :]
            return replace(
                task, version=version, selected_by=record.selected_by, experiment=None, barred=None, standbys=left
            )
    return task
