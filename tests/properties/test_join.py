"""The join under any order, loss and repetition of what comes to it."""

from dataclasses import replace
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from app.domain.dispatch import TaskResult, TaskStatus
from app.domain.errors import Code, Problem
from app.domain.join import Decide, Ignore, Join, JoinTask, Outcome, Status, Wait

DEADLINE_MS = 1_000
NAMES = ("a", "b", "c", "d")
PROBLEMS = {
    TaskStatus.OK: None,
    TaskStatus.ERROR: Code.MODEL_ERROR,
    TaskStatus.TIMEOUT: Code.MODEL_TIMEOUT,
    TaskStatus.SKIPPED: Code.FEATURE_MISSING,
}


def result(task: str, status: TaskStatus, output: float = 0.0) -> TaskResult:
    """A task's result with what belongs to its status."""
    code = PROBLEMS[status]
    problem = None if code is None else Problem(code, "why", task)
    return TaskResult(task, status, {"y": output} if problem is None else None, problem, 1.0, (), b"")


NEEDS: tuple[Literal["required", "optional", "default"], ...] = ("required", "optional", "default")
needs = st.sampled_from(NEEDS)
joins = st.lists(needs, min_size=1, max_size=4).map(
    lambda kinds: Join(
        tuple(
            JoinTask(name, need, {"y": -1.0} if need == "default" else None)
            for name, need in zip(NAMES, kinds, strict=False)
        ),
        DEADLINE_MS,
        {},
    )
)
results = st.builds(result, st.sampled_from((*NAMES, "stranger")), st.sampled_from(list(PROBLEMS)), st.floats(0, 1))
inputs = st.lists(st.one_of(results, st.integers(0, 2 * DEADLINE_MS)), max_size=20)


def play(join: Join, events: list[TaskResult | int]) -> tuple[Join, list[Outcome]]:
    """What a join decides when results and timers (times) come in this order."""
    outcomes = []
    for event in events:
        join, effect = join.on_deadline(event) if isinstance(event, int) else join.on_result(event)
        if isinstance(effect, Decide):
            outcomes.append(effect.outcome)
    return join, outcomes


@given(joins, st.lists(st.sampled_from(NAMES), unique=True), st.sampled_from([None, 1, 2, 3]), st.data())
def test_a_referral_stands_in_nobodys_way(
    join: Join, referred: list[str], wanted: int | None, data: st.DataObject
) -> None:
    """In any order: partial with the others' answers, never failed for the referred ones, nor completed by them."""
    join = replace(join, wanted=None if wanted is None else min(wanted, len(join.tasks)))
    names = [task.name for task in join.tasks]
    events: list[TaskResult | int] = [
        replace(result(name, TaskStatus.SKIPPED), referred=True) if name in referred else result(name, TaskStatus.OK)
        for name in data.draw(st.permutations(names))
    ]
    _, outcomes = play(join, events)
    (outcome,) = outcomes
    answers = [name for name in names if name not in referred]
    enough = len(answers) == len(names) if join.wanted is None else len(answers) >= join.wanted
    assert outcome.status is (Status.COMPLETED if enough else Status.PARTIAL)
    if not enough:
        # A fixed answer is no person's either.
        assert {name for name, each in outcome.results.items() if each.status is TaskStatus.SKIPPED} == (
            set(names) - set(answers)
        )


@given(joins, inputs)
def test_exactly_one_decision(join: Join, events: list[TaskResult | int]) -> None:
    """Whatever comes, however often: at most one decision; and once the deadline's timer has come, exactly one."""
    decided, outcomes = play(join, [*events, DEADLINE_MS])
    assert len(outcomes) == 1
    assert decided.decided
    assert list(outcomes[0].results) == [task.name for task in join.tasks]


@given(joins, inputs)
def test_the_first_result_of_a_task_counts(join: Join, events: list[TaskResult | int]) -> None:
    """Of a task's results the first before the decision is in the outcome; without one it timed out."""
    first: dict[str, TaskResult] = {}
    _, (outcome,) = play(join, [*events, DEADLINE_MS])
    for event in events:
        if isinstance(event, int):
            if event >= DEADLINE_MS:
                break
        else:
            first.setdefault(event.task, event)
            if all(task.name in first for task in join.tasks):
                break
    for task in join.tasks:
        found = outcome.results[task.name]
        expected = first.get(task.name)
        if expected is None:
            assert found.problem is not None
            assert found.problem.code is Code.DEADLINE_EXCEEDED
        elif expected.status is TaskStatus.OK or task.need != "default":
            assert found == expected
        else:
            assert found == replace(expected, status=TaskStatus.DEFAULTED, output=task.default)


@given(joins, inputs)
def test_the_status_follows_from_the_results(join: Join, events: list[TaskResult | int]) -> None:
    """Completed: all well. Partial: only what is not required failed. Expired: required ones were late, no more."""
    _, (outcome,) = play(join, [*events, DEADLINE_MS])
    bad = [task for task in join.tasks if outcome.results[task.name].status is not TaskStatus.OK]
    codes = {
        problem.code for task in bad if task.need == "required" and (problem := outcome.results[task.name].problem)
    }
    if codes:
        expected = Status.EXPIRED if codes == {Code.DEADLINE_EXCEEDED} else Status.FAILED
    else:
        expected = Status.PARTIAL if bad else Status.COMPLETED
    assert outcome.status is expected
    assert len(outcome.problems) == len(bad)


@given(joins, st.permutations(NAMES), st.data())
def test_without_loss_the_order_does_not_matter(join: Join, order: list[str], data: st.DataObject) -> None:
    """All results, in any order: the same outcome."""
    came = {task.name: data.draw(st.sampled_from(list(PROBLEMS))) for task in join.tasks}
    _, (straight,) = play(join, [result(name, status) for name, status in came.items()])
    _, (shuffled,) = play(join, [result(name, came[name]) for name in order if name in came])
    assert straight == shuffled


def test_what_it_says_to_each() -> None:
    """Wait, or the reason why it changes nothing."""
    join = Join((JoinTask("a", "required"), JoinTask("b", "optional")), DEADLINE_MS, {})
    assert join.on_deadline(DEADLINE_MS - 1) == (join, Ignore("early"))
    assert join.on_result(result("x", TaskStatus.OK)) == (join, Ignore("unknown_task"))
    waiting, effect = join.on_result(result("a", TaskStatus.OK))
    assert effect == Wait()
    assert waiting.on_result(result("a", TaskStatus.ERROR)) == (waiting, Ignore("repeated"))
    decided, _ = waiting.on_result(result("b", TaskStatus.OK))
    assert decided.on_result(result("b", TaskStatus.OK)) == (decided, Ignore("late"))
    assert decided.on_deadline(DEADLINE_MS) == (decided, Ignore("late"))
