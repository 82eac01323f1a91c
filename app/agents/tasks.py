"""A decision's tasks: from its plan to the answers in its join.

A task begins once all that it waits for has ended: inline ones are called here, queued ones go to their pools, and are
waited for as long as their version's policy says. One whose version may not be used, cannot be given its inputs, fails
or stays silent goes on with the version that stands in for it; what failed is kept beside it. Whatever ends sets free
what waited for it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import structlog
from prometheus_client import Counter

from app.adapters.task_codec import QueuedResult, encode_task
from app.adapters.topics import pool_topic
from app.agents.ledger import Ledger
from app.agents.live import Live
from app.agents.skew import SkewGuard
from app.agents.timers import Timers
from app.domain.breaker import COUNTED_FROM_MS
from app.domain.decisions import TaskRecord, condition, is_referral, must_answer
from app.domain.dispatch import Answer, Attempt, Row, TaskResult, TaskStatus, judge
from app.domain.errors import Code, Problem, StoreUnavailable
from app.domain.features import FetchedFeatures, TaskInputs, ViewNeed, needs_of, resolve, unavailable
from app.domain.join import Decide, Effect, Ignore, Join, JoinTask, Status
from app.domain.on_demand import Computation, FeatureFunction, compute
from app.domain.rollout_stats import UNACKNOWLEDGED, UNATTENDED
from app.domain.routing import Standby, TaskPlan
from app.domain.version_documents import ModelVersionSpec
from app.ports.clock import Clock
from app.ports.feature_store import FeatureStore
from app.ports.log import OutboundRecord, Replies
from app.ports.model_backend import ModelBackend
from app.settings import Settings

log = structlog.get_logger()

VERSION_SHARE: Final = 0.75
"""Of what is left until the deadline, what a version may take while another could stand in for it."""
ANSWER_GRACE_S: Final = 0.02
"""A call that ends by the deadline tells what it was; it is waited for so much longer, and cut off only then."""
_CUT: Final = (TaskStatus.TIMEOUT, TaskStatus.DEFAULTED, TaskStatus.SKIPPED)
FEATURES_SHARE: Final = 0.75
"""Of what is left until the deadline, what features may take: where they do not come, models can still be asked without
them."""

_FALLBACKS = Counter(
    "broker_fallbacks", "Tasks that went on with another version, by the one that failed", ["model", "version", "code"]
)

_BARRED = Counter(
    "broker_versions_barred",
    "Tasks whose version was chosen and may not decide, by why: version_expired, version_unapproved",
    ["route", "task", "code"],
)


def tasks_barred(route: str, *problems: Problem | None) -> None:
    """Count versions that may not decide, whatever became of their tasks."""
    for problem in problems:
        if problem is not None and problem.code in (Code.VERSION_EXPIRED, Code.VERSION_UNAPPROVED):
            _BARRED.labels(route, problem.task or "", problem.code).inc()


class Tasks:
    """Runs what the joins of one worker wait for; ``pend_by`` comes before all else."""

    _pend: Callable[[Live], Awaitable[bool]]

    def __init__(
        self,
        *,
        ledger: Ledger,
        features: FeatureStore,
        backend: ModelBackend,
        replies: Replies,
        timers: Timers,
        clock: Clock,
        settings: Settings,
        functions: Mapping[str, FeatureFunction] | None = None,
        skew: SkewGuard | None = None,
    ) -> None:
        self._skew = skew
        self._ledger = ledger
        self._timers = timers
        self._features = features
        self._backend = backend
        self._replies = replies
        self._clock = clock
        self._settings = settings
        self._functions = functions or {}

    def pend_by(self, pend: Callable[[Live], Awaitable[bool]]) -> None:
        """How a join's entry is written as it stands; False where its request has ended meanwhile."""
        self._pend = pend

    # --- inputs -------------------------------------------------------------------------------------------------------

    async def prepare(self, live: Live) -> tuple[Status, tuple[Problem, ...]] | None:
        """Fetch what all versions need in one go, and set up the join; or how the request ends by that.

        Where the deadline came before the features did, the join has decided.
        """
        plan, seen = live.plan, live.seen()
        assert plan is not None  # noqa: S101 - what is prepared is planned
        views, wants = plan.revision.views, plan.revision.wants
        needs, faults = needs_of(wants(task.version for task in plan.tasks), views, seen)
        if faults:
            return Status.REJECTED, faults
        versions = [version for task in plan.tasks for version in task.versions]
        if any(task.standbys or task.shadows for task in plan.tasks):
            # What stands in or runs beside may need more, and what it lacks is no fault of the request.
            needs, _ = needs_of(wants(versions), views, seen)
        given_ms, began = self._patience_ms(live), self._clock.steady_ms()
        live.fetched = await self._found(live, needs, plan.revision.computed(versions))
        now_ms = self._clock.now_ms()
        live.tasks = {task.name: task for task in plan.tasks}
        records, broken = [], []
        for task in plan.tasks:
            version = task.version
            inputs = resolve(version.features, views, seen, live.fetched, now_ms)
            live.inputs[task.name, version.version] = inputs
            records.append(task_record(task, inputs))
            if inputs.problems and must_answer(plan, task) and not await self._other_can(live, task):
                broken += [replace(problem, task=task.name) for problem in inputs.problems]
        live.record = replace(live.record, tasks=tuple(records))
        specs = [task.spec for task in plan.tasks]
        if self._was_cut(live, given_ms, began):
            # The store may be well: the request gave it no time, and ends as at any other deadline.
            live.join = Join.of(specs, live.record.deadline_ms, plan.rule.spec.join)
            self.expire(live)
            return None
        if broken:
            away = any(problem.code is Code.FEATURES_UNAVAILABLE for problem in broken)
            return (Status.FAILED if away else Status.REJECTED), tuple(broken)
        live.join = Join.of(specs, live.record.deadline_ms, plan.rule.spec.join)
        return None

    def _patience_ms(self, live: Live) -> int:
        """How long a fetch of features may take: its setting, and of what is left until the deadline its share."""
        left_ms = live.record.deadline_ms - self._clock.now_ms()
        return max(1, min(round(left_ms * FEATURES_SHARE), self._settings.feature_timeout))

    def _was_cut(self, live: Live, given_ms: int, began: float) -> bool:
        """Whether features that are unavailable are so because the deadline left them no more time.

        A store that says that it is away says so at once. One that is waited for is given up at the latest after what
        it was given, and by the near cache after half of it, where there is something older to serve; from
        ``COUNTED_FROM_MS`` on that is an outage.
        """
        lacking = (problem for inputs in live.inputs.values() for problem in inputs.problems)
        if not any(problem.code is Code.FEATURES_UNAVAILABLE for problem in lacking):
            return False
        if self._clock.now_ms() >= live.record.deadline_ms:
            return True
        waited_ms = self._clock.steady_ms() - began
        return given_ms < min(COUNTED_FROM_MS, self._settings.feature_timeout) and waited_ms >= given_ms / 2

    async def _found(self, live: Live, needs: Sequence[ViewNeed], computed: Sequence[Computation]) -> FetchedFeatures:
        """What is stored, and what is computed of it and of the request."""
        assert live.plan is not None  # noqa: S101 - what is fetched for is planned
        fetched, views = await self._fetch(live, needs), live.plan.revision.views
        return compute(computed, live.seen(), fetched, self._functions, views, self._clock.now_ms())

    async def _fetch(self, live: Live, needs: Sequence[ViewNeed]) -> FetchedFeatures:
        if not needs:
            return {}
        try:
            return await self._features.fetch(needs, self._patience_ms(live))
        except StoreUnavailable as error:
            log.warning("features_unavailable", request_id=live.record.request_id, reason=str(error))
            return unavailable(needs)

    async def _other_can(self, live: Live, task: TaskPlan) -> bool:
        """Whether a version that stands in for the task's own has all its inputs."""
        for standby in task.standbys:
            if standby.version is not None and not (await self._inputs(live, _standing(task, standby))).problems:
                return True
        return False

    async def _inputs(self, live: Live, task: TaskPlan) -> TaskInputs:
        """A task's inputs; fetched anew where another worker had fetched those of an earlier version."""
        version = task.version
        inputs = live.inputs.get((task.name, version.version))
        if inputs is None:
            assert live.plan is not None  # noqa: S101 - tasks are planned
            views, fetched, seen = live.plan.revision.views, live.fetched, live.seen()
            if fetched is None:
                needs, _ = needs_of(live.plan.revision.wants((version,)), views, seen)
                fetched = await self._found(live, needs, live.plan.revision.computed((version,)))
            inputs = resolve(version.features, views, seen, fetched, self._clock.now_ms())
            live.inputs[task.name, version.version] = inputs
        return inputs

    # --- running ------------------------------------------------------------------------------------------------------

    async def begin(self, live: Live) -> list[TaskPlan]:
        """The tasks that may run now; those that end without running are joined at once."""
        begun: list[TaskPlan] = []
        while live.join is not None and (ready := live.join.ready(live.begun)):
            live.begun.update(ready)
            for task in [live.tasks[name] for name in ready]:
                runnable = await self._runnable(live, task) if _stands(live, task) else None
                if runnable is not None:
                    begun.append(runnable)
        return [task for task in begun if _stands(live, task)]

    async def run(self, live: Live, begun: Sequence[TaskPlan] = ()) -> bool:
        """Run ``begun`` and all that may begin, until only pools' answers are missing or the join has decided.

        False: the deadline came first.
        """
        assert live.plan is not None  # noqa: S101 - tasks are planned
        wait_s = max(0.0, (live.record.deadline_ms - self._clock.now_ms()) / 1000) + ANSWER_GRACE_S
        try:
            async with asyncio.timeout(wait_s):
                if live.plan.rule.spec.join.policy == "all":
                    await self._run(live, begun)
                else:
                    await self._run_until_enough(live, begun)
        except TimeoutError:
            return False
        return True

    async def _run_until_enough(self, live: Live, begun: Sequence[TaskPlan]) -> None:
        """As ``_run``, and what still runs when the join has decided is cancelled."""
        if live.enough is None:
            live.enough = asyncio.get_running_loop().create_future()
        work = asyncio.ensure_future(self._run(live, begun))
        try:
            await asyncio.wait({work, live.enough}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not work.done():
                work.cancel()
        if work.done():
            work.result()

    async def _run(self, live: Live, begun: Sequence[TaskPlan]) -> None:
        while begun or (begun := await self.begin(live)):
            works = [self._ask(live, task) if task.queued else self._infer(live, task) for task in begun]
            if len(works) == 1:
                await works[0]
            else:
                await _together(works)
            begun = ()

    async def _infer(self, live: Live, task: TaskPlan) -> None:
        """One inline task, from its inputs to its place in the join; then what it set free."""
        while True:
            row = await self._row(live, task)
            if not _stands(live, task):
                return
            started = self._clock.steady_ms()
            answer = self._backend.refusal(task.version) if _has_better(task) else None
            if answer is None:
                self._observe(live, task)
                live.called[task.name] = (task.version.version, self._clock.now_ms())
                (answer,) = await self._backend.infer(task.version, (row,))
                # It tells its attempts itself, or that it made none.
                live.called.pop(task.name, None)
            if row.deadline_ms < live.record.deadline_ms:
                answer = _of_its_own(answer)
            result = judge(task.name, task.version, answer, self._clock.steady_ms() - started)
            if result.problem is None:
                self.join(live, result)
                break
            standing = await self._fail(live, task, result)
            if standing is None:
                break
            task = standing
            if task.queued:
                await self._ask(live, task)
                return
        if len(live.tasks) > 1:
            await self._run(live, ())

    async def _ask(self, live: Live, task: TaskPlan) -> None:
        """Send a queued task to its pool; sending one twice is harmless. Where it cannot be, what stands in is run."""
        while task.queued:
            problem = await no_pool(self._replies, self._settings, task.version) or await self._send(live, task)
            if problem is None or not _stands(live, task):
                return
            standing = await self._fail(live, task, _ended(task.name, TaskStatus.ERROR, problem))
            if standing is None:
                await self._run(live, ())
                return
            task = standing
        await self._infer(live, task)

    async def _send(self, live: Live, task: TaskPlan) -> Problem | None:
        """Send it, where it is still to be sent; or why its inputs cannot be."""
        await self._inputs(live, task)
        sent = (task.name, task.version.version)
        if not _stands(live, task):
            return None
        # The entry names the version before it is asked: whichever worker gets its answer must know whose it is.
        if live.durable and sent not in live.named and not await self._pend(live):
            return None
        row, now_ms = await self._row(live, task), self._clock.now_ms()
        if not _stands(live, task) or now_ms >= live.record.deadline_ms:
            return None
        until_ms = min(row.deadline_ms, now_ms + _patience_ms(live, task, now_ms))
        record = encoded(self._settings, replace(row, deadline_ms=until_ms), task.version, live.partition, now_ms)
        if isinstance(record, Problem):
            return record
        if task.name not in live.asked:
            # By nobody before, either.
            live.unacknowledged.add(sent)
        live.asked[task.name] = now_ms
        self._observe(live, task)
        self.watch(live)

        def wanted() -> bool:
            return self._clock.now_ms() < until_ms and _stands(live, task)

        if await self._ledger.dispatch(live.partition, record, wanted):
            live.unacknowledged.discard(sent)
        return None

    async def _row(self, live: Live, task: TaskPlan) -> Row:
        inputs, now_ms = await self._inputs(live, task), self._clock.now_ms()
        until_ms = now_ms + _patience_ms(live, task, now_ms) if _others_left(task) else live.record.deadline_ms
        return Row(
            live.record.request_id,
            task.name,
            inputs.values,
            inputs.types,
            until_ms,
            live.request.traceparent if live.request else None,
            live.record.execution_id,
        )

    def _observe(self, live: Live, task: TaskPlan) -> None:
        """Its inputs go out; also those that a model never answers are of the population that it is asked about."""
        if self._skew is not None:
            self._skew.observe(task.version, live.inputs[task.name, task.version.version].features)

    # --- silence ------------------------------------------------------------------------------------------------------

    def watch(self, live: Live) -> None:
        """See to it that a timer looks when the first of the pools that are asked counts as silent, if before the
        deadline, which has its own."""
        due_ms = min((self._silent_ms(live, name) for name in self._out(live)), default=live.record.deadline_ms)
        if due_ms < min(live.record.deadline_ms, live.look_ms or live.record.deadline_ms):
            live.look_ms = due_ms
            self._timers.at(due_ms, live.partition, live.record.request_id)

    async def give_up_silent(self, live: Live) -> list[TaskPlan] | None:
        """End the tasks whose pools had their policy's time; gives what stands in for them. None: there were none."""
        now_ms = self._clock.now_ms()
        silent = [name for name in self._out(live) if self._silent_ms(live, name) <= now_ms]
        # Nobody else gives up what is no longer waited for.
        given_up = [(live.tasks[name], live.asked.pop(name)) for name in silent]
        live.begun.update(silent)
        # The others have their time still, whatever what stands in takes.
        live.look_ms = None
        self.watch(live)
        standing = [
            await self._fail(live, task, self._silence(live, task, asked_ms, now_ms)) for task, asked_ms in given_up
        ]
        return [task for task in standing if task is not None] if silent else None

    def waiting(self, live: Live) -> tuple[tuple[TaskRecord, ...], int]:
        """The task records of a join as it stands, and when whoever takes it over is to look at it.

        A queued task without a result is recorded as pending since it was asked; from now on, where it is about to be
        and the request is not acknowledged yet. Any other that may run is to be run at once: nothing may bring it again
        where a silence has set it free.
        """
        assert live.join is not None  # noqa: S101 - only joins wait
        now_ms, look_ms = self._clock.now_ms(), live.record.deadline_ms
        records: list[TaskRecord] = []
        out = live.asked.keys() if live.durable else live.begun | live.asked.keys()
        # Whoever takes over before Kafka has acknowledged a task is to send it.
        out = out - {name for name, version in live.unacknowledged if live.tasks[name].version.version == version}
        if any(not live.tasks[name].queued or name not in out for name in live.join.ready(())):
            look_ms = now_ms
        for record in live.record.tasks:
            task, result = live.tasks[record.name], live.join.results.get(record.name)
            if result is None and task.queued and task.name in out:
                asked_ms = live.asked.get(task.name, now_ms)
                look_ms = min(look_ms, asked_ms + _patience_ms(live, task, asked_ms))
                attempt = Attempt(task_topic(self._settings, task.version), asked_ms, 0.0, "asked")
                result = TaskResult(task.name, TaskStatus.PENDING, None, None, 0.0, (attempt,), b"")
            records.append(replace(record, result=result))
        return tuple(records), look_ms

    def has_more(self, live: Live) -> bool:
        """Whether a join that was taken over has something to run that was not begun here."""
        return bool(live.gained_ms) and live.join is not None and bool(live.join.ready(live.begun | live.asked.keys()))

    def _out(self, live: Live) -> list[str]:
        if live.join is None or live.join.decided:
            return []
        return [name for name in live.asked if name not in live.join.results]

    def _silent_ms(self, live: Live, name: str) -> int:
        return max(live.patient_ms, live.asked[name] + _patience_ms(live, live.tasks[name], live.asked[name]))

    def _silence(self, live: Live, task: TaskPlan, asked_ms: int, now_ms: int) -> TaskResult:
        version, given_ms = task.version, _patience_ms(live, task, asked_ms)
        named, place = f"{version.model} {version.version}", task_topic(self._settings, version)
        if (task.name, version.version) in live.unacknowledged:
            status, code, outcome = TaskStatus.ERROR, Code.MODEL_UNAVAILABLE, UNACKNOWLEDGED
            said = f"{named} did not answer within its {given_ms} ms, and Kafka has not acknowledged its task"
        else:
            status, code, outcome = TaskStatus.TIMEOUT, Code.MODEL_TIMEOUT, "timeout"
            said = f"{named} did not answer within its {given_ms} ms"
        attempt = Attempt(place, asked_ms, float(now_ms - asked_ms), outcome)
        return TaskResult(task.name, status, None, Problem(code, said, task.name), attempt.latency_ms, (attempt,), b"")

    # --- ends ---------------------------------------------------------------------------------------------------------

    def join(self, live: Live, result: TaskResult) -> Effect:
        """Put a task's result into the join."""
        assert live.join is not None  # noqa: S101 - results exist only for a request that has a join
        assert live.plan is not None  # noqa: S101 - what has a join is planned
        if result.problem is not None:
            record = next((each for each in live.record.tasks if each.name == result.task), None)
            if record is not None and is_referral(live.plan.revision, record, result):
                result = replace(result, referred=True)
        live.join, effect = live.join.on_result(result)
        self._note(live, effect)
        return effect

    def expire(self, live: Live) -> None:
        """The join's deadline has come: decide with what is there."""
        assert live.join is not None  # noqa: S101 - only joins have deadlines
        live.join, effect = live.join.on_deadline(max(self._clock.now_ms(), live.join.deadline_ms))
        self._note(live, effect)

    def _note(self, live: Live, effect: Effect) -> None:
        if isinstance(effect, Decide):
            results = {name: self._under_way(live, result) for name, result in effect.outcome.results.items()}
            live.outcome = replace(effect.outcome, results=results)
            if live.enough is not None and not live.enough.done():
                live.enough.set_result(None)

    def _under_way(self, live: Live, result: TaskResult) -> TaskResult:
        """A result that the join itself made, at the deadline or because others were enough, with the call that it cut
        off: the model was asked."""
        if result.attempts or result.status not in _CUT or result.task not in live.tasks:
            return result
        task, now_ms = live.tasks[result.task], self._clock.now_ms()
        version, called_ms = live.called.get(result.task, ("", 0))
        if task.queued and result.task in live.asked:
            place, since_ms = task_topic(self._settings, task.version), live.asked[result.task]
        elif version == task.version.version and task.version.backend.type == "http":
            place, since_ms = ", ".join(task.version.backend.endpoints), called_ms
        else:
            return result
        late = result.problem is not None and result.problem.code is Code.DEADLINE_EXCEEDED
        outcome = "deadline" if late else "cancelled"
        if (task.name, task.version.version) in live.unacknowledged:
            outcome = UNACKNOWLEDGED
        elif task.queued and since_ms < live.gained_ms and now_ms < live.patient_ms:
            # Another worker asked, and what was answered since may still be to be read.
            outcome = UNATTENDED
        attempt = Attempt(place, since_ms, float(max(0, now_ms - since_ms)), outcome)
        return replace(result, attempts=(attempt,), latency_ms=attempt.latency_ms)

    async def on_answer(self, live: Live, task: TaskPlan, answered: QueuedResult) -> tuple[str, tuple[TaskPlan, ...]]:
        """Join a pool's answer; its fate (joined, late, repeated, unknown), and what stands in for it, to be run."""
        assert live.join is not None  # noqa: S101 - the caller looked
        if answered.version != task.version.version:
            # Of the version that failed before this one stood in.
            return "repeated", ()
        # It tells its attempts itself, or that it made none; and the pool is not asked again.
        live.asked.pop(task.name, None)
        live.begun.add(task.name)
        result = judge(task.name, task.version, _of_its_own(answered.answer), answered.latency_ms)
        if result.problem is None or live.join.decided or task.name in live.join.results:
            effect = self.join(live, result)
            return effect.reason if isinstance(effect, Ignore) else "joined", ()
        standing = await self._fail(live, task, result)
        return "joined", () if standing is None else (standing,)

    async def _runnable(self, live: Live, task: TaskPlan) -> TaskPlan | None:
        """The task, or what stands in for it, where there is something to run."""
        assert live.plan is not None  # noqa: S101 - tasks are planned
        assert live.join is not None  # noqa: S101 - it named the task
        verdict = condition(task, live.plan, live.join.results) if task.spec.after else None
        if verdict is not None:
            self.join(live, verdict)
            return None
        if task.barred is not None:
            return await self._fail(live, task, _ended(task.name, TaskStatus.ERROR, task.barred))
        obstacle = (await self._inputs(live, task)).obstacle
        if obstacle is not None:
            return await self._fail(live, task, _ended(task.name, TaskStatus.SKIPPED, obstacle))
        return task

    async def _fail(self, live: Live, task: TaskPlan, result: TaskResult) -> TaskPlan | None:
        """What stands in for a version that failed, ready to run; None where nothing does: the failure is joined.

        None, too, where the task has ended or goes on by then, for a result, a silence and a repetition may race.
        """
        while live.tasks[task.name] is task:
            standby = next((each for each in task.standbys if each.version is not None), None)
            if standby is None or self._clock.now_ms() >= live.record.deadline_ms:
                self.join(live, result)
                return None
            standing = _standing(task, standby)
            inputs = await self._inputs(live, standing)
            assert live.join is not None  # noqa: S101 - what fails is a join's
            if live.tasks[task.name] is not task or task.name in live.join.results or live.join.decided:
                return None
            self._stand_in(live, task, standing, inputs, result)
            if inputs.obstacle is None:
                return standing
            task, result = standing, _ended(task.name, TaskStatus.SKIPPED, inputs.obstacle)
        return None

    def _stand_in(
        self, live: Live, failed: TaskPlan, standing: TaskPlan, inputs: TaskInputs, result: TaskResult
    ) -> None:
        code = "" if result.problem is None else str(result.problem.code)
        _FALLBACKS.labels(failed.version.model, failed.version.version, code).inc()
        record = task_record(standing, inputs)
        live.tasks[failed.name] = standing
        live.begun.add(failed.name)
        live.asked.pop(failed.name, None)
        live.record = replace(
            live.record,
            tasks=tuple(
                replace(record, earlier=(*each.earlier, replace(each, result=result, earlier=())))
                if each.name == failed.name
                else each
                for each in live.record.tasks
            ),
        )


def _standing(failed: TaskPlan, standby: Standby) -> TaskPlan:
    """The task as it goes on with what stands in."""
    assert standby.version is not None  # noqa: S101 - the caller looked
    left = failed.standbys[failed.standbys.index(standby) + 1 :]
    return replace(
        failed,
        version=standby.version,
        selected_by=standby.selected_by,
        experiment=None,
        barred=None,
        standbys=left,
    )


def pool_of(version: ModelVersionSpec) -> str:
    """The name of a queued version's pool."""
    assert version.backend.type == "kafka"  # noqa: S101 - what `queued` means
    return version.backend.pool


def task_topic(settings: Settings, version: ModelVersionSpec) -> str:
    """The topic of a queued version's pool."""
    return settings.topic(pool_topic(pool_of(version)))


async def no_pool(replies: Replies, settings: Settings, version: ModelVersionSpec) -> Problem | None:
    """Why a version's pool cannot be asked; None where it can."""
    topic = task_topic(settings, version)
    if await replies.has_partition(topic, None):
        return None
    pool = pool_of(version)
    said = f"pool {pool} has no topic {topic}: run `model-broker topics apply --pool {pool}`"
    return Problem(Code.MODEL_UNAVAILABLE, said)


def encoded(
    settings: Settings, row: Row, version: ModelVersionSpec, partition: int, now_ms: int
) -> OutboundRecord | Problem:
    """The record that asks a version's pool, or why there can be none."""
    try:
        value = encode_task(row, version, partition, now_ms)
    except ValueError as error:
        return Problem(Code.MODEL_ERROR, str(error), row.task)
    return OutboundRecord(task_topic(settings, version), value, row.request_id.encode())


def _stands(live: Live, task: TaskPlan) -> bool:
    """Whether the task is still to be run as planned: of a join that was taken over a pool's answer may come at any
    time, and whoever brings it has ended the task, or goes on with what stands in. One that has decided, or is another
    worker's by now, runs nothing more."""
    ended = live.join is not None and (live.join.decided or task.name in live.join.results)
    return live.tasks[task.name] is task and not ended and not live.abandoned


def _others_left(task: TaskPlan) -> bool:
    return any(each.version is not None for each in task.standbys)


def _patience_ms(live: Live, task: TaskPlan, asked_ms: int) -> int:
    """How long a version that is asked at ``asked_ms`` is waited for: as its policy says, and so that another that
    could stand in for it has time to."""
    given_ms = task.version.policy.timeout
    if _others_left(task):
        given_ms = min(given_ms, max(1, round((live.record.deadline_ms - asked_ms) * VERSION_SHARE)))
    return given_ms


def _of_its_own(answer: Answer) -> Answer:
    """An answer that came too late by the task's own deadline: the request's has not come."""
    if answer.problem is None or answer.problem.code is not Code.DEADLINE_EXCEEDED:
        return answer
    return replace(answer, problem=replace(answer.problem, code=Code.MODEL_TIMEOUT))


def _has_better(task: TaskPlan) -> bool:
    """Whether the task has something to go on with instead of a call that will most likely fail."""
    return JoinTask.of(task.spec).need == "default" or _others_left(task)


def task_record(task: TaskPlan, inputs: TaskInputs) -> TaskRecord:
    """What is recorded of a task before it has a result."""
    return version_record(task.name, task.version, inputs, task.selected_by, task.spec.need, task.experiment)


def version_record(
    name: str, version: ModelVersionSpec, inputs: TaskInputs, selected_by: str, need: Any, experiment: str | None = None
) -> TaskRecord:
    """What is recorded of a version that is asked."""
    governance = version.governance
    return TaskRecord(
        name,
        version.model,
        version.version,
        version.digest,
        version.backend.type,
        selected_by,
        need,
        None if governance is None else governance.recorded,
        inputs.features,
        None,
        experiment,
    )


def _ended(task: str, status: TaskStatus, problem: Problem) -> TaskResult:
    """The result of a task that was not called."""
    return TaskResult(task, status, None, replace(problem, task=task), 0.0, (), b"")


async def _together(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All of them at once; when one fails the others are given up."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
