"""Differences between revisions, field by field, with items of lists told apart by name."""

import copy
from typing import Any

from app.domain.registry_diff import Change, differences
from tests.support.registry_documents import changed, model_version, revision, sound, task


def between(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> tuple[Change, ...]:
    return differences(revision(before).documents, revision(after).documents)


def test_equal_revisions_do_not_differ() -> None:
    """The order of documents, and how a duration is written, are no difference."""
    other = changed(sound()[::-1], "credit", "spec.deadline", "0.25s")
    assert between(sound(), other) == ()


def test_a_changed_field_is_named() -> None:
    """An arm's weight is found by route, rule, task and version."""
    after = changed(sound(), "credit", "spec.rules.0.tasks.0.select.split.0.weight", 80)
    assert between(sound(), after) == (
        Change("Route credit", "rules[default].tasks[pd].select.split[1].weight", 90, 80),
    )


def test_documents_come_and_go() -> None:
    """A new or removed document is one change."""
    after = [*sound(), model_version("3")]
    (change,) = between(sound(), after)
    assert (change.document, change.field, change.kind) == ("ModelVersion credit-pd-3", "", "added")
    (change,) = between(after, sound())
    assert (change.document, change.field, change.kind) == ("ModelVersion credit-pd-3", "", "removed")


def test_a_new_first_rule_is_one_change() -> None:
    """Items are matched by name, so those that only moved down are not changed."""
    rule = {"name": "vip", "when": "has(inputs.vip)", "tasks": [task()]}
    after = copy.deepcopy(sound())
    after[4]["spec"]["rules"].insert(0, rule)
    (change,) = between(sound(), after)
    assert (change.field, change.kind) == ("rules[vip]", "added")


def test_rules_that_change_places_are_a_change() -> None:
    """The first rule that matches wins, so order matters."""
    rules = [{"name": name, "when": f"inputs.{name} == 1", "tasks": [task()]} for name in ("a", "b")]
    before = changed(sound(), "credit", "spec.rules", rules)
    after = changed(sound(), "credit", "spec.rules", rules[::-1])
    assert between(before, after) == (Change("Route credit", "rules (order)", ["a", "b"], ["b", "a"]),)


def test_items_without_names_of_their_own_go_by_place() -> None:
    """Endpoints have no names; a second feature of the same ref has one."""
    after = changed(sound(), "credit-pd-1", "spec.backend.endpoints", ["http://127.0.0.1:9001", "http://127.0.0.1:2"])
    (change,) = between(sound(), after)
    assert change == Change("ModelVersion credit-pd-1", "backend.endpoints[1]", None, "http://127.0.0.1:2")
    twice = [{"ref": "inputs.amount"}, {"ref": "inputs.amount", "name": "other"}]
    after = changed(sound(), "credit-pd-1", "spec.features", twice)
    assert {change.field for change in between(sound(), after)} >= {"features[other]"}


def test_a_type_that_changes_is_a_change() -> None:
    """1 and 1.0 are equal to Python and not to CEL."""
    before = changed(sound(), "credit-pd-1", "spec.features.0", {"ref": "inputs.amount", "default": 1})
    after = changed(sound(), "credit-pd-1", "spec.features.0", {"ref": "inputs.amount", "default": 1.0})
    (change,) = between(before, after)
    assert change.field == "features[inputs.amount].default"


def test_a_status_is_told_field_by_field() -> None:
    """How far a rollout is differs like any field, below ``status``."""
    rollout = {"to": "2", "steps": [5, 100], "every": "10m"}
    begun = changed(sound(), "credit", "spec.rules.0.tasks.0", task(select={"version": "1"}, rollout=rollout))
    after = copy.deepcopy(begun)
    for step, documents in enumerate((begun, after)):
        status = {"state": "progressing", "step": step, "since": 1, "of": "0" * 16}
        documents[4]["status"] = {"rollouts": {"default/pd": status}}
    assert between(begun, after) == (Change("Route credit", "status.rollouts.default/pd.step", 0, 1),)
    del after[4]["status"]
    (change,) = between(after, begun)
    assert (change.field, change.kind) == ("status", "added")
