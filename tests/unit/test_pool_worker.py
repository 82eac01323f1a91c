"""The pool worker without Kafka: one call at a time, shared calls, deadlines, faults of the model and of the log."""

import asyncio
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.adapters.task_codec import QueuedResult, QueuedTask, decode_result, decode_task, encode_task
from app.agents.pool import PoolWorker, RunnerStuck, Runs, load_runner, run_rows
from app.domain.dispatch import Answer
from app.domain.errors import Code, ConfigurationError, Problem, PublishFailed, RecordTooLarge
from app.domain.features import Value
from app.domain.requests import InboundRecord
from app.ports.log import OutboundRecord
from tests.support.models import MovableClock, row_of, version_of


class Doubler:
    """Answers `y`, twice `x`; a gate may hold it, and some inputs break it."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.gate = gate
        self.entered = threading.Event()
        self.calls: list[list[Value]] = []
        self.threads: set[str] = set()

    def predict(self, model: str, version: str, columns: Mapping[str, Sequence[Value]]) -> Mapping[str, Sequence[Any]]:
        """Twice `x`; ValueError for text, RuntimeError for 13."""
        self.threads.add(threading.current_thread().name)
        self.calls.append(list(columns["x"]))
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(10)
        if model != "m":
            raise LookupError(f"{model} is not here")
        if 13 in columns["x"]:
            raise RuntimeError("unlucky")
        if any(isinstance(value, str) for value in columns["x"]):
            raise ValueError("x is text")
        return {"y": [2 * value for value in columns["x"]]}  # type: ignore[operator]  # x is a number here


class Returns:
    """Answers the same whatever it is given."""

    def __init__(self, outputs: Any) -> None:
        self._outputs = outputs

    def predict(self, model: str, version: str, columns: Mapping[str, Sequence[Value]]) -> Any:
        """The outputs."""
        return self._outputs


class Log:
    """A publisher that keeps what it is given, and fails as told."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.records: list[OutboundRecord] = []

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """Keep ``records``, or raise the next failure."""
        if self.failures:
            raise self.failures.pop(0)
        self.records.extend(records)
        return list(range(len(records)))

    def results(self) -> list[QueuedResult]:
        """What was published, read back."""
        return [decode_result(record.value or b"") for record in self.records]


def task_of(x: int | str, *, within_ms: int = 10_000, model: str = "m", partition: int = 5) -> QueuedTask:
    """A task with input `x`, as a worker reads it."""
    row = row_of({"x": x}, within_ms=within_ms, request_id=f"r-{x!s}")
    return decode_task(encode_task(row, version_of(model=model), partition, 0))


def record_of(value: bytes | None) -> InboundRecord:
    """A record of the tasks topic."""
    return InboundRecord("inference.tasks.default", 2, 7, 0, b"r", value, ())


def runs_of(runner: Any, **changes: Any) -> Runs:
    """Runs of ``runner``."""
    return Runs(runner, changes.pop("clock", MovableClock()), instance="p1", **{"rows_max": 8, **changes})


def worker_of(runner: Any, log: Log) -> PoolWorker:
    """A worker over ``runner`` that publishes to ``log``."""
    return PoolWorker(
        runs_of(runner), log, MovableClock(), results_topic="inference.results", instance="p1", group="pool"
    )


def encoded(x: int | str, **changes: Any) -> bytes:
    """A task's bytes."""
    task = task_of(x, **changes)
    return encode_task(task.row, version_of(model=task.model), task.results_partition, 0)


def code_of(answer: Answer) -> Code | None:
    """The problem's code."""
    return None if answer.problem is None else answer.problem.code


async def entered(runner: Doubler) -> None:
    """Return once the runner is in its call."""
    assert await asyncio.to_thread(runner.entered.wait, 10)


async def test_rows_that_arrive_while_busy_share_a_call() -> None:
    """An idle model starts at once, alone; what arrives meanwhile is one call, at most rows_max wide."""
    gate = threading.Event()
    runner = Doubler(gate)
    runs = runs_of(runner)
    first = asyncio.create_task(runs.answer(task_of(0)))
    await entered(runner)
    others = [asyncio.create_task(runs.answer(task_of(x))) for x in range(1, 12)]
    await asyncio.sleep(0)
    gate.set()
    answers = await asyncio.wait_for(asyncio.gather(first, *others), 10)
    assert [answer.outputs for answer in answers] == [{"y": 2 * x} for x in range(12)]
    assert runner.calls == [[0], list(range(1, 9)), [9, 10, 11]]
    assert runner.threads == {"model-runner"}
    assert [attempt.endpoint for attempt in answers[0].attempts] == ["pool/p1"]
    assert answers[3].sent == b'{"x":3}'


async def test_one_rows_fault_is_its_own() -> None:
    """A row that breaks a shared call fails alone; the rows beside it are answered."""
    gate = threading.Event()
    runner = Doubler(gate)
    runs = runs_of(runner)
    tasks = [asyncio.create_task(runs.answer(task_of(x))) for x in (0, 1, 13, "text", 4)]
    gate.set()
    answers = await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert [code_of(answer) for answer in answers] == [None, None, Code.MODEL_ERROR, Code.MODEL_ERROR, None]
    assert "RuntimeError: unlucky" in str(answers[2].problem)
    assert "x is text" in str(answers[3].problem)


async def test_expired_is_never_run() -> None:
    """A task past its deadline, on arrival or once its turn comes, is answered and not run."""
    gate = threading.Event()
    runner = Doubler(gate)
    runs = runs_of(runner)
    assert code_of(await runs.answer(task_of(1, within_ms=-1))) is Code.DEADLINE_EXCEEDED
    first = asyncio.create_task(runs.answer(task_of(0)))
    await entered(runner)
    waited = await asyncio.wait_for(runs.answer(task_of(2, within_ms=40)), 10)
    assert code_of(waited) is Code.DEADLINE_EXCEEDED
    assert waited.attempts == ()
    gate.set()
    assert (await asyncio.wait_for(first, 10)).outputs == {"y": 0}
    assert runner.calls == [[0]]


async def test_a_running_task_ends_at_its_deadline() -> None:
    """A model that is still running at the deadline is a model timeout; the next task is run when it comes back."""
    gate = threading.Event()
    runner = Doubler(gate)
    runs = runs_of(runner)
    late = await asyncio.wait_for(runs.answer(task_of(1, within_ms=60)), 10)
    assert code_of(late) is Code.MODEL_TIMEOUT
    assert [attempt.outcome for attempt in late.attempts] == ["timeout"]
    after = asyncio.create_task(runs.answer(task_of(2)))
    gate.set()
    assert (await asyncio.wait_for(after, 10)).outputs == {"y": 4}


async def test_a_stuck_model_is_given_up() -> None:
    """A call without an end is raised, to every task that waits for it, so that the process starts anew."""
    gate = threading.Event()
    runs = runs_of(Doubler(gate), stuck_after_s=0.05)
    tasks = [asyncio.create_task(runs.answer(task_of(x))) for x in (1, 2)]
    answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    gate.set()
    assert [type(answer) for answer in answers] == [RunnerStuck] * 2


async def test_a_stuck_model_is_given_up_though_its_tasks_have_ended() -> None:
    """Tasks end at their deadline; that the model never came back is raised to the next one all the same."""
    gate = threading.Event()
    runs = runs_of(Doubler(gate), stuck_after_s=0.2)
    assert code_of(await asyncio.wait_for(runs.answer(task_of(1, within_ms=50)), 10)) is Code.MODEL_TIMEOUT
    with pytest.raises(RunnerStuck):
        await asyncio.wait_for(runs.answer(task_of(2)), 10)
    with pytest.raises(RunnerStuck):
        await runs.answer(task_of(3))
    gate.set()


@pytest.mark.parametrize(
    "outputs",
    [
        None,
        [1, 2],
        {"y": []},
        {"y": [1, 2, 3]},
        {"y": 5},
        {"y": "ab"},
        {"y": [1.0, float("nan")]},
        {"y": [1, object()]},
        {"y": [{"a": 1}, 2]},
        {3: [1, 2]},
        {"y": np.array([[1.0, np.inf], [0.0, 0.0]])},
    ],
)
def test_unsound_outputs(outputs: Any) -> None:
    """Anything but one JSON element (or list of them) a row by name is an unsound output."""
    answers = run_rows(Returns(outputs), "m", "1", [{"x": 1}, {"x": 2}])
    assert all(isinstance(answer, Problem) and answer.code is Code.MODEL_OUTPUT_INVALID for answer in answers)


def test_arrays_become_plain_values() -> None:
    """NumPy's arrays and scalars are answered as numbers and lists."""
    outputs = {"y": np.array([1.5, 2.5]), "p": np.array([[0.1, 0.9], [0.2, 0.8]]), "s": [np.int64(1), np.float32(2)]}
    assert run_rows(Returns(outputs), "m", "1", [{"x": 1}, {"x": 2}]) == [
        {"y": 1.5, "p": [0.1, 0.9], "s": 1},
        {"y": 2.5, "p": [0.2, 0.8], "s": 2.0},
    ]


async def test_a_task_is_answered_where_its_join_is() -> None:
    """The result goes to the task's results partition under the request's id."""
    log = Log()
    await worker_of(Doubler(), log).handle(record_of(encoded(21)))
    (record,) = log.records
    assert (record.topic, record.partition, record.key) == ("inference.results", 5, b"r-21")
    (result,) = log.results()
    assert (result.answer.outputs, result.task, result.instance) == ({"y": 42}, "t", "p1")


@pytest.mark.parametrize(
    ("task", "code"),
    [
        # Made when the test runs: a deadline counted from the collection may be over by then.
        (lambda: encoded("text"), Code.MODEL_ERROR),
        (lambda: encoded(13), Code.MODEL_ERROR),
        (lambda: encoded(1, model="other"), Code.MODEL_UNAVAILABLE),
        (lambda: encoded(1, within_ms=-1), Code.DEADLINE_EXCEEDED),
    ],
)
async def test_each_failure_is_a_result(task: Callable[[], bytes], code: Code) -> None:
    """Inputs the model cannot use, its own failure, a model that is not here, an expired task: each is answered."""
    log = Log()
    await worker_of(Doubler(), log).handle(record_of(task()))
    assert [code_of(result.answer) for result in log.results()] == [code]


@pytest.mark.parametrize("value", [None, b"", b"noise", encoded(1)[:-3]])
async def test_malformed_tasks_are_dead_lettered(value: bytes | None) -> None:
    """What is no task goes to the dead-letter topic as it came, and the worker goes on."""
    log = Log()
    worker = worker_of(Doubler(), log)
    await worker.handle(record_of(value))
    await worker.handle(record_of(encoded(1)))
    letter, result = log.records
    assert (letter.topic, letter.partition, letter.value) == ("inference.tasks.default-dlt", 2, value)
    assert result.topic == "inference.results"


async def test_a_failed_publish_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kafka away: the answer is published once it is back, before the task counts as handled."""
    monkeypatch.setattr("app.agents.pool._PUBLISH_PAUSE_S", 0.0)
    log = Log(PublishFailed("away"), PublishFailed("away"))
    await worker_of(Doubler(), log).handle(record_of(encoded(1)))
    assert [result.answer.outputs for result in log.results()] == [{"y": 2}]


async def test_a_publish_that_never_succeeds_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage that outlasts the tries is raised, so the task stays unacknowledged."""
    monkeypatch.setattr("app.agents.pool._PUBLISH_PAUSE_S", 0.0)
    with pytest.raises(PublishFailed):
        await worker_of(Doubler(), Log(*[PublishFailed("away")] * 99)).handle(record_of(encoded(1)))


async def test_a_result_that_only_its_own_task_prevents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Kafka takes a dead letter and not the result, the task is dead-lettered and the worker goes on."""
    monkeypatch.setattr("app.agents.pool._PUBLISH_PAUSE_S", 0.0)
    monkeypatch.setattr("app.agents.pool.PUBLISH_TRIES_MAX", 3)
    log = Log(*[PublishFailed("no such partition")] * 3)
    await worker_of(Doubler(), log).handle(record_of(encoded(1)))
    assert [record.topic for record in log.records] == ["inference.tasks.default-dlt"]


async def test_an_answer_that_is_too_large() -> None:
    """A result beyond Kafka's limit becomes a problem that says so."""
    log = Log(RecordTooLarge("too large"))
    await worker_of(Doubler(), log).handle(record_of(encoded(1)))
    assert [code_of(result.answer) for result in log.results()] == [Code.MODEL_OUTPUT_INVALID]


def test_a_runner_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factory in a module of the working directory makes the runner."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("my_runner_of_this_test.py").write_text(
        "class R:\n    def predict(self, m, v, c):\n        return {}\ndef load():\n    return R()\n"
        "def broken():\n    raise OSError('no file')\ndef nothing():\n    return 3\n"
    )
    assert load_runner("my_runner_of_this_test:load").predict("m", "1", {}) == {}
    for name, said in (
        ("my_runner_of_this_test", "module:factory"),
        (":load", "module:factory"),
        ("no_such_module_here:load", "No module named"),
        ("my_runner_of_this_test:absent", "absent"),
        ("my_runner_of_this_test:broken", "OSError: no file"),
        ("my_runner_of_this_test:nothing", "has no predict"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            load_runner(name)
