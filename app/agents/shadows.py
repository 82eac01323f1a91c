"""Shadows: versions that are asked what they would have said, once a decision is made and answered.

They have slots of their own and wait for none: when these are taken, or the worker is busy, a shadow is shed and
counted. Whatever becomes of one is an audit record that names its decision and compares the two; nothing of it reaches
the caller. A pool's answer to a shadow is waited for here, as long as the version's policy allows; a worker that ends
meanwhile loses it, and nothing else.
"""

import asyncio
from dataclasses import replace
from typing import Final
from uuid import UUID, uuid5

import structlog
from prometheus_client import Counter

from app.adapters.record_codec import encode_record
from app.adapters.task_codec import QueuedResult
from app.agents.ledger import Ledger
from app.agents.live import Live
from app.agents.skew import SkewGuard
from app.agents.tasks import encoded, no_pool, version_record
from app.domain.comparison import compare_shadow
from app.domain.decisions import Kind
from app.domain.dispatch import Answer, Row, TaskResult, TaskStatus, judge
from app.domain.errors import BrokerError, Code, NotOwner, Problem
from app.domain.features import TaskInputs, resolve
from app.domain.join import Status
from app.domain.registry import Revision
from app.domain.routing import ShadowPlan, TaskPlan
from app.domain.version_documents import ModelVersionSpec
from app.ports.clock import Clock
from app.ports.log import Replies
from app.ports.model_backend import ModelBackend
from app.settings import Settings

log = structlog.get_logger()

_SHADOWS: Final = Counter(
    "broker_shadows", "Shadows by model, version and fate: compared, failed, shed, lost", ["model", "version", "fate"]
)
_SUFFIX: Final = "/shadow"
"""Of a task's name, which cannot hold this character itself."""
_NAMESPACE: Final = UUID("0f5f2a1e-6d5c-5b0a-8d0e-3b8a6c2f9e41")


class Shadows:
    """Runs at most ``shadows_in_flight_max`` shadows of one worker at once."""

    def __init__(
        self,
        *,
        backend: ModelBackend,
        ledger: Ledger,
        replies: Replies,
        clock: Clock,
        settings: Settings,
        skew: SkewGuard | None = None,
    ) -> None:
        self._skew = skew
        self._backend = backend
        self._ledger = ledger
        self._replies = replies
        self._clock = clock
        self._settings = settings
        self._running: dict[asyncio.Task[None], ModelVersionSpec] = {}
        self._shares = ("", 0)
        self._asked: dict[tuple[str, str, str], asyncio.Future[QueuedResult]] = {}

    def offer(self, live: Live, *, busy: bool) -> None:
        """Begin the shadows of a decision that is made; sheds them when ``busy``, or without a free slot.

        Of the ``n`` versions that are shadows in the revision, each has at most ``2 / (n + 1)`` of the slots, so that
        one that hangs leaves room for the others.
        """
        if live.plan is None or live.outcome is None:
            return
        for task in live.plan.tasks:
            if live.outcome.results[task.name].status is TaskStatus.SKIPPED:
                # It was not to be run, or not needed; so its shadow is not either.
                continue
            for shadow in task.shadows:
                version = shadow.version
                if live.fetched is None:
                    # Another worker had fetched the features.
                    _SHADOWS.labels(version.model, version.version, "lost").inc()
                    continue
                if version is live.tasks[task.name].version:
                    continue
                if busy or not self._room_for(version, live.plan.revision):
                    _SHADOWS.labels(version.model, version.version, "shed").inc()
                    continue
                running = asyncio.create_task(self._run(live, task, shadow))
                self._running[running] = version
                running.add_done_callback(self._running.pop)

    def _room_for(self, version: ModelVersionSpec, revision: Revision) -> bool:
        if len(self._running) >= self._settings.shadows_in_flight_max:
            return False
        if self._shares[0] != revision.id:
            self._shares = (revision.id, -(-2 * self._settings.shadows_in_flight_max // (_shadowing(revision) + 1)))
        return sum(each is version for each in self._running.values()) < self._shares[1]

    async def _run(self, live: Live, task: TaskPlan, shadow: ShadowPlan) -> None:
        version = shadow.version
        try:
            fate = await self._record(live, task, shadow)
        except NotOwner:
            fate = "lost"
        except BrokerError as error:
            fate = "lost"
            log.warning("shadow_lost", request_id=live.record.request_id, version=version.version, reason=str(error))
        except Exception:
            # A shadow's fault must not be the worker's.
            fate = "lost"
            log.exception("shadow_failed", request_id=live.record.request_id, version=version.version)
        _SHADOWS.labels(version.model, version.version, fate).inc()

    async def _record(self, live: Live, task: TaskPlan, shadow: ShadowPlan) -> str:
        plan, version, decided = live.plan, shadow.version, live.record
        assert plan is not None  # noqa: S101 - `offer` looked
        assert live.fetched is not None  # noqa: S101 - `offer` looked
        assert live.outcome is not None  # noqa: S101 - a decision was made
        began_ms = self._clock.now_ms()
        inputs = resolve(version.features, plan.revision.views, live.seen(), live.fetched, began_ms)
        result = await self._ask(live, task, shadow, inputs, began_ms)
        evidence = compare_shadow(plan, decided, live.outcome.results, result, version.version, shadow.segment)
        record = replace(version_record(task.name, version, inputs, "shadow", "optional"), result=result)
        name = f"{decided.execution_id}/{task.name}/{version.version}"
        shadowed = replace(
            decided,
            kind=Kind.SHADOW,
            execution_id=str(uuid5(_NAMESPACE, name)),
            # The decision's own record has the request.
            source=replace(decided.source, value=None, headers=()),
            received_ms=began_ms,
            deadline_ms=began_ms + version.policy.timeout,
            tasks=(record,),
            status=Status.COMPLETED if result.problem is None else Status.FAILED,
            decided_ms=self._clock.now_ms(),
            problems=() if result.problem is None else (result.problem,),
            reply=None,
            decision=decided.execution_id,
            evidence=evidence,
        )
        await self._ledger.audit(shadowed, encode_record(shadowed))
        return "compared" if result.problem is None else "failed"

    async def _ask(
        self, live: Live, task: TaskPlan, shadow: ShadowPlan, inputs: TaskInputs, began_ms: int
    ) -> TaskResult:
        if inputs.obstacle is not None:
            problem = replace(inputs.obstacle, task=task.name)
            return TaskResult(task.name, TaskStatus.SKIPPED, None, problem, 0.0, (), b"")
        row = Row(
            live.record.request_id,
            # A server that remembers what it was asked must not take this for the task itself.
            f"{task.name}{_SUFFIX}",
            inputs.values,
            inputs.types,
            began_ms + shadow.version.policy.timeout,
            live.request.traceparent if live.request else None,
            live.record.execution_id,
        )
        if self._skew is not None:
            self._skew.observe(shadow.version, inputs.features, shadow=True)
        if shadow.version.backend.type == "kafka":
            return await self._ask_pool(live, task, shadow.version, row, began_ms)
        started = self._clock.steady_ms()
        (answer,) = await self._backend.infer(shadow.version, (row,))
        return judge(task.name, shadow.version, answer, self._clock.steady_ms() - started)

    async def _ask_pool(
        self, live: Live, task: TaskPlan, version: ModelVersionSpec, row: Row, began_ms: int
    ) -> TaskResult:
        asked = await no_pool(self._replies, self._settings, version) or encoded(
            self._settings, row, version, live.partition, began_ms
        )
        if isinstance(asked, Problem):
            return judge(task.name, version, Answer(None, replace(asked, task=task.name), (), b""), 0.0)
        key = (row.execution_id, row.task, version.version)
        answered = self._asked[key] = asyncio.get_running_loop().create_future()
        try:
            await self._ledger.dispatch(live.partition, asked, lambda: self._clock.now_ms() < row.deadline_ms)
            result = await asyncio.wait_for(answered, version.policy.timeout / 1000)
        except TimeoutError:
            said = f"{version.model} {version.version} did not answer within its {version.policy.timeout} ms"
            problem = Problem(Code.MODEL_TIMEOUT, said, task.name)
            return judge(task.name, version, Answer(None, problem, (), b""), version.policy.timeout)
        finally:
            del self._asked[key]
        return judge(task.name, version, result.answer, result.latency_ms)

    def take(self, result: QueuedResult) -> bool:
        """Whether a pool's answer was to a shadow; one that nobody waits for any more is passed over."""
        if not result.task.endswith(_SUFFIX):
            return False
        answered = self._asked.get((result.execution_id, result.task, result.version))
        if answered is not None and not answered.done():
            answered.set_result(result)
        return True

    async def close(self) -> None:
        """Give up those that run: they are worth no wait."""
        for running in tuple(self._running):
            running.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


def _shadowing(revision: Revision) -> int:
    """How many versions are shadows in a revision; an alias counts as one more."""
    tasks = (task.spec for route in revision.routes for rule in route.rules for task in rule.tasks)
    return len({(task.model, shadow.version, shadow.alias) for task in tasks for shadow in task.shadow}) or 1
