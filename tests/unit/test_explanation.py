"""The explanation of a request says what routing would do, from the same functions."""

import pytest

from app.domain.errors import Code
from app.domain.explanation import explain
from app.domain.routing import Plan, route
from tests.support.registry_documents import changed, request, revision, sound, task

WHEN = 'metadata.channel == "batch"'


def test_everything_that_would_happen_is_told() -> None:
    """Route, placeholders, rules tried and why, versions and how selected, features, entities, result."""
    rules = [{"name": "batch", "when": WHEN, "tasks": [task()]}, sound()[4]["spec"]["rules"][0]]
    whole = revision(changed(sound(), "credit", "spec.rules", rules))
    asked = request(metadata={"channel": "web"}, entities={"applicant_id": 17}, inputs={"amount": 5})
    told = explain(whole, asked)
    assert (told.route, told.rule, told.placeholders, told.deadline_ms) == (
        "credit",
        "default",
        {"product": "card"},
        250,
    )
    assert [(each.name, each.matched, each.reason) for each in told.rules] == [
        ("batch", False, f"false: {WHEN}"),
        ("default", True, "has no when: always"),
    ]
    (traced,) = told.tasks
    plan = route(whole, asked)
    assert isinstance(plan, Plan)
    assert traced.version is plan.tasks[0].version
    assert traced.selected_by == "split, 90 %"
    assert [(each.ref, each.type, each.contract, each.max_age_ms) for each in traced.features] == [
        ("inputs.amount", "DOUBLE", "required", None),
        ("applicant.age", "INT64", "default 35", 30 * 86_400_000),
    ]
    assert [(need.view, need.key.values) for need in told.needs] == [("applicant", (17,))]
    assert told.result == {"decision": "outputs.pd.probability < 0.3"}
    assert (told.problems, traced.problems, told.refused) == ((), (), None)


def test_without_a_request_id_every_arm_is_told() -> None:
    """The arm is drawn by the request's id; arms that are never drawn are left out."""
    documents = changed(sound(), "credit", "spec.rules.0.tasks.0.select.split.0.weight", 30)
    told = explain(revision(documents), request(), drawn=False)
    assert [(each.version.version, each.selected_by, each.backend) for each in told.tasks] == [
        ("1", "split, 75 %", "http oip-v2: http://127.0.0.1:9001"),
        ("2", "split, 25 %", "kafka: pool default"),
    ]
    documents = changed(sound(), "credit", "spec.rules.0.tasks.0.select.split.0.weight", 0)
    assert [each.version.version for each in explain(revision(documents), request(), drawn=False).tasks] == ["2"]


def test_a_pinned_version_is_told() -> None:
    """How a version was selected is said in the words of the document."""
    documents = changed(sound(), "credit", "spec.rules.0.tasks.0.select", {"alias": "champion"})
    assert explain(revision(documents), request(), drawn=False).tasks[0].selected_by == "alias champion"


def test_what_the_request_lacks_is_told() -> None:
    """A missing entity and a missing required input are problems before anything runs."""
    told = explain(revision(), request())
    assert [each.code for each in told.problems] == [Code.ENTITY_MISSING]
    assert [each.code for each in told.tasks[0].problems] == [Code.FEATURE_MISSING]


@pytest.mark.parametrize(
    ("path", "when", "code", "tried"),
    [
        ("/other", None, Code.PATH_UNKNOWN, []),
        ("/credit/card", WHEN, Code.RULE_FAILED, [False]),
        ("/credit/card", 'metadata.product == "loan"', Code.NO_RULE_MATCHED, [False]),
    ],
)
def test_a_rejection_is_told(path: str, when: str | None, code: Code, tried: list[bool]) -> None:
    """The problem is the very one that a caller would read, after the rules that were tried."""
    documents = sound() if when is None else changed(sound(), "credit", "spec.rules.0.when", when)
    told = explain(revision(documents), request(path))
    assert told.refused is not None
    assert told.refused.code is code
    assert [each.matched for each in told.rules] == tried
    assert told.tasks == ()
