"""The pool worker: tasks in from ``inference.tasks.<pool>``, each answered on ``inference.results``.

A model that runs here (``ModelRunner``) is Python code that may hold the interpreter or hang, so it runs in a thread of
its own, one call at a time. Rows that arrive while it is busy share the next call; an idle one starts at once. A row
whose presence breaks a shared call is found by running the rows one by one. A task ends at its deadline whatever the
model does, and one that comes after it is answered without being run. The answer goes to the partition that the task
names, where its join is; once Kafka has it, the task is acknowledged. So each task is answered at least once, and the
join ignores repetitions.
"""

import asyncio
import importlib
import math
import os
import queue
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import faust
import structlog
from faust.types import StreamT
from prometheus_client import Counter, Histogram

from app.adapters.dead_letters import dead_letter, publish_dead_letters
from app.adapters.task_codec import QueuedTask, decode_task, encode_result, encode_values
from app.agents.delivery import Intake
from app.domain.dispatch import Answer, Attempt
from app.domain.errors import Code, ConfigurationError, Problem, PublishFailed, RecordTooLarge
from app.domain.features import Value
from app.domain.requests import InboundRecord, RequestId
from app.observability import LATENCY_BUCKETS_S
from app.ports.clock import Clock
from app.ports.log import OutboundRecord, Publisher
from app.ports.model_backend import ModelRunner
from app.settings import Settings

log = structlog.get_logger()

STUCK_AFTER_S: Final = 60.0
"""A call that runs longer is taken for one that never ends: the process gives up and is started again."""
PUBLISH_TRIES_MAX: Final = 10
"""Each is already as patient as the producer; an outage that outlasts them all ends the process, and its tasks wait."""
_PUBLISH_PAUSE_S: Final = 1.0

_TASKS = Counter("broker_pool_tasks", "Tasks answered by a pool worker", ["outcome"])
_ROWS = Histogram("broker_pool_call_rows", "Rows that shared a call", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
_SECONDS = Histogram("broker_pool_call_seconds", "One call of a model in a pool worker", buckets=LATENCY_BUCKETS_S)


class RunnerStuck(Exception):
    """A model's call does not end, and a thread cannot be ended from outside: crash, and start clean."""


# --- the models -------------------------------------------------------------------------------------------------------


def load_runner(name: str) -> ModelRunner:
    """The runner that ``module:factory`` makes; modules of the working directory are found too.

    Raises:
        ConfigurationError: no such module or factory, the factory failed, or what it made has no ``predict``.
    """
    module_name, _, factory_name = name.partition(":")
    if not module_name or not factory_name:
        raise ConfigurationError(f"runner {name!r} is not of the form module:factory, as package.models:load")
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.append(directory)
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
        runner: ModelRunner = factory()
    except Exception as error:
        # Whatever foreign code raises while it loads, the operator needs it in one line.
        raise ConfigurationError(f"runner {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(getattr(runner, "predict", None)):
        raise ConfigurationError(f"runner {name!r} made a {type(runner).__name__}, which has no predict")
    return runner


def run_rows(runner: ModelRunner, model: str, version: str, rows: Sequence[Mapping[str, Value]]) -> list[Any]:
    """One call for all ``rows``, which have the same columns: each row's outputs (a dict), or the Problem that it met.

    A shared call that fails is repeated row by row, so that one row's fault is not the others'.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    title = f"{model} {version}"
    try:
        return _by_row(runner.predict(model, version, columns), len(rows))
    except LookupError as error:
        if isinstance(error, KeyError | IndexError) and len(rows) > 1:
            return [run_rows(runner, model, version, (row,))[0] for row in rows]
        return [Problem(Code.MODEL_UNAVAILABLE, f"{title} is not in this pool: {_said(error)}")] * len(rows)
    except _Unsound as error:
        problem = Problem(Code.MODEL_OUTPUT_INVALID, f"{title} answered unsoundly: {_said(error)}")
    except ValueError as error:
        problem = Problem(Code.MODEL_ERROR, f"{title} cannot use its inputs: {_said(error)}")
    except Exception as error:  # noqa: BLE001 - a runner is foreign code: whatever it raises is its answer
        problem = Problem(Code.MODEL_ERROR, f"{title} failed: {type(error).__name__}: {_said(error)}")
    if len(rows) == 1:
        return [problem]
    return [run_rows(runner, model, version, (row,))[0] for row in rows]


class _Unsound(Exception):
    """Outputs that are not one element a row by name, or that JSON cannot hold."""


def _by_row(outputs: object, rows: int) -> list[dict[str, Any]]:
    if not isinstance(outputs, Mapping):
        raise _Unsound(f"a {type(outputs).__name__} instead of outputs by name")
    answers: list[dict[str, Any]] = [{} for _ in range(rows)]
    for name, elements in outputs.items():
        plain = _plain(elements)
        if not isinstance(name, str) or not isinstance(plain, list | tuple) or len(plain) != rows:
            size = f"{len(plain)} elements" if isinstance(plain, list | tuple) else type(elements).__name__
            raise _Unsound(f"output {str(name)[:80]!r} has {size} for {rows} rows")
        for answer, element in zip(answers, plain, strict=True):
            answer[name] = _sound(name, _plain(element))
    return answers


def _plain(value: Any) -> Any:
    # NumPy's arrays and scalars, and what imitates them.
    convert = getattr(value, "tolist", None)
    return convert() if callable(convert) else value


def _sound(name: str, element: Any) -> Any:
    if isinstance(element, list | tuple):
        return [_sound(name, _plain(inner)) for inner in element]
    if isinstance(element, float) and not math.isfinite(element):
        raise _Unsound(f"output {name!r} is {element}, which JSON cannot hold")
    if element is not None and not isinstance(element, str | int | float | bool):
        raise _Unsound(f"output {name!r} is a {type(element).__name__}, which is not a value")
    return element


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# --- one call at a time -----------------------------------------------------------------------------------------------


class _Thread:
    """A daemon thread that runs one function after another: a call that hangs must not keep the process from ending."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="model-runner", daemon=True).start()

    def submit(self, call: Callable[[], Any]) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.put((call, future))
        return future

    def _run(self) -> None:
        while True:
            call, future = self._calls.get()
            result: Any = None
            failure: BaseException | None = None
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - it is raised again where the call was asked for
                failure = error
            try:
                future.get_loop().call_soon_threadsafe(_settle, future, result, failure)
            except RuntimeError:
                return  # the event loop is closed; nobody waits any more


def _settle(future: asyncio.Future[Any], result: Any, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(result)
    elif isinstance(failure, Exception):
        future.set_exception(failure)
    else:
        # Neither SystemExit nor StopIteration may travel through a future.
        future.set_exception(RuntimeError(f"the runner raised {type(failure).__name__}"))


@dataclass(slots=True)
class _Waiting:
    """A task whose model has not answered yet; ``started_ms`` is set once its call has begun."""

    task: QueuedTask
    answered: asyncio.Future[Answer]
    started_ms: int | None = None


class Runs:
    """Tasks in, answers out, one call of the runner at a time; what waits meanwhile shares the next call.

    ``rows_max`` bounds one call. How many tasks wait is bounded by whoever submits them.
    """

    def __init__(
        self, runner: ModelRunner, clock: Clock, *, instance: str, rows_max: int, stuck_after_s: float = STUCK_AFTER_S
    ) -> None:
        self._runner = runner
        self._clock = clock
        self._endpoint = f"pool/{instance}"
        self._rows_max = rows_max
        self._stuck_after_s = stuck_after_s
        self._waiting: dict[tuple[str, str, tuple[str, ...]], list[_Waiting]] = {}
        self._thread: _Thread | None = None
        self._running: asyncio.Task[None] | None = None
        self._broken: Exception | None = None

    async def answer(self, task: QueuedTask) -> Answer:
        """The model's answer, or a problem; at the latest at the task's deadline.

        Raises:
            RunnerStuck: the runner has not come back for ``stuck_after_s``.
        """
        if self._broken is not None:
            # The tasks of the call that never ended may all have passed their deadlines before this was known.
            raise self._broken
        remaining_ms = task.row.deadline_ms - self._clock.now_ms()
        if remaining_ms <= 0:
            return _unrun(f"the deadline had passed before {task.model} {task.version} was run")
        waiting = _Waiting(task, asyncio.get_running_loop().create_future())
        key = (task.model, task.version, tuple(sorted(task.row.values)))
        self._waiting.setdefault(key, []).append(waiting)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(remaining_ms / 1000):
                return await waiting.answered
        except TimeoutError:
            self._forget(key, waiting)
            if waiting.started_ms is None:
                return _unrun(f"{task.model} {task.version} was busy until the deadline")
            return self._overdue(waiting)

    def _forget(self, key: tuple[str, str, tuple[str, ...]], waiting: _Waiting) -> None:
        group = self._waiting.get(key)
        if group is not None and waiting in group:
            group.remove(waiting)
            if not group:
                del self._waiting[key]

    def _overdue(self, waiting: _Waiting) -> Answer:
        started_ms = waiting.started_ms or 0
        attempt = Attempt(self._endpoint, started_ms, float(self._clock.now_ms() - started_ms), "timeout")
        said = f"{waiting.task.model} {waiting.task.version} was still running at the deadline"
        problem = Problem(Code.MODEL_TIMEOUT, said)
        return Answer(None, problem, (attempt,), encode_values(waiting.task.row.values))

    async def _run(self) -> None:
        rows: list[_Waiting] = []
        try:
            while self._waiting:
                key = next(iter(self._waiting))
                group = self._waiting.pop(key)
                rows, rest = group[: self._rows_max], group[self._rows_max :]
                if rest:
                    # Behind the other models' rows, so that a busy model cannot starve them.
                    self._waiting[key] = rest
                now_ms = self._clock.now_ms()
                rows = [row for row in rows if row.task.row.deadline_ms > now_ms and not row.answered.done()]
                if rows:
                    await self._call(key[0], key[1], rows)
        except Exception as error:  # noqa: BLE001 - each waiter raises it; a task's handler then ends the process
            self._broken = error
            for row in (*rows, *(row for group in self._waiting.values() for row in group)):
                if not row.answered.done():
                    row.answered.set_exception(error)
            self._waiting.clear()

    async def _call(self, model: str, version: str, rows: Sequence[_Waiting]) -> None:
        started_ms, started = self._clock.now_ms(), self._clock.steady_ms()
        for row in rows:
            row.started_ms = started_ms
        if self._thread is None:
            self._thread = _Thread()
        values = [row.task.row.values for row in rows]
        call = self._thread.submit(lambda: run_rows(self._runner, model, version, values))
        try:
            async with asyncio.timeout(self._stuck_after_s):
                results: list[dict[str, Any] | Problem] = await call
        except TimeoutError:
            said = f"{model} {version} has run for {self._stuck_after_s:g} s without an end: look into the runner"
            raise RunnerStuck(said) from None
        latency_ms = self._clock.steady_ms() - started
        _ROWS.observe(len(rows))
        _SECONDS.observe(latency_ms / 1000)
        for row, result in zip(rows, results, strict=True):
            if row.answered.done():
                continue
            problem = result if isinstance(result, Problem) else None
            outputs = None if isinstance(result, Problem) else result
            attempt = Attempt(self._endpoint, started_ms, latency_ms, "ok" if problem is None else str(problem.code))
            row.answered.set_result(Answer(outputs, problem, (attempt,), encode_values(row.task.row.values)))


def _unrun(said: str) -> Answer:
    return Answer(None, Problem(Code.DEADLINE_EXCEEDED, said), (), b"")


# --- Kafka in, Kafka out ----------------------------------------------------------------------------------------------


class PoolWorker:
    """What happens to one record of the tasks topic."""

    def __init__(
        self, runs: Runs, publisher: Publisher, clock: Clock, *, results_topic: str, instance: str, group: str
    ) -> None:
        self._runs = runs
        self._publisher = publisher
        self._clock = clock
        self._results_topic = results_topic
        self._instance = instance
        self._group = group

    async def handle(self, record: InboundRecord) -> None:
        """Answer the task in ``record``, or dead-letter what is none; returns when Kafka has it.

        Raises:
            RunnerStuck, PublishFailed: the task is unanswered, and the process cannot answer it.
        """
        arrived = self._clock.steady_ms()
        try:
            task = decode_task(record.value or b"")
        except ValueError as error:
            _TASKS.labels("malformed").inc()
            log.warning("task_malformed", position=record.position, reason=str(error))
            letter = dead_letter(record, str(error), "task_malformed", self._group)
            await self._until_published(lambda: publish_dead_letters(self._publisher, (letter,)))
            return
        answer = await self._runs.answer(task)
        latency_ms = self._clock.steady_ms() - arrived
        try:
            answer = await self._send(task, answer, latency_ms)
        except PublishFailed as error:
            # Where Kafka takes the letter and not the result, it is the task that is wrong: its results partition.
            letter = dead_letter(record, f"its result cannot be published: {error}", "result_refused", self._group)
            await publish_dead_letters(self._publisher, (letter,))
            _TASKS.labels("unanswerable").inc()
            log.warning("task_unanswerable", request_id=task.row.request_id, task=task.row.task, reason=str(error))
            return
        outcome = "ok" if answer.problem is None else str(answer.problem.code)
        _TASKS.labels(outcome).inc()
        log.info(
            "task",
            request_id=task.row.request_id,
            task=task.row.task,
            model=task.model,
            version=task.version,
            outcome=outcome,
            latency_ms=round(latency_ms, 1),
            **({} if answer.problem is None else {"message": answer.problem.message}),
        )

    async def _send(self, task: QueuedTask, answer: Answer, latency_ms: float) -> Answer:
        try:
            await self._publish(self._result(task, answer, latency_ms))
        except (ValueError, RecordTooLarge) as error:
            problem = Problem(
                Code.MODEL_OUTPUT_INVALID, f"{task.model} {task.version}: its answer cannot be sent: {_said(error)}"
            )
            answer = Answer(None, problem, answer.attempts, b"")
            await self._publish(self._result(task, answer, latency_ms))
        return answer

    def _result(self, task: QueuedTask, answer: Answer, latency_ms: float) -> OutboundRecord:
        request_id: RequestId = task.row.request_id
        value = encode_result(
            request_id,
            task.row.task,
            answer,
            latency_ms=latency_ms,
            instance=self._instance,
            execution_id=task.row.execution_id,
            version=task.version,
        )
        return OutboundRecord(self._results_topic, value, request_id.encode(), task.results_partition)

    async def _publish(self, record: OutboundRecord) -> None:
        await self._until_published(lambda: self._publisher.publish((record,)))

    async def _until_published(self, publish: Callable[[], Awaitable[object]]) -> None:
        for tries_left in reversed(range(PUBLISH_TRIES_MAX)):
            try:
                await publish()
            except PublishFailed as error:
                if not tries_left:
                    raise
                log.warning("publish_failed", reason=str(error), tries_left=tries_left)
                await asyncio.sleep(_PUBLISH_PAUSE_S)
            else:
                return


def attach(
    app: faust.App,
    *,
    topic: str,
    results_topic: str,
    runner: ModelRunner,
    publisher: Publisher,
    clock: Clock,
    settings: Settings,
    instance: str,
    group: str,
) -> Intake:
    """Answer the tasks of ``topic`` on ``results_topic``; the intake says what is in flight, and drains."""
    rows_max = settings.tasks_in_flight_max
    worker = PoolWorker(
        Runs(runner, clock, instance=instance, rows_max=rows_max),
        publisher,
        clock,
        results_topic=results_topic,
        instance=instance,
        group=group,
    )
    intake = Intake(app, in_flight_max=rows_max)

    async def pool(stream: StreamT[Any]) -> None:
        await intake.each(cast(faust.Stream[bytes], stream), worker.handle)

    channel = app.topic(topic, key_type=bytes, value_type=bytes, allow_empty=True)
    app.agent(channel, name="pool")(pool)
    return intake
