"""Properties of rollouts' status over any history of applies, moves and rollbacks."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.documents import Document, Route
from app.domain.registry import canonical, compile_revision, load_revision, rollout_digest
from app.domain.rollout_status import restored, statuses_of, with_status, without_status
from app.domain.route_documents import RouteStatus
from tests.support.registry_documents import changed, model_version, revision, sound, task


def _files(rollout: dict[str, Any] | None, deadline: str, champion: str = "") -> tuple[Document, ...]:
    """What somebody wrote: the sound documents, with a rollout or none, from version 1 or what `champion` names."""
    select = {"alias": "champion"} if champion else {"version": "1"}
    selection = task() if rollout is None else task(select=select, rollout=rollout)
    documents = changed([*sound(), model_version("3")], "credit", "spec.rules.0.tasks.0", selection)
    if champion:
        documents = changed(documents, "credit-pd", "spec.aliases.champion", champion)
    return revision(changed(documents, "credit", "spec.deadline", deadline)).documents


FILES = [
    _files(None, "1s"),
    _files({"to": "2", "steps": [5, 50, 100], "every": "10m"}, "1s"),
    _files({"to": "2", "steps": [5, 50, 100], "every": "10m"}, "2s"),
    _files({"to": "2", "steps": [10, 50, 100], "every": "10m"}, "1s"),
    _files({"to": "2", "steps": [5, 50, 100], "every": "10m"}, "1s", "1"),
    _files({"to": "2", "steps": [5, 50, 100], "every": "10m"}, "1s", "3"),
]

applies = st.tuples(st.just("apply"), st.integers(0, len(FILES) - 1))
moves = st.tuples(
    st.just("move"), st.tuples(st.sampled_from(["progressing", "paused", "promoted", "aborted"]), st.integers(0, 2))
)
rollbacks = st.tuples(st.just("rollback"), st.integers(0, 20))


def moved(documents: tuple[Document, ...], state: str, step: int, now_ms: int) -> tuple[Document, ...]:
    """The documents with their rollout, if there is one, moved as its worker does."""
    changes = {"state": state, "step": step, "since": now_ms}
    return tuple(
        each.model_copy(
            update={
                "status": RouteStatus(
                    rollouts={key: one.model_copy(update=changes) for key, one in each.status.rollouts.items()}
                )
            }
        )
        if isinstance(each, Route) and each.status is not None
        else each
        for each in documents
    )


def _check_bases(head: tuple[Document, ...], after: tuple[Document, ...], now_ms: int) -> None:
    """A rollout that is beyond its first step, or judged by what was counted before, leads from where it led then."""
    if not head:
        return
    arms, arms_then = _arms(after), _arms(head)
    for name, status in statuses_of(after).items():
        then = statuses_of(head).get(name)
        if then is None or status.state in ("promoted", "aborted"):
            continue
        assert arms[name] == arms_then[name] or (status.step == 0 and status.since >= now_ms)


def _arms(documents: tuple[Document, ...]) -> dict[tuple[str, str], tuple[str, ...]]:
    """The versions that each rollout draws from: from where it leads, and where to."""
    return {
        (route.name, f"{rule.spec.name}/{each.spec.name}"): tuple(version for version, _ in each.arms)
        for route in compile_revision(documents).routes
        for rule in route.rules
        for each in rule.tasks
        if each.spec.rollout is not None
    }


@given(st.lists(applies | moves | rollbacks, min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_any_history_is_sound(steps: list[tuple[str, Any]]) -> None:
    """Each revision loads; the files it was made of are nothing new to it; every status is of a rollout that it has.

    Going back never leaves a rollout progressing, and never brings an aborted one back.
    """
    history: list[tuple[Document, ...]] = [()]
    for now_ms, (what, how) in enumerate(steps, 1):
        head = history[-1]
        if what == "apply":
            after = with_status(FILES[how], head, now_ms)
            _check_bases(head, after, now_ms)
        elif what == "move":
            state, step = how
            after = moved(head, state, step, now_ms)
        else:
            after = restored(history[how % len(history)], head, now_ms, reason="rolled back")
            assert all(each.state != "progressing" for each in statuses_of(after).values())
            for name, status in statuses_of(head).items():
                same = statuses_of(after).get(name)
                if status.state == "aborted" and same is not None and same.of == status.of:
                    assert same == status
        if not after:
            # Nothing was applied yet, and nothing would be published.
            continue
        whole = compile_revision(after)
        assert statuses_of(load_revision(whole.id, canonical(after)).documents) == statuses_of(after)
        again = with_status(without_status(after), after, now_ms + 1_000)
        assert compile_revision(again).id == whole.id
        digests = {
            (route.name, f"{rule.spec.name}/{each.spec.name}"): rollout_digest(rule.spec.name, each.spec)
            for route in whole.routes
            for rule in route.rules
            for each in rule.tasks
            if each.spec.rollout is not None
        }
        assert {name: status.of for name, status in statuses_of(after).items()} == digests
        history.append(after)
