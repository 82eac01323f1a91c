"""Shadows: versions that are asked what they would have said, once a decision is made and answered.

They have slots of their own and wait for none: when these are taken, or the worker is busy, a shadow is shed and
counted. Whatever becomes of one is an audit record that names its decision and compares the two; nothing of it reaches
the caller.
"""

import asyncio
from dataclasses import replace
from typing import Final
from uuid import UUID, uuid5

import structlog
from prometheus_client import Counter

from app.adapters.record_codec import encode_record
from app.agents.ledger import Ledger
from app.agents.live import Live
from app.agents.tasks import version_record
from app.domain.comparison import compare_shadow
from app.domain.decisions import Kind
from app.domain.dispatch import Row, TaskResult, TaskStatus, judge
from app.domain.errors import BrokerError, NotOwner
from app.domain.features import TaskInputs, resolve
from app.domain.join import Status
from app.domain.routing import ShadowPlan, TaskPlan
from app.ports.clock import Clock
from app.ports.model_backend import ModelBackend

log = structlog.get_logger()

_SHADOWS: Final = Counter(
    "broker_shadows", "Shadows by model, version and fate: compared, failed, shed, lost", ["model", "version", "fate"]
)
_NAMESPACE: Final = UUID("0f5f2a1e-6d5c-5b0a-8d0e-3b8a6c2f9e41")


class Shadows:
    """Runs at most ``in_flight_max`` shadows of one worker at once."""

    def __init__(self, *, backend: ModelBackend, ledger: Ledger, clock: Clock, in_flight_max: int) -> None:
        self._backend = backend
        self._ledger = ledger
        self._clock = clock
        self._in_flight_max = in_flight_max
        self._running: set[asyncio.Task[None]] = set()

    def offer(self, live: Live, *, busy: bool) -> None:
        """Begin the shadows of a decision that is made; sheds them when ``busy``, or without a free slot."""
        if live.plan is None or live.fetched is None:
            return
        for task in live.plan.tasks:
            for shadow in task.shadows:
                version = shadow.version
                if version is live.tasks[task.name].version:
                    continue
                if busy or len(self._running) >= self._in_flight_max:
                    _SHADOWS.labels(version.model, version.version, "shed").inc()
                    continue
                running = asyncio.create_task(self._run(live, task, shadow))
                self._running.add(running)
                running.add_done_callback(self._running.discard)

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
        if inputs.problems:
            problem = replace(inputs.problems[0], task=task.name)
            return TaskResult(task.name, TaskStatus.SKIPPED, None, problem, 0.0, (), b"")
        row = Row(
            live.record.request_id,
            # A server that remembers what it was asked must not take this for the task itself.
            f"{task.name}/shadow",
            inputs.values,
            inputs.types,
            began_ms + shadow.version.policy.timeout,
            live.request.traceparent if live.request else None,
            live.record.execution_id,
        )
        started = self._clock.steady_ms()
        (answer,) = await self._backend.infer(shadow.version, (row,))
        return judge(task.name, shadow.version, answer, self._clock.steady_ms() - started)

    async def close(self) -> None:
        """Give up those that run: they are worth no wait."""
        for running in tuple(self._running):
            running.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
