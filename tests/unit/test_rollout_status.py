"""How far a rollout is follows it from revision to revision; nobody writes it by hand, and nothing resumes unasked."""

from typing import Any

import pytest

from app.domain.documents import Document, Route
from app.domain.errors import DocumentsRefused, Fault
from app.domain.registry import canonical, compile_revision, load_revision, restated
from app.domain.rollout_status import restored, status_faults, statuses_of, with_status
from app.domain.route_documents import RolloutStatus
from tests.support.registry_documents import changed, model_version, revision, route, sound, sources, task

THERE = ("credit", "default/pd")


def rolling(**rollout: Any) -> list[dict[str, Any]]:
    """The sound documents with a rollout of version 2."""
    whole = {"to": "2", "steps": [5, 50, 100], "every": "10m", **rollout}
    return changed(sound(), "credit", "spec.rules.0.tasks.0", task(select={"version": "1"}, rollout=whole))


def documents_of(documents: list[dict[str, Any]]) -> tuple[Document, ...]:
    return revision(documents).documents


def at(status: RolloutStatus, documents: tuple[Document, ...]) -> tuple[Document, ...]:
    """``documents`` with the status of their one rollout set."""
    return tuple(
        each.model_copy(update={"status": each.status.model_copy(update={"rollouts": {"default/pd": status}})})
        if isinstance(each, Route) and each.status is not None
        else each
        for each in documents
    )


def moved(documents: tuple[Document, ...], **changes: Any) -> tuple[Document, ...]:
    return at(statuses_of(documents)[THERE].model_copy(update=changes), documents)


def test_a_new_rollout_begins() -> None:
    """It is at its first step since it was published, and the revision loads as it was published."""
    begun = with_status(documents_of(rolling()), (), 1_000)
    status = statuses_of(begun)[THERE]
    assert (status.state, status.step, status.since, status.reason) == ("progressing", 0, 1_000, None)
    whole = compile_revision(begun)
    assert whole.routes[0].rules[0].tasks[0].arms == (("1", 95), ("2", 5))
    loaded = load_revision(whole.id, canonical(whole.documents))
    assert statuses_of(loaded.documents) == statuses_of(begun)


@pytest.mark.parametrize("state", ["progressing", "paused", "promoted", "aborted"])
def test_another_status_makes_the_revision_that_its_documents_make(state: str) -> None:
    """Whatever was compiled before is as it would be compiled anew; what only the status bears on is of the new one."""
    written = compile_revision(documents_of([*rolling(), route("other", "/other")]))
    begun = with_status(written.documents, (), 1_000)
    after = moved(begun, state=state, step=1)
    for before, documents in ((written, begun), (compile_revision(begun), after), (compile_revision(after), begun)):
        made = restated(before, documents)
        assert made == compile_revision(documents)
        by_path = [made.paths.match(path) for path in ("/credit/card", "/other")]
        assert by_path == [(made.routes[0], ("card",)), (made.routes[1], ())]


def test_what_is_more_than_a_status_is_compiled_anew() -> None:
    """Another document, one more or one less: all is checked."""
    begun = compile_revision(with_status(documents_of(rolling()), (), 1_000))
    slower = with_status(documents_of(changed(rolling(), "credit", "spec.deadline", "1s")), begun.documents, 2_000)
    assert restated(begun, slower) == compile_revision(slower)
    fewer = tuple(each for each in begun.documents if each.metadata.name != "credit-pd-2")
    with pytest.raises(DocumentsRefused, match="there is no version 2 of credit-pd"):
        restated(begun, fewer)
    renamed = tuple(
        each.model_copy(update={"metadata": each.metadata.model_copy(update={"name": "credit-pd-1"})})
        if each.metadata.name == "credit-pd-2"
        else each
        for each in begun.documents
    )
    with pytest.raises(DocumentsRefused, match="credit-pd-1"):
        restated(begun, renamed)


def test_a_status_that_is_wrong_is_refused() -> None:
    """A step that there is not, with the words of a revision that is compiled anew."""
    begun = compile_revision(with_status(documents_of(rolling()), (), 1_000))
    wrong = moved(begun.documents, step=9)
    with pytest.raises(DocumentsRefused) as refused:
        restated(begun, wrong)
    with pytest.raises(DocumentsRefused) as compiled:
        compile_revision(wrong)
    assert refused.value.faults == compiled.value.faults


def test_the_same_rollout_goes_on() -> None:
    """However far it is, applying the same files again is the same revision; so is a change elsewhere to it."""
    begun = with_status(documents_of(rolling()), (), 1_000)
    for state in ("progressing", "paused", "promoted", "aborted"):
        head = moved(begun, state=state, step=1, since=2_000)
        again = with_status(documents_of(rolling()), head, 3_000)
        assert compile_revision(again).id == compile_revision(head).id
        elsewhere = documents_of(changed(rolling(), "credit", "spec.deadline", "1s"))
        assert statuses_of(with_status(elsewhere, head, 3_000)) == statuses_of(head)


def by_alias(champion: str) -> tuple[Document, ...]:
    """A rollout of version 2 from what `champion` names, beside a third version."""
    documents = changed(rolling(), "credit", "spec.rules.0.tasks.0.select", {"alias": "champion"})
    documents = changed(documents, "credit-pd", "spec.aliases", {"champion": champion})
    return documents_of([*documents, model_version("3")])


def test_a_rollout_whose_alias_moves_begins_anew() -> None:
    """What was found of its steps was found beside another version; paused, it waits at its first step."""
    begun = with_status(by_alias("1"), (), 1_000)
    for state in ("progressing", "paused"):
        head = moved(begun, state=state, step=1, since=2_000)
        after = with_status(by_alias("3"), head, 3_000)
        status = statuses_of(after)[THERE]
        assert (status.state, status.step, status.since) == (state, 0, 3_000)
        assert status.reason == "begun anew: it leads from version 3, and no longer from 1"
        assert compile_revision(after).routes[0].rules[0].tasks[0].arms == (("3", 95), ("2", 5))
        # The same files again are the same revision; and the alias of before is another change.
        assert compile_revision(with_status(by_alias("3"), after, 4_000)).id == compile_revision(after).id
        assert statuses_of(with_status(by_alias("1"), after, 4_000))[THERE].since == 4_000


def test_a_clock_that_goes_back_gives_no_two_steps_one_name() -> None:
    """A step is named by when it began, so one that begins anew begins later than the one before."""
    head = with_status(by_alias("1"), (), 5_000)
    assert statuses_of(with_status(by_alias("3"), head, 4_000))[THERE].since == 5_001


def test_what_has_ended_stays_ended_when_its_alias_moves() -> None:
    """An aborted version is no better beside another one, and a promoted one serves all already."""
    begun = with_status(by_alias("1"), (), 1_000)
    for state in ("promoted", "aborted"):
        head = moved(begun, state=state, step=2, since=2_000)
        assert statuses_of(with_status(by_alias("3"), head, 3_000)) == statuses_of(head)


def test_a_changed_rollout_begins_anew() -> None:
    """Evidence for other steps, or another version, says nothing about these."""
    head = moved(with_status(documents_of(rolling()), (), 1_000), step=2)
    status = statuses_of(with_status(documents_of(rolling(steps=[50, 100])), head, 3_000))[THERE]
    assert (status.state, status.step, status.since) == ("progressing", 0, 3_000)


def test_a_rollout_that_went_is_forgotten() -> None:
    """Documents without one have no status, whoever wrote one into them."""
    head = with_status(documents_of(rolling()), (), 1_000)
    assert statuses_of(with_status(documents_of(sound()), head, 2_000)) == {}
    bare = [
        each.model_copy(update={"spec": other.spec}) for each, other in zip(head, documents_of(sound()), strict=True)
    ]
    assert compile_revision(with_status(bare, head, 2_000)).id == revision().id


def test_documents_without_rollouts_are_left_as_they_are() -> None:
    """The very same objects come back: nothing has to be compiled again."""
    documents = documents_of(sound())
    assert all(one is other for one, other in zip(with_status(documents, (), 1), documents, strict=True))


def test_going_back_pauses_what_was_under_way() -> None:
    """It keeps the step it had then, and waits for an operator; going back once more changes nothing."""
    begun = with_status(documents_of(rolling()), (), 1_000)
    target, head = moved(begun, step=1, since=2_000), moved(begun, step=2, since=3_000)
    back = restored(target, head, 4_000, reason="rolled back")
    status = statuses_of(back)[THERE]
    assert (status.state, status.step, status.since, status.reason) == ("paused", 1, 4_000, "rolled back")
    assert statuses_of(restored(target, back, 5_000, reason="rolled back")) == statuses_of(back)
    assert statuses_of(restored(target, documents_of(sound()), 4_000, reason="rolled back")) == statuses_of(back)


def test_going_back_keeps_what_had_ended() -> None:
    """A promotion or an operator's pause of then is part of what is gone back to."""
    begun = with_status(documents_of(rolling()), (), 1_000)
    for state in ("promoted", "aborted", "paused"):
        target = moved(begun, state=state, step=2, reason="then")
        assert statuses_of(restored(target, begun, 4_000, reason="rolled back")) == statuses_of(target)


def test_going_back_does_not_revive_what_was_aborted_since() -> None:
    """Its version was found to be bad; of another rollout that says nothing."""
    begun = with_status(documents_of(rolling()), (), 1_000)
    head = moved(begun, state="aborted", step=2, reason="errorRate 0.4 of 0.02")
    assert statuses_of(restored(moved(begun, step=1), head, 4_000, reason="rolled back")) == statuses_of(head)
    other = with_status(documents_of(rolling(steps=[1, 100])), (), 1_000)
    assert statuses_of(restored(other, head, 4_000, reason="rolled back"))[THERE].state == "paused"


def test_a_status_of_another_rollout_is_not_restored() -> None:
    """A status that is of no rollout that there is never counted, and is not made to."""
    begun = with_status(documents_of(rolling()), (), 1_000)
    assert statuses_of(restored(moved(begun, of="0" * 16), (), 4_000, reason="rolled back")) == {}


def test_nobody_writes_a_status() -> None:
    """It is refused by file, document and field, in any shape."""
    documents = sound()
    documents[4]["status"] = {"rollouts": {}}
    assert status_faults(sources(documents)) == (
        Fault("4.yaml:1", "Route credit", "status", "is kept by the broker; remove it"),
    )
    assert status_faults(sources([{"kind": "Route", "status": None}]))[0].document == "Route"
    assert status_faults(sources(sound())) == ()
