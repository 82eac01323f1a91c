"""The registry refuses what is not sound, whole, and says of each fault in which file, document and field it is."""

import copy
import datetime
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from app.domain import registry
from app.domain.document_parts import IN_WORDS, NOT_SUPPORTED_YET
from app.domain.errors import DocumentsRefused, Fault
from app.domain.registry import (
    Source,
    canonical,
    compile_revision,
    load_revision,
    parse,
    pools_of,
    read_revision,
    revision_id,
)
from tests.support.registry_documents import (
    changed,
    document,
    model_version,
    reasons,
    revision,
    route,
    sound,
    sources,
    task,
)

RULE = "spec.rules[default]"
LOW = f"{RULE}.reasons[LOW].when"
TASK = f"{RULE}.tasks[pd]"


def refused(documents: list[dict[str, Any]], today: datetime.date | None = None) -> list[Fault]:
    with pytest.raises(DocumentsRefused) as caught:
        read_revision(sources(documents), today=today)
    return list(caught.value.faults)


def test_sound_documents_are_a_revision() -> None:
    """Documents that fit each other make a revision with everything that routing needs."""
    whole = revision()
    assert whole.id == revision_id(canonical(whole.documents))
    assert set(whole.versions) == {("credit-pd", "1"), ("credit-pd", "2")}
    assert set(whole.models) == {"credit-pd"}
    assert set(whole.views) == {"applicant"}
    assert [each.name for each in whole.routes] == ["credit"]
    assert pools_of(whole) == {"default"}
    assert compile_revision(parse(sources(sound()))).id == whole.id


@pytest.mark.parametrize(
    ("name", "path", "value", "field", "said"),
    [
        # shapes
        (
            "credit-pd-1",
            "spec.features.0.onViolation",
            "default",
            "spec.features[inputs.amount]",
            "required and onViolation: default contradict one another",
        ),
        ("credit-pd-1", "spec.features.0.onViolation", "ask", "spec.features[inputs.amount].onViolation", "'refer'"),
        (
            "credit-pd-1",
            "spec.features.1.default",
            {"a": 1},
            "spec.features[applicant.age].default",
            "is not text, a number",
        ),
        ("credit-pd-1", "spec.features.1.default", [1], "spec.features[applicant.age].default", "is not INT64"),
        (
            "credit",
            "spec.rules.0.referResult",
            {"decison": "refer"},
            RULE,
            "referResult names decison, and result names decision; name the same",
        ),
        ("applicant", "spec.source", ..., "spec", "either source, where its features are, or onDemand"),
        ("applicant", "spec.onDemand", {"age": "1"}, "spec", "either source, where its features are, or onDemand"),
        ("applicant", "spec.entities", ..., "spec.entities", "is missing: name the keys"),
        (
            "applicant",
            "spec",
            {"features": [], "onDemand": {}},
            "spec.features",
            "is empty",
        ),
        ("applicant", "spec.source", {"type": "http", "endpoints": []}, "spec.source.endpoints", "is empty"),
        (
            "applicant",
            "spec.source",
            {"type": "http", "endpoints": ["http://127.0.0.1:1"], "writeBack": {"project": "p"}},
            "spec.source.writeBack.maxAge",
            "is missing",
        ),
        ("credit", "spec.colour", "red", "spec.colour", "unknown field"),
        ("credit", "metadata.labels", {}, "metadata.labels", "unknown field"),
        ("credit", "metadata.name", "Not A Name", "metadata.name", "'Not A Name' cannot be read: write lower-case"),
        ("credit", "apiVersion", "v2", "apiVersion", "modelbroker.dev/v1alpha1"),
        ("credit", "spec.deadline", "250", "spec.deadline", "not a duration"),
        ("credit", "spec.deadline", 2, "spec.deadline", "2 is not a duration: write a number and a unit"),
        ("credit", "spec.deadline", "0ms", "spec.deadline", "from 1ms to 1h is allowed here (given: '0ms')"),
        ("credit", "spec.deadline", "2h", "spec.deadline", "from 1ms to 1h is allowed here (given: '2h')"),
        ("credit-pd-1", "spec.policy.timeout", 80, "spec.policy.timeout", "not a duration"),
        ("credit-pd-1", "spec.features.1.maxAge", 30, "spec.features[applicant.age].maxAge", "not a duration"),
        ("credit", "spec.path", ..., "spec.path", "is missing"),
        ("credit", "spec.path", "credit", "spec.path", "write / and up to"),
        ("credit", "spec.rules", [], "spec.rules", "is empty: write at least 1"),
        ("credit", "spec.rules.0.tasks", [], f"{RULE}.tasks", "is empty: write at least 1"),
        ("credit", "spec.rules.0.tasks.0.weight", 5, f"{TASK}.weight", "unknown field"),
        ("credit", "spec.rules.0.tasks.0.need", "perhaps", f"{TASK}.need", "required"),
        ("credit", "spec.rules.0.tasks.0.select", {}, f"{TASK}.select", "exactly one of"),
        (
            "credit",
            "spec.rules.0.tasks.0.select",
            {"version": "1", "alias": "champion"},
            f"{TASK}.select",
            "exactly one of",
        ),
        (
            "credit",
            "spec.rules.0.tasks.0.select.split",
            [{"version": "1", "weight": 0}, {"version": "2", "weight": 0}],
            f"{TASK}.select",
            "sum to more than 0",
        ),
        ("credit", "spec.rules.0.tasks.0.select.split.0.weight", -1, f"{TASK}.select.split[1].weight", "greater than"),
        ("credit", "spec.rules.0.tasks.0.select.split.0.weight", 0.5, f"{TASK}.select.split[1].weight", "integer"),
        ("credit", "spec.rules.0.tasks.0.default", {"probability": 0}, TASK, "go together"),
        ("credit", "spec.rules.0.tasks.0.need", "default", TASK, "go together"),
        ("credit-pd-1", "spec.version", 1, "spec.version", "valid string"),
        ("credit-pd-1", "spec.digest", "sha256:12", "spec.digest", "write sha256: and 64"),
        ("credit-pd-1", "spec.backend.endpoints", [], "spec.backend.endpoints", "is empty: write at least 1"),
        ("credit-pd-1", "spec.backend.endpoints.0", "localhost:1", "spec.backend.endpoints[0]", "write http://"),
        ("credit-pd-1", "spec.backend.pool", "p", "spec.backend.pool", "unknown field"),
        ("credit-pd-1", "spec.backend.type", "carrier-pigeon", "spec.backend.type", "does not match"),
        ("credit-pd-1", "spec.backend.type", ..., "spec.backend", "discriminator"),
        ("credit-pd-1", "spec.backend.input", {"layout": "matrix"}, "spec.backend.input", "numeric datatype"),
        ("credit-pd-1", "spec.backend.input", {"tensor": "x"}, "spec.backend.input", "belong to layout: matrix"),
        ("credit-pd-1", "spec.features.0.ref", "amount", "spec.features[amount].ref", "write VIEW.FEATURE"),
        ("credit-pd-1", "spec.features.1.required", True, "spec.features[applicant.age]", "required or has a default"),
        ("credit-pd-1", "spec.policy.retries", 2, "spec.policy.retries", "less than or equal to 1"),
        ("credit-pd-1", "spec.policy.outlier", {"baseEjection": "2h"}, "spec.policy.outlier.baseEjection", "1h"),
        ("credit-pd-1", "spec.policy.outlier", {"baseEjection": "2m"}, "spec.policy.outlier", "above maxEjection"),
        ("credit-pd-1", "spec.governance.validUntil", "2027-02-30", "spec.governance", "day"),
        ("credit-pd", "spec.aliases", {"Bad Alias": "1"}, "spec.aliases.Bad Alias", "write lower-case"),
        ("applicant", "spec.entities", [], "spec.entities", "is empty: write at least 1"),
        ("applicant", "spec.features.0.type", "DECIMAL", "spec.features[age].type", "INT64"),
        # what one document says of another
        ("credit-pd-1", "spec.features.1.ref", "person.age", "spec.features[person.age].ref", "no FeatureView person"),
        (
            "credit-pd-1",
            "spec.features.1.ref",
            "applicant.hair",
            "spec.features[applicant.hair].ref",
            "no feature hair",
        ),
        ("credit-pd-1", "spec.features.1.default", "old", "spec.features[applicant.age].default", "is not INT64"),
        ("credit-pd-1", "spec.features.1.type", "INT64", "spec.features[applicant.age].type", "declares it"),
        ("credit-pd-1", "spec.features.0.maxAge", "1d", "spec.features[inputs.amount].maxAge", "have no age"),
        ("credit-pd-1", "spec.features.1.maxAge", "0s", "spec.features[applicant.age].maxAge", "0s makes whatever"),
        ("credit-pd-1", "spec.features.1.name", "amount", "spec.features", "amount is named 2 times"),
        ("credit-pd-1", "spec.outputs.0.min", 2, "spec.outputs[probability].min", "is above max"),
        ("credit-pd", "spec.aliases.champion", "7", "spec.aliases.champion", "no version 7"),
        ("applicant", "spec.features.1.name", "age", "spec.features", "age is named 2 times"),
        ("credit", "spec.rules.0.tasks.0.model", "credit-lgd", f"{TASK}.model", "there is no Model credit-lgd"),
        ("credit", "spec.rules.0.tasks.0.select", {"version": "7"}, f"{TASK}.select.version", "no version 7"),
        ("credit", "spec.rules.0.tasks.0.select", {"alias": "best"}, f"{TASK}.select.alias", "no alias best"),
        ("credit", "spec.rules.0.tasks.0.select.split.0.version", "7", f"{TASK}.select.split[7]", "no version 7"),
        ("credit", "spec.rules.0.tasks.0.select.split.0.version", "2", f"{TASK}.select.split", "version 2 is named 2"),
        ("credit", "spec.rules.0.when", "metadata.channel ==", f"{RULE}.when", "in: metadata.channel =="),
        ("credit", "spec.rules.0.when", "outputs.pd.score > 1", f"{RULE}.when", "unknown name outputs"),
        ("credit", "spec.rules.0.result", {"decision": "1 +"}, f"{RULE}.result.decision", "in: 1 +"),
        ("credit", "spec.rules.0.result", {"decision": "scores.pd"}, f"{RULE}.result.decision", "unknown name scores"),
        ("credit", "spec.path", "/credit/{product}/{product}", "spec.path", "product is named twice"),
        ("credit", "spec.path", "/credit/x{product}", "spec.path", "a placeholder is a whole segment"),
        ("credit", "spec.path", "/credit/*/card", "spec.path", "a * is the whole last segment"),
        ("credit", "spec.path", "/credit/c*", "spec.path", "a * is the whole last segment"),
    ],
)
def test_one_fault_is_refused(name: str, path: str, value: object, field: str, said: str) -> None:
    """A registry with one fault is refused with just that fault, by file, document and field."""
    documents = changed(sound(), name, path, value)
    (fault,) = refused(documents)
    assert fault.field == field
    index = next(i for i, each in enumerate(sound()) if each["metadata"]["name"] == name)
    assert fault.origin == f"{index}.yaml:1"
    assert fault.document.startswith(documents[index]["kind"])
    assert said in fault.message


PLAIN = {"version": "1"}
ROLLOUT = {"to": "3", "steps": [5, 100], "every": "10m"}


def whole_route(*tasks: dict[str, Any], spec: dict[str, Any] | None = None, **rule: Any) -> list[dict[str, Any]]:
    """The sound registry, with a third version, and one rule of these tasks and members."""
    rules = [{"name": "default", "tasks": list(tasks), **rule}]
    return [*changed(sound(), "credit", "spec", route(**(spec or {}) | {"rules": rules})["spec"]), model_version("3")]


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        # selection
        ({"select": PLAIN | {"stickyBy": "id"}}, "", "there is nothing to draw"),
        ({"select": PLAIN | {"experiment": "a"}}, "", "there is nothing to draw"),
        ({"select": task()["select"] | {"stickyBy": "outputs.id"}}, ".select.stickyBy", "write an entity's name"),
        ({"select": task()["select"] | {"experiment": "A B"}}, ".select.experiment", "write lower-case"),
        # shadows
        ({"shadow": [{}]}, ".shadow[0]", "exactly one of version, alias"),
        ({"shadow": [{"version": "3", "alias": "champion"}]}, ".shadow[0]", "exactly one of version, alias"),
        ({"shadow": [{"version": "3", "percent": 0}]}, ".shadow[0].percent", "greater than 0"),
        ({"shadow": [{"version": "3", "percent": 101}]}, ".shadow[0].percent", "less than or equal to 100"),
        ({"shadow": [{"version": "7"}]}, ".shadow[0].version", "no version 7"),
        ({"shadow": [{"alias": "best"}]}, ".shadow[0].alias", "no alias best"),
        ({"shadow": [{"version": "3", "segment": "nofn(path)"}]}, ".shadow[0].segment", "unknown function nofn"),
        ({"shadow": [{"version": "3", "segment": "outputs.pd"}]}, ".shadow[0].segment", "unknown name outputs"),
        (
            {"shadow": [{"version": "2", "segment": "1 + 1"}]},
            ".shadow[0].segment",
            "is always 2, so it tells no requests",
        ),
        ({"shadow": [{"version": "2", "segment": "1 / 0"}]}, ".shadow[0].segment", "in: 1 / 0"),
        # fallbacks
        ({"fallback": [{}]}, ".fallback[0]", "exactly one of version, alias, default"),
        ({"fallback": [{"alias": "best"}]}, ".fallback[0].alias", "no alias best"),
        ({"fallback": [{"version": "7"}]}, ".fallback[0].version", "no version 7"),
        ({"fallback": [{"default": {"probability": 0.5}}, {"version": "3"}]}, "", "put it last"),
        ({"onUnavailable": "panic"}, ".onUnavailable", "next"),
        # rollouts
        ({"rollout": ROLLOUT}, "", "not by split"),
        ({"select": PLAIN, "rollout": ROLLOUT | {"to": "1"}}, ".rollout.to", "selects already"),
        ({"select": {"alias": "champion"}, "rollout": ROLLOUT | {"to": "1"}}, ".rollout.to", "selects already"),
        ({"select": PLAIN, "rollout": ROLLOUT | {"to": "7"}}, ".rollout.to", "no version 7"),
        ({"select": PLAIN, "rollout": ROLLOUT | {"steps": [5, 50]}}, ".rollout", "steps must rise and end in 100"),
        ({"select": PLAIN, "rollout": ROLLOUT | {"steps": [50, 5, 100]}}, ".rollout", "steps must rise"),
        ({"select": PLAIN, "rollout": ROLLOUT | {"steps": []}}, ".rollout.steps", "is empty: write at least 1"),
        (
            {"select": PLAIN, "rollout": ROLLOUT | {"steps": [0, 100]}},
            ".rollout.steps[0]",
            "greater than or equal to 1",
        ),
        ({"select": PLAIN, "rollout": ROLLOUT | {"every": "10"}}, ".rollout.every", "not a duration"),
        ({"select": PLAIN, "rollout": ROLLOUT | {"every": "10ms"}}, ".rollout.every", "from 1s to 30d"),
        ({"select": PLAIN, "rollout": ROLLOUT | {"minDecisions": 0}}, ".rollout.minDecisions", "greater than"),
        (
            {"select": PLAIN, "rollout": ROLLOUT | {"abortOn": {"errorRate": 2}}},
            ".rollout.abortOn.errorRate",
            "less than",
        ),
        (
            {"select": PLAIN, "rollout": ROLLOUT | {"abortOn": {"errors": 2}}},
            ".rollout.abortOn.errors",
            "unknown field",
        ),
        ({"select": PLAIN, "rollout": ROLLOUT | {"abortOn": {"flipRate": 0.1}}}, "", "among the task's shadows"),
        # dependencies
        ({"after": ["pd"]}, None, "pd wait for one another"),
        ({"after": ["fraud"]}, ".after", "there is no task fraud"),
        ({"when": "true"}, ".when", "needs after"),
    ],
)
def test_one_fault_of_a_task_is_refused(changes: dict[str, Any], field: str | None, said: str) -> None:
    """Each field of a task that would not do what it says is refused by its place."""
    (fault,) = refused(whole_route(task(**changes)))
    assert said in fault.message
    assert fault.field == (f"{RULE}.tasks" if field is None else f"{TASK}{field}")


def test_a_fixed_answer_has_every_output_and_no_other() -> None:
    """A fallback's default is read by the result as an answer would be, so it has the outputs of each version."""
    (fault,) = refused(whole_route(task(select=PLAIN, fallback=[{"default": {"score": 0.5}}])))
    assert fault.field == f"{TASK}.fallback[0].default"
    assert "names score, and version 1 answers probability" in fault.message


FIRST, SECOND = task(name="first", select=PLAIN), task(name="second", select=PLAIN)


@pytest.mark.parametrize(
    ("tasks", "rule", "spec", "expected"),
    [
        (
            (FIRST | {"after": ["second"]}, SECOND | {"after": ["first"]}, task(name="third", select=PLAIN)),
            {},
            {},
            [(f"{RULE}.tasks", "first, second wait for one another by after; break the circle")],
        ),
        (
            (FIRST, SECOND | {"after": ["first"], "when": "outputs.third.probability > 0.1"}),
            {},
            {},
            [(f"{RULE}.tasks[second].when", "there is no task third")],
        ),
        (
            (FIRST, SECOND | {"after": ["first"], "when": "outputs.first.score > 0.1"}),
            {},
            {},
            [(f"{RULE}.tasks[second].when", "task first has no output score")],
        ),
        ((FIRST, SECOND), {"join": {"policy": "quorum"}}, {}, [(f"{RULE}.join", "go together")]),
        ((FIRST, SECOND), {"join": {"n": 1}}, {}, [(f"{RULE}.join", "go together")]),
        ((FIRST, SECOND), {"join": {"policy": "most"}}, {}, [(f"{RULE}.join.policy", "'all', 'quorum' or 'first'")]),
        ((FIRST, SECOND), {"join": {"policy": "quorum", "n": 3}}, {}, [(f"{RULE}.join.n", "the rule has 2 tasks")]),
        (
            (FIRST | {"need": "optional"}, SECOND),
            {"join": {"policy": "quorum", "n": 1}},
            {},
            [(f"{RULE}.tasks[first].need", "join policy quorum says how many answers are needed")],
        ),
        (
            (FIRST | {"need": "required"}, SECOND),
            {"join": {"policy": "first"}},
            {},
            [(f"{RULE}.tasks[first].need", "join policy first says")],
        ),
        ((FIRST,), {}, {"pinnable": ["first", "third"]}, [("spec.pinnable[third]", "there is no task third")]),
        ((FIRST,), {"when": "1 + 1"}, {}, [(f"{RULE}.when", "is always 2, and a condition is true or false")]),
        ((FIRST,), {"when": "1 / 0 == 1"}, {}, [(f"{RULE}.when", "in: 1 / 0 == 1")]),
        (
            (FIRST, SECOND | {"after": ["first"], "when": "'yes'"}),
            {},
            {},
            [(f"{RULE}.tasks[second].when", "is always 'yes'")],
        ),
        ((FIRST,), {"reasons": reasons(low="true")}, {}, [(f"{RULE}.reasons[low].code", "write upper-case")]),
        ((FIRST,), {"reasons": reasons(LOW="1 +")}, {}, [(LOW, "in: 1 +")]),
        ((FIRST,), {"reasons": reasons(LOW="outputs.first.score < 1.0")}, {}, [(LOW, "no output score")]),
        ((FIRST,), {"reasons": reasons(LOW="scores > 1")}, {}, [(LOW, "unknown name scores")]),
        (
            (FIRST,),
            {"reasons": [*reasons(LOW="true"), *reasons(LOW="false")]},
            {},
            [(f"{RULE}.reasons", "LOW is named 2")],
        ),
        ((FIRST,), {"reasons": {"LOW": "true"}}, {}, [(f"{RULE}.reasons", "valid array")]),
    ],
)
def test_faults_of_a_rule_are_refused(
    tasks: tuple[dict[str, Any], ...], rule: dict[str, Any], spec: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    """Orders that no task could begin in, joins that no answer could end, conditions and reasons that always fail."""
    faults = refused(whole_route(*tasks, spec=spec, **rule))
    assert [fault.field for fault in faults] == [field for field, _ in expected]
    assert all(said in fault.message for fault, (_, said) in zip(faults, expected, strict=True))


def test_a_rollout_guarded_by_flips_is_sound_with_its_shadow() -> None:
    """The new version is named among the shadows, by version, so that there is something to compare."""
    changes = {"rollout": ROLLOUT | {"abortOn": {"flipRate": 0.05}}, "shadow": [{"version": "3"}]}
    documents = whole_route(task(select=PLAIN, **changes), result={"high": "outputs.pd.probability > 0.5"})
    assert read_revision(sources(documents)).routes
    (fault,) = refused(whole_route(task(select=PLAIN, **changes)))
    assert fault.field == "spec.rules[default].tasks[pd].rollout.abortOn.flipRate"
    assert "the rule has none, so the bound never breaks" in fault.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("outputs.nope.probability", "there is no task nope (there is: pd)"),
        ("has(outputs.nope) ? 1 : 2", "there is no task nope"),
        ("outputs['nope'].probability", "there is no task nope"),
        ("outputs.pd.prob", "task pd has no output prob (there is: probability)"),
        ("has(outputs.pd.prob) ? outputs.pd.prob : 0.0", "task pd has no output prob"),
        ("outputs . pd // the first\n . prob", "task pd has no output prob"),
        ("nofn(outputs.pd.probability)", "unknown function nofn (there is: bytes, contains"),
        ("outputs.pd.probability * 100", "float * int"),
        ("outputs.pd.probability.score", "outputs.pd.probability is no object, and has no score"),
    ],
)
def test_a_result_that_can_never_evaluate(text: str, said: str) -> None:
    """A result that names no task, output or function there is, or mixes the outputs' types, fails every request."""
    (fault,) = refused(changed(sound(), "credit", "spec.rules.0.result", {"decision": text}))
    assert fault.field == f"{RULE}.result.decision"
    assert said in fault.message


@pytest.mark.parametrize(
    "text",
    [
        "outputs.pd.probability * 100.0",
        "has(outputs.pd) && 'probability' in outputs.pd",
        "has(outputs.pd.probability) ? outputs['pd']['probability'] : 0.0",
        "outputs[metadata.task].score",
        "'outputs.nope.score' + r'\\' + path",
        "path == '/' // outputs.nope.score",
        "[{'nope': 1}].map(outputs, outputs.nope)",
        "inputs.outputs.nope == 1",
        "outputs.pd.all(name, outputs.pd[name] > 0.5)",
        "inputs.amount * outputs.pd.probability",
        "1 / size(path)",
    ],
)
def test_a_result_that_may_evaluate_is_not_refused(text: str) -> None:
    """Texts, comments, computed keys and what a request holds prove nothing."""
    assert revision(changed(sound(), "credit", "spec.rules.0.result", {"decision": text}))


def test_an_output_of_one_arm_only() -> None:
    """What some versions of a split lack is asked for first, for any of them may be drawn."""
    more = {"name": "margin", "datatype": "FP64"}
    documents = changed(sound(), "credit-pd-2", "spec.outputs", [sound()[2]["spec"]["outputs"][0], more])
    (fault,) = refused(changed(documents, "credit", "spec.rules.0.result", {"m": "outputs.pd.margin"}))
    assert "credit-pd 1 has no such output; ask has(outputs.pd.margin) first" in fault.message
    asked = "has(outputs.pd.margin) ? outputs.pd.margin : 0.0"
    assert revision(changed(documents, "credit", "spec.rules.0.result", {"m": asked}))


@pytest.mark.parametrize(
    ("name", "path", "value", "field"),
    [
        ("credit-pd-1", "spec.policy.hedgeAfter", "p95", "spec.policy.hedgeAfter"),
    ],
)
def test_field_not_supported_yet(name: str, path: str, value: object, field: str) -> None:
    """A field of the design whose behaviour does not exist yet is refused by that name, never ignored."""
    (fault,) = [each for each in refused(changed(sound(), name, path, value)) if each.field == field]
    assert fault.message == f"not supported yet ({NOT_SUPPORTED_YET[field.rpartition('.')[2]]}); remove it"


@pytest.mark.parametrize(
    ("name", "path", "value", "field"),
    [
        ("credit-pd-1", "spec.backend", {"type": "sagemaker", "endpoint": "e"}, "spec.backend.type"),
        ("credit-pd-1", "spec.backend", {"type": "kubernetes", "service": "s"}, "spec.backend.type"),
        ("credit-pd-1", "spec.backend.protocol", "json", "spec.backend.protocol"),
        ("credit-pd-1", "spec.backend.protocol", "csv", "spec.backend.protocol"),
    ],
)
def test_value_not_supported_yet(name: str, path: str, value: object, field: str) -> None:
    """A value of the design whose behaviour does not exist yet is refused by that name."""
    (fault,) = refused(changed(sound(), name, path, value))
    assert fault.field == field
    assert fault.message.endswith("is not supported yet")


def test_every_fault_is_listed_at_once() -> None:
    """Faults of shape, reference and expression in several documents are reported together."""
    documents = changed(sound(), "credit-pd-1", "spec.colour", "red")
    documents = changed(documents, "credit", "spec.rules.0.when", "1 +")
    documents = changed(documents, "credit-pd-2", "spec.features.1.ref", "person.age")
    documents.append({"kind": "Rout", "metadata": {"name": "x"}})
    fields = {(each.document, each.field) for each in refused(documents)}
    assert fields == {
        ("ModelVersion credit-pd-1", "spec.colour"),
        ("Route credit", f"{RULE}.when"),
        ("ModelVersion credit-pd-2", "spec.features[person.age].ref"),
        ("x", "kind"),
    }


def test_two_tasks_of_one_name_hide_no_circle() -> None:
    """The second of them waits for nobody, the first one is in a circle all the same."""
    tasks = [task(after=["fraud"]), task(name="fraud", after=["pd"]), task()]
    faults = refused([*sound(), route("circle", "/circle", rules=[{"name": "default", "tasks": tasks}])])
    said = [each.message for each in faults if each.document == "Route circle"]
    assert "fraud, pd wait for one another by after; break the circle" in said
    assert any("named 2 times" in each for each in said)


def test_every_way_to_be_wrong_is_listed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, references, circles, expressions, names, paths, size: one list, each with file, document and field."""
    monkeypatch.setattr(registry, "REVISION_BYTES_MAX", 100)
    split = [{"version": "1", "weight": 0}, {"version": "2", "weight": 0}]
    pair = [task(select={"version": "1"}, after=["fraud"]), task(name="fraud", select={"alias": "best"}, after=["pd"])]
    documents = [
        *changed(sound(), "credit-pd", "spec.aliases.champion", "9"),
        route("weights", "/weights", rules=[{"name": "default", "tasks": [task(select={"split": split})]}]),
        route("circle", "/circle", rules=[{"name": "default", "tasks": pair}]),
        route("lost", "/lost", rules=[{"name": "default", "tasks": [task(model="credit-lgd")]}]),
        route("cel", "/cel", rules=[{"name": "a", "when": "1 +", "tasks": [task()], "reasons": reasons(R1="result.")}]),
        route("same", "/credit/{kind}"),
        route("credit", "/other"),
        {**route("grown", "/grown"), "status": {"rollouts": []}},
    ]
    faults = refused(documents)
    assert [(each.origin, each.document, each.field) for each in faults] == [
        ("5.yaml:1", "Route weights", f"{TASK}.select"),
        ("11.yaml:1", "Route grown", "status.rollouts"),
        ("10.yaml:1", "Route credit", "metadata.name"),
        ("0.yaml:1", "Model credit-pd", "spec.aliases.champion"),
        ("6.yaml:1", "Route circle", f"{RULE}.tasks[fraud].select.alias"),
        ("6.yaml:1", "Route circle", f"{RULE}.tasks"),
        ("7.yaml:1", "Route lost", f"{TASK}.model"),
        ("8.yaml:1", "Route cel", "spec.rules[a].when"),
        ("8.yaml:1", "Route cel", "spec.rules[a].reasons[R1].when"),
        ("9.yaml:1", "Route same", "spec.path"),
        # Of all documents together.
        ("", "", ""),
    ]
    assert all(each.message for each in faults)


def test_a_fault_of_shape_does_not_hide_references() -> None:
    """What is beside the rule, task or feature that cannot be read is still held against the other documents."""
    tasks = [task(colour="red"), task(name="lost", model="credit-lgd")]
    rules = [
        {"name": "a", "when": "inputs.a == 1", "tasks": tasks},
        {"name": "b", "when": "inputs.b == 1", "tasks": [task(select={"version": "9"})]},
        {"name": "c", "tasks": [task(colour="red")]},
    ]
    documents = changed(sound(), "credit-pd-2", "spec.features.0.colour", "red")
    documents = changed(documents, "credit-pd-2", "spec.features.1.ref", "person.age")
    found = [(each.document, each.field) for each in refused([*documents, route("other", "/other", rules=rules)])]
    assert len(found) == len(set(found)) == 6
    assert [field for document, field in found if document == "Route other"] == [
        "spec.rules[a].tasks[pd].colour",
        "spec.rules[c].tasks[pd].colour",
        "spec.rules[a].tasks[lost].model",
        "spec.rules[b].tasks[pd].select.version",
    ]
    assert ("ModelVersion credit-pd-2", "spec.features[person.age].ref") in found


MANY_FAULTS = {
    "apiVersion": "modelbroker.dev/v1",
    "kind": "Route",
    "metadata": {"name": "many"},
    "spec": {
        "path": "many",
        "deadline": "soon",
        "colour": "red",
        "pinnable": ["pd", "gone"],
        "rules": [
            {
                "name": "Small Amounts",
                "when": "inputs.amount <",
                "tasks": [
                    task(name="pd", select={"split": [{"version": "1", "weight": -1}]}, after=["lost"]),
                    task(name="fraud", model="credit-lgd", need="default"),
                    task(name="lgd", select={"alias": "best"}, fallback=[{"version": "9"}], timeout="1s"),
                ],
                "join": {"policy": "most"},
                "result": {"decision": "outputs.nobody.x", "score": 5, "limit": "inputs.", "again": "output.pd"},
                "reasons": reasons(low="1 + 1", R1="result.sum > 1", R2="'text'"),
            },
            {"name": "other", "tasks": [task(select={"version": 3}), task()]},
        ],
    },
}


def test_one_wrong_scalar_hides_nothing_else_of_its_document() -> None:
    """Faults of shape, reference, order and expression in one route: all in one list, each once, at its field."""
    found = refused([*sound(), MANY_FAULTS])
    small = "spec.rules[Small Amounts]"
    assert sorted(each.field for each in found) == sorted(
        [
            "apiVersion",
            "spec.path",
            "spec.deadline",
            "spec.colour",
            "spec.pinnable[gone]",
            f"{small}.name",
            f"{small}.when",
            f"{small}.tasks[pd].select.split[1].weight",
            f"{small}.tasks[pd].after",
            f"{small}.tasks[fraud]",
            f"{small}.tasks[fraud].model",
            f"{small}.tasks[lgd].timeout",
            f"{small}.tasks[lgd].select.alias",
            f"{small}.tasks[lgd].fallback[0].version",
            f"{small}.join.policy",
            f"{small}.result.score",
            f"{small}.result.decision",
            f"{small}.result.limit",
            f"{small}.result.again",
            f"{small}.reasons[low].code",
            f"{small}.reasons[low].when",
            f"{small}.reasons[R1].when",
            f"{small}.reasons[R2].when",
            "spec.rules[other].tasks[pd].select.version",
            "spec.rules[other].tasks",
        ]
    )
    assert {each.document for each in found} == {"Route many"}
    assert all("unread" not in str(each) for each in found)


def test_many_faults_of_a_version_and_a_view_are_listed_at_once() -> None:
    """The same of the other kinds; a kind in the wrong case is known for what is meant."""
    version = model_version(
        "3",
        model="credit-lgd",
        digest="abc",
        backend={"type": "http", "endpoints": ["ftp://x"]},
        features=[
            {"ref": "nobody.age", "required": True, "default": 1},
            {"ref": "inputs.amount", "maxAge": "1d", "colour": "red"},
            {"ref": "nonsense"},
            {"ref": "applicant.age", "default": "old", "name": "9"},
            {"ref": "inputs.amount"},
        ],
        outputs=[{"name": "a", "datatype": "FP64", "min": 2, "max": 1}, {"name": "b", "datatype": "FP65"}],
        policy={"timeout": "soon"},
    )
    view = {**sound()[3], "metadata": {"name": "inputs"}, "kind": "featureview"}
    found = refused([*sound(), version, view])
    where = "ModelVersion credit-lgd-3"
    assert sorted((each.document, each.field) for each in found) == sorted(
        [
            (where, "spec.model"),
            (where, "spec.digest"),
            (where, "spec.backend.endpoints[0]"),
            (where, "spec.features[nobody.age]"),
            (where, "spec.features[nobody.age].ref"),
            (where, "spec.features[inputs.amount].maxAge"),
            (where, "spec.features[inputs.amount].colour"),
            (where, "spec.features[nonsense].ref"),
            (where, "spec.features[9].name"),
            (where, "spec.features[applicant.age].default"),
            (where, "spec.features"),
            (where, "spec.outputs[b].datatype"),
            (where, "spec.outputs[a].min"),
            (where, "spec.policy.timeout"),
            ("inputs", "kind"),
            ("inputs", "metadata.name"),
        ]
    )


RICH = route(
    "rich",
    "/rich/{product}",
    pinnable=["pd"],
    rules=[
        {
            "name": "default",
            "when": "inputs.amount > 1.0",
            "tasks": [
                task(
                    select={"alias": "champion", "stickyBy": "applicant_id", "experiment": "e"},
                    rollout={"to": "2", "steps": [5, 100], "every": "1m", "abortOn": {"p99": "1s", "flipRate": 0.1}},
                    shadow=[{"version": "2", "percent": 5, "segment": "metadata.channel"}],
                    fallback=[{"version": "2"}, {"default": {"probability": 0.5}}],
                ),
                task(name="second", after=["pd"], when="outputs.pd.probability > 0.5", need="optional"),
                task(name="third", need="default", default={"probability": 0.5}),
            ],
            "join": {"policy": "all"},
            "result": {"decision": "outputs.pd.probability < 0.3", "score": "outputs.pd.probability"},
            "reasons": reasons(HIGH="result.score > 0.5"),
        },
        {"name": "quick", "when": "true", "tasks": [task(), task(name="other")], "join": {"policy": "quorum", "n": 1}},
    ],
)


def spoilt(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The document once for each place in it and each odd value there; and once without what is there."""

    def places(value: Any, way: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
        below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, each in below:
            yield (*way, key)
            yield from places(each, (*way, key))

    gone = object()
    for way in places(content):
        for odd in (gone, None, [1], "?/?"):
            other = copy.deepcopy(content)
            here: Any = other
            for step in way[:-1]:
                here = here[step]
            if odd is gone:
                del here[way[-1]]
            else:
                here[way[-1]] = odd
            if way[:1] != ("kind",):
                yield other


@pytest.mark.parametrize("number", range(6))
def test_a_fault_of_shape_has_no_faults_in_its_train(number: int) -> None:
    """Wherever a sound document is spoilt, no more is said than that: nothing follows from what cannot be read."""
    whole = [*sound(), RICH]
    assert len(whole) == 6
    seen = 0
    for other in spoilt(whole[number]):
        try:
            parse(sources([other]))
        except DocumentsRefused as error:
            said = {(each.field, each.message) for each in error.faults}
        else:
            continue
        seen += 1
        found = refused([*whole[:number], other, *whole[number + 1 :]])
        assert {(each.field, each.message) for each in found} == said, other
    assert seen > 20


@pytest.mark.parametrize(
    ("changes", "rule", "field", "said"),
    [
        ({"shadow": [{"version": "1"}]}, {}, f"{TASK}.shadow[0]", "1 is selected or named already"),
        ({"shadow": [{"version": "2"}, {"version": "2"}]}, {}, f"{TASK}.shadow[1]", "2 is selected or named already"),
        (
            {},
            {"reasons": reasons(HIGH="outputs.pd.probability")},
            f"{RULE}.reasons[HIGH].when",
            "gives float, and a condition",
        ),
        ({}, {"when": "(" * 300 + "1" + ")" * 300}, f"{RULE}.when", "at most 40 brackets"),
    ],
)
def test_what_would_do_nothing_is_refused(changes: dict[str, Any], rule: dict[str, Any], field: str, said: str) -> None:
    """A version that would not be asked, a reason that is none, an expression beyond its bound: short, on one line."""
    (fault,) = refused(whole_route(task(select=PLAIN, **changes), **rule))
    assert fault.field == field
    assert said in fault.message
    assert len(fault.message) < 700
    assert "\n" not in fault.message


def test_a_rule_that_is_never_reached_is_refused() -> None:
    """The first match wins, and a rule without a condition always matches."""
    rules = [{"name": "first", "tasks": [FIRST]}, {"name": "second", "when": "true", "tasks": [FIRST]}]
    documents = changed(sound(), "credit", "spec", route(pinnable=["first", "first"], rules=rules)["spec"])
    assert [fault.field for fault in refused(documents)] == ["spec.pinnable", "spec.rules[first]"]


@pytest.mark.parametrize("bound", [float("nan"), float("inf")])
def test_a_bound_that_is_no_number_is_refused(bound: float) -> None:
    """YAML's .nan and .inf would be no bound at all."""
    outputs = [{"name": "probability", "datatype": "FP64", "min": bound}]
    (fault,) = refused(changed(sound(), "credit-pd-1", "spec.outputs", outputs))
    assert (fault.field, fault.message[:18]) == ("spec.outputs[probability].min", "is NaN or infinite")


@pytest.mark.parametrize("datatype", ["BOOL", "BYTES"])
def test_bounds_belong_to_numbers(datatype: str) -> None:
    """Nothing would be held against them."""
    outputs = [{"name": "probability", "datatype": datatype, "max": 1}]
    documents = changed(sound(), "credit", "spec.rules.0.result", {"any": "path"})
    documents = changed(documents, "credit-pd-1", "spec.outputs", outputs)
    (fault,) = refused(documents)
    assert (fault.field, fault.message) == ("spec.outputs[probability].max", f"{datatype} has no order; remove it")


def test_a_constant_condition_that_is_true_is_sound_where_it_is_last() -> None:
    """A rule for everybody, as one without a condition is."""
    for text in ("true", "1 < 2", "true || false"):
        assert read_revision(sources(whole_route(FIRST, when=text))).routes


@pytest.mark.parametrize("text", ["false", "2 < 1", "true && false"])
def test_a_rule_or_task_that_is_switched_off_is_refused(text: str) -> None:
    """What can never run is no part of a route."""
    (fault,) = refused(whole_route(FIRST, when=text))
    assert (fault.field, fault.message) == (
        f"{RULE}.when",
        "is always false, so the rule is for no request; remove the rule",
    )
    second = task(name="second", after=["first"], when=text)
    (fault,) = refused(whole_route(FIRST, second))
    assert fault.field == f"{RULE}.tasks[second].when"
    assert fault.message == "is always false, so the task never runs; remove the task"


@pytest.mark.parametrize(
    ("first", "second", "field", "said"),
    [
        ("path == '/a'", " path=='/a' ", "spec.rules[b].when", "is that of rule a before it, so b is never reached"),
        ("path == '/a'", "path == '/b'", None, ""),
        ("true", "path == '/b'", "spec.rules[a]", "a when that is always true, so none after it is reached (b, c)"),
        (None, "path == '/b'", "spec.rules[a]", "has no when, so none after it is reached (b, c)"),
    ],
)
def test_a_rule_behind_one_for_the_same_requests_is_refused(
    first: str | None, second: str, field: str | None, said: str
) -> None:
    """The first match wins, so of two that ask the same, however it is spaced, the second is never reached."""
    rules = [
        {"name": name, "tasks": [FIRST]} | ({} if when is None else {"when": when})
        for name, when in (("a", first), ("b", second), ("c", None))
    ]
    documents = changed(sound(), "credit", "spec", route(rules=rules)["spec"])
    if field is None:
        assert read_revision(sources(documents)).routes
        return
    (fault,) = refused(documents)
    assert fault.field == field
    assert said in fault.message


@pytest.mark.parametrize(
    "text",
    ["metadata.headers['X-Foo'] == 'a'", "has(metadata.headers.X_Foo)", "'X-Foo' in metadata.headers"],
)
def test_a_header_is_looked_for_by_its_lower_case_name(text: str) -> None:
    """By any other it is never there, and the condition never holds."""
    (fault,) = refused(whole_route(FIRST, when=text))
    name = "X_Foo" if "X_Foo" in text else "X-Foo"
    wanted = f'write metadata.headers["{name.lower()}"]'
    assert (fault.field, fault.message) == (
        f"{RULE}.when",
        f"header {name} is never there, for headers are seen by lower-case names: {wanted}",
    )
    assert read_revision(sources(whole_route(FIRST, when=text.lower()))).routes


@pytest.mark.parametrize("name", ["credit-pd", "credit-pd-1", "applicant"])
def test_references_to_a_document_with_a_fault_are_no_faults_of_their_own(name: str) -> None:
    """One misspelt field is one fault, not one more for everything that refers to the document."""
    (fault,) = refused(changed(sound(), name, "spec.colour", "red"))
    assert fault.field == "spec.colour"


def test_a_version_needs_its_model() -> None:
    """A version of a model that has no document has no owner."""
    (fault,) = refused([*sound(), model_version("1", model="credit-lgd")])
    assert (fault.document, fault.field) == ("ModelVersion credit-lgd-1", "spec.model")
    assert fault.message == "there is no Model credit-lgd"


@pytest.mark.parametrize(
    ("field", "value"), [("retries", 1), ("concurrency", 1), ("outlier", {}), ("batch", {"maxSize": 32})]
)
def test_a_queued_version_is_not_called_from_here(field: str, value: object) -> None:
    """A queued version has a timeout; what only direct calls have is refused by name."""
    (fault,) = refused(changed(sound(), "credit-pd-2", f"spec.policy.{field}", value))
    assert fault.field == f"spec.policy.{field}"
    assert fault.message.startswith("not supported yet for backend type kafka")
    assert revision(changed(sound(), "credit-pd-2", "spec.policy", {"timeout": "1s"}))


@pytest.mark.parametrize("size", [1, 257, "32"])
def test_a_call_is_shared_by_at_least_two(size: object) -> None:
    """A batch has a size of 2 to 256 rows: one that nothing could share says nothing."""
    assert revision(changed(sound(), "credit-pd-1", "spec.policy.batch", {"maxSize": 32}))
    (fault,) = refused(changed(sound(), "credit-pd-1", "spec.policy.batch", {"maxSize": size}))
    assert fault.field == "spec.policy.batch.maxSize"


def test_default_must_name_the_outputs() -> None:
    """A default stands in for a whole answer, so it names each output of every version that can be drawn."""
    faulty = task(need="default", default={"score": 0.5})
    faults = refused(changed(sound(), "credit", "spec.rules.0.tasks.0", faulty))
    assert [(each.field, each.message[:12]) for each in faults] == [(f"{TASK}.default", "names score,")] * 2
    right = task(need="default", default={"probability": 0.5})
    assert revision(changed(sound(), "credit", "spec.rules.0.tasks.0", right))


def test_names_are_unique() -> None:
    """Documents of one kind, versions of a model, rules of a route and tasks of a rule have names of their own."""
    (fault,) = refused([*sound(), route("credit", "/other")])
    assert (fault.document, fault.field) == ("Route credit", "metadata.name")
    assert "4.yaml:1" in fault.message
    twin = document("ModelVersion", "twin", model_version("1")["spec"])
    (fault,) = refused([*sound(), twin])
    assert (fault.document, fault.field) == ("ModelVersion twin", "spec.version")
    rule = sound()[4]["spec"]["rules"][0]
    (fault,) = refused(changed(sound(), "credit", "spec.rules", [rule | {"when": "inputs.a == 1"}, rule]))
    assert fault.field == "spec.rules"
    (fault,) = refused(changed(sound(), "credit", "spec.rules.0.tasks", [task(), task()]))
    assert fault.field == f"{RULE}.tasks"
    entity = {"name": "applicant_id", "type": "INT64"}
    (fault,) = refused(changed(sound(), "applicant", "spec.entities", [entity, entity]))
    assert fault.field == "spec.entities"


@pytest.mark.parametrize("name", ["inputs", "entities", "metadata"])
def test_a_view_cannot_be_called_as_a_part_of_the_request(name: str) -> None:
    """A ref like inputs.amount always means the request."""
    view = document("FeatureView", name, sound()[3]["spec"])
    (fault,) = refused([*sound(), view])
    assert (fault.document, fault.field) == (f"FeatureView {name}", "metadata.name")


@pytest.mark.parametrize("path", ["/credit/{product}", "/credit/{kind}"])
def test_two_routes_cannot_have_the_same_path(path: str) -> None:
    """What a placeholder is called does not tell paths apart."""
    (fault,) = refused([*sound(), route("other", path)])
    assert (fault.document, fault.field) == ("Route other", "spec.path")
    assert "Route credit has the same path" in fault.message


def test_ended_validity_is_refused_at_apply_and_not_at_load() -> None:
    """The last valid day is valid; a revision that was accepted once stays loadable."""
    assert read_revision(sources(sound()), today=datetime.date(2027, 6, 30))
    faults = refused(sound(), today=datetime.date(2027, 7, 1))
    assert {(each.origin, each.document, each.field) for each in faults} == {
        ("1.yaml:1", "ModelVersion credit-pd-1", "spec.governance.validUntil"),
        ("2.yaml:1", "ModelVersion credit-pd-2", "spec.governance.validUntil"),
        ("4.yaml:1", "Route credit", f"{TASK}.select.split[1]"),
        ("4.yaml:1", "Route credit", f"{TASK}.select.split[2]"),
    }
    assert len(faults) == 4
    whole = revision()
    assert load_revision(whole.id, canonical(whole.documents)).id == whole.id


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"select": {"version": "2"}}, "select.version"),
        ({"select": {"alias": "challenger"}}, "select.alias"),
        ({"select": {"split": [{"version": "2", "weight": 1}]}}, "select.split[2]"),
        ({"select": {"version": "1"}, "fallback": [{"version": "2"}]}, "fallback[0].version"),
        ({"select": {"version": "1"}, "rollout": {"to": "2", "steps": [100], "every": "1m"}}, "rollout.to"),
    ],
)
def test_what_nobody_approved_decides_nothing(changes: dict[str, Any], field: str) -> None:
    """A version without governance is refused at apply in each use that decides, and stays loadable."""
    documents = changed(sound(), "credit-pd-2", "spec.governance", ...)
    documents = changed(documents, "credit", "spec.rules.0.tasks.0", {"name": "pd", "model": "credit-pd", **changes})
    (fault,) = refused(documents, today=datetime.date(2026, 1, 1))
    assert (fault.origin, fault.document, fault.field) == ("4.yaml:1", "Route credit", f"{TASK}.{field}")
    assert "version 2 has no governance" in fault.message
    assert revision(documents)


def test_what_nobody_approved_yet_may_run_beside() -> None:
    """A shadow shows what a version is worth before anybody approves it; unused, it waits in the registry."""
    documents = changed(sound(), "credit-pd-2", "spec", model_version("2", governance=None)["spec"])
    del documents[2]["spec"]["governance"]
    shadowed = task(select={"version": "1"}, shadow=[{"version": "2"}])
    documents = changed(documents, "credit", "spec.rules.0.tasks.0", shadowed)
    assert read_revision(sources(documents), today=datetime.date(2026, 1, 1))


def _rolling() -> list[dict[str, Any]]:
    rollout = {"to": "2", "steps": [5, 100], "every": "10m"}
    return changed(sound(), "credit", "spec.rules.0.tasks.0", task(select={"version": "1"}, rollout=rollout))


def test_a_status_by_hand_is_checked() -> None:
    """A status on the topic names rollouts that there are, and steps that they have."""
    compiled = revision(_rolling()).routes[0].spec.rules[0]
    digest = registry.rollout_digest("default", compiled.tasks[0])
    status = {"state": "progressing", "step": 1, "since": 1, "of": digest}
    route_ = next(each for each in _rolling() if each["kind"] == "Route")
    rest = [each for each in _rolling() if each["kind"] != "Route"]
    assert revision([*rest, {**route_, "status": {"rollouts": {"default/pd": status}}}])
    for rollouts, field, said in (
        ({"default/pd": {**status, "step": 2}}, "status.rollouts.default/pd.step", "there are 2 steps"),
        ({"default/fraud": status}, "status.rollouts.default/fraud", "no such rollout"),
        ({"default/pd": {**status, "state": "lost"}}, "status.rollouts.default/pd.state", "progressing"),
        ({"default/pd": {**status, "step": -1}}, "status.rollouts.default/pd.step", "greater than or equal to 0"),
    ):
        (fault,) = refused([*rest, {**route_, "status": {"rollouts": rollouts}}])
        assert (fault.document, fault.field) == ("Route credit", field)
        assert said in fault.message


def test_a_rollout_is_the_same_however_its_defaults_are_written() -> None:
    """A default that is spelt out, and all that is not the rollout, leave its digest as it is."""

    def digest(documents: list[dict[str, Any]]) -> str:
        return registry.rollout_digest("default", revision(documents).routes[0].spec.rules[0].tasks[0])

    at = "spec.rules.0.tasks.0"
    same = changed(_rolling(), "credit", f"{at}.rollout.minDecisions", 1)
    same = changed(same, "credit", f"{at}.need", "optional")
    same = changed(same, "credit", "spec.rules.0.result", {})
    assert digest(same) == digest(_rolling())
    for path, value in (("rollout.steps", [10, 100]), ("rollout.minDecisions", 5), ("select", {"alias": "champion"})):
        assert digest(changed(_rolling(), "credit", f"{at}.{path}", value)) != digest(_rolling())


def test_a_revision_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A revision is one Kafka record, so its size is bounded."""
    monkeypatch.setattr(registry, "REVISION_BYTES_MAX", 100)
    (fault,) = refused(sound())
    assert "100 are allowed" in fault.message


@pytest.mark.parametrize("content", [{"kind": ["Route"]}, {}, {"kind": "Rout"}, {"metadata": "x"}])
def test_unknown_kind(content: dict[str, Any]) -> None:
    """A document of no known kind is refused, whatever else it holds."""
    (fault,) = refused([content])
    assert fault.field == "kind"


def test_a_kind_nearly_right_of_what_json_cannot_hold() -> None:
    """The worse fault is told, and nothing crashes on the way to the other."""
    (fault,) = refused([{"kind": "route", "metadata": {"name": "x"}, "spec": {1: 2}}])
    assert fault.message.startswith("cannot be kept as JSON")


def test_what_json_cannot_hold_is_refused() -> None:
    """YAML knows keys and values that a revision cannot keep."""
    (fault,) = refused([{"kind": "Route", "metadata": {"name": "a"}, "spec": {1: 2}}])
    assert "JSON" in fault.message
    with pytest.raises(DocumentsRefused):
        parse([Source("a", {"kind": "Route", "metadata": {"name": "a"}})])


@pytest.mark.parametrize("content", [b"{", b"{}", b"[1]", b"[]", b'[{"kind": "Route"}]'])
def test_a_published_revision_is_not_believed(content: bytes) -> None:
    """What is read back from the topic is checked as if it had just been written."""
    with pytest.raises(DocumentsRefused):
        load_revision(revision_id(content), content)
    with pytest.raises(DocumentsRefused, match="hashes to"):
        load_revision("sha256:0", content)


def test_durations_keep_their_unit_in_a_revision() -> None:
    """However a duration was written, a revision holds its shortest text, so equal durations are one revision."""
    whole = revision(changed(sound(), "credit", "spec.deadline", "0.25s"))
    assert whole.id == revision().id
    content = canonical(whole.documents)
    assert b'"deadline":"250ms"' in content
    assert load_revision(whole.id, content).routes[0].spec.deadline == 250
    bare = content.replace(b'"deadline":"250ms"', b'"deadline":250')
    with pytest.raises(DocumentsRefused, match="250 is not a duration"):
        load_revision(revision_id(bare), bare)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec.rules.0.tasks.0.select", {"version": 1}, ': quote it, as "1"'),
        ("spec.rules.0.tasks.0.select.split.0.weight", 0.9, "write a whole number"),
        ("spec.rules.0.name", False, "quote it, for YAML reads yes, no"),
        ("spec.rules.0.reasons", {"LOW": "true"}, "write a list"),
        ("spec.rules.0.when", "inputs.x = 1", "(equality is written ==)"),
    ],
)
def test_a_fault_says_what_to_write(path: str, value: object, said: str) -> None:
    """What YAML or CEL makes something else of than was meant is said with its remedy."""
    assert said in refused(changed(sound(), "credit", path, value))[0].message


def test_a_condition_sees_the_tasks_of_its_after() -> None:
    """One of another task is told to name it there, for it may not have ended."""
    third = FIRST | {"name": "third", "after": ["second"], "when": "outputs.first.probability > 0.5"}
    (fault,) = refused(whole_route(FIRST, SECOND | {"after": ["first"]}, third))
    assert fault.message == "outputs.first: task first may not have ended by then; add first to after"


def test_reasons_keep_their_order_where_they_are_published() -> None:
    """They have an order of importance, and a revision's canonical form sorts no list."""
    whole = revision(
        changed(sound(), "credit", "spec.rules.0.reasons", reasons(ZULU="true", ALPHA="true", MIKE="true"))
    )
    loaded = load_revision(whole.id, canonical(whole.documents))
    assert list(loaded.routes[0].rules[0].reasons) == ["ZULU", "ALPHA", "MIKE"]


def test_a_revision_that_is_not_canonical_is_refused() -> None:
    """One content has one id: the same documents in another order are not another revision."""
    whole = revision()
    other = orjson.dumps(orjson.loads(canonical(whole.documents))[::-1])
    with pytest.raises(DocumentsRefused, match="canonical"):
        load_revision(revision_id(other), other)


def test_every_pattern_is_said_in_words() -> None:
    """No fault of a document shows a regular expression, and no words are left over from one that is gone."""
    source = "".join(each.read_text() for each in Path(registry.__file__).parent.glob("*document*.py"))
    assert set(re.findall(r'pattern=r"([^"]*)"', source)) == set(IN_WORDS)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("1 + 1", "is always 2"),
        ("result.absent == 1", "result has no absent (there is: decision)"),
        ("has(result.y) && result.y.a > result.y.b", "result has no y (there is: decision)"),
    ],
)
def test_a_reason_that_would_fail_every_decision(reason: str, said: str) -> None:
    """It is refused at apply: a condition that is none, or of a result that there is not."""
    documents = changed(sound(), "credit", "spec.rules.0.reasons", reasons(LOW=reason))
    (fault,) = refused(documents)
    assert fault.field == "spec.rules[default].reasons[LOW].when"
    assert said in fault.message


@pytest.mark.parametrize("name", ["headers", "model_version"])
def test_placeholders_leave_metadata_s_own_members_alone(name: str) -> None:
    """What a caller names by them, or the headers, would be hidden."""
    (fault,) = refused(changed(sound(), "credit", "spec.path", f"/credit/{{{name}}}"))
    assert (fault.field, "has a meaning of its own" in fault.message) == ("spec.path", True)


@pytest.mark.parametrize(
    ("aggregate", "field", "said"),
    [
        ({"of": "age_years", "op": "median", "windows": ["1h"]}, "spec.aggregate.op", "sum"),
        (
            {"of": "age_years", "op": "sum", "windows": ["soon"]},
            "spec.aggregate.windows[0]",
            "a whole number and a unit",
        ),
        ([{"of": "age_years", "op": "sum", "windows": []}], "spec.aggregate[0].windows", "at least 1"),
        ([{"of": "colour", "op": "sum", "windows": ["1h"]}], "spec.aggregate[0].of", "no feature colour"),
        ([{"op": "count", "windows": ["1h"], "of_": "x"}], "spec.aggregate[0].of_", "unknown field"),
        ("all", "spec.aggregate", ""),
    ],
)
def test_faults_of_aggregates(aggregate: object, field: str, said: str) -> None:
    """Whatever is wrong with them is named by its field, in a list or alone, and hides nothing else."""
    documents = changed(sound(), "applicant", "spec.aggregate", aggregate)
    faults = refused(changed(documents, "applicant", "spec.lateness", "never"))
    assert said in next(each.message for each in faults if each.field == field)
    assert "spec.lateness" in [each.field for each in faults]


def test_aggregates_are_features_to_contracts() -> None:
    """A version refers to a window as to any feature of the view; one that is not declared is none."""
    documents = changed(sound(), "applicant", "spec.aggregate", {"op": "count", "windows": ["24h"]})
    made = read_revision(sources(documents))
    assert made.views["applicant"].types["count_24h"] == "INT64"


# --- features ---------------------------------------------------------------------------------------------------------


def with_view(**spec: Any) -> list[dict[str, Any]]:
    """The sound registry and one more view."""
    return [*sound(), document("FeatureView", "loan", spec)]


@pytest.mark.parametrize(
    ("features", "how", "field", "said"),
    [
        ([("x", "DOUBLE")], {"x": "applicant.aeg"}, "spec.onDemand.x", "FeatureView applicant has no feature aeg"),
        ([("x", "DOUBLE")], {"x": "loan.x"}, "spec.onDemand.x", "is made of itself: loan.x -> loan.x"),
        ([("x", "DOUBLE")], {"y": "1.0"}, "spec.features[x]", "has nothing under onDemand"),
        ([("x", "DOUBLE")], {"x": {"function": "f"}}, "spec.onDemand.x.inputs", "is missing"),
        ([("x", "DOUBLE")], {"x": {"function": "f", "inputs": ["x"]}}, "spec.onDemand.x.inputs[0]", "VIEW.FEATURE"),
        ([("x", "DOUBLE")], {"x": ""}, "spec.onDemand.x", "at least 1 character"),
        ([("x", "DOUBLE")], {"x": 1}, "spec.onDemand.x", "should be an object"),
    ],
)
def test_on_demand_views_are_checked(features: list[tuple[str, str]], how: Any, field: str, said: str) -> None:
    """Like everything else, at the field that is wrong."""
    spec = {"features": [{"name": name, "type": type_} for name, type_ in features], "onDemand": how}
    faults = [each for each in refused(with_view(**spec)) if each.field == field]
    assert [said in each.message for each in faults] == [True], refused(with_view(**spec))


def test_a_view_on_demand_has_no_entities_of_its_own() -> None:
    """What it is made of has them."""
    spec: dict[str, Any] = {"features": [{"name": "x", "type": "DOUBLE"}], "onDemand": {"x": "1.0"}}
    assert revision(with_view(**spec)).computations
    (fault,) = refused(with_view(**spec, entities=[{"name": "a", "type": "INT64"}]))
    assert (fault.field, "has none of its own" in fault.message) == ("spec.entities", True)


def test_views_that_cannot_be_read_hide_no_ingredients() -> None:
    """What is made of a view with a fault is not a fault of its own."""
    spec = {"features": [{"name": "x", "type": "DOUBLE"}], "onDemand": {"x": "double(applicant.age)"}}
    (fault,) = refused(changed(with_view(**spec), "applicant", "spec.source.type", "oracle"))
    assert fault.document == "FeatureView applicant"


@pytest.mark.parametrize(
    ("ref", "max_age", "refusal"),
    [
        ("paid.count_24h", "6h", True),
        ("paid.count_24h", "1h", True),
        ("paid.count_24h", "361m", False),
        ("paid.amount", "1h", False),
        ("rate.x", "6h", True),
        ("rate.y", "15m", True),
        ("rate.y", "7h", False),
        ("rate.z", "1s", False),
    ],
)
def test_a_max_age_outlasts_the_time_between_two_computations(ref: str, max_age: str, *, refusal: bool) -> None:
    """Else a sound aggregate, and what is computed of it, would be STALE until it is computed anew."""
    paid = {
        "entities": [{"name": "applicant_id", "type": "INT64"}],
        "features": [{"name": "amount", "type": "DOUBLE"}],
        "source": {"type": "redis", "project": "credit"},
        "aggregate": {"op": "count", "windows": ["24h", "30d"]},
    }
    rate = {
        "features": [{"name": name, "type": "DOUBLE"} for name in "xyz"],
        "onDemand": {
            "x": "has(paid.count_24h) ? double(paid.count_24h) : 0.0",
            "y": "rate.x * 2.0",
            "z": "paid.amount * 2.0",
        },
    }
    documents = [*sound(), document("FeatureView", "paid", paid), document("FeatureView", "rate", rate)]
    documents.append(model_version("3", features=[{"ref": ref, "default": 0, "maxAge": max_age}]))
    if refusal:
        [fault] = refused(documents)
        assert fault.field == f"spec.features[{ref}].maxAge"
        assert fault.message.startswith(f"{max_age} is over before aggregates")
        assert "every 6h while nothing comes" in fault.message
        assert "declare more than 6h" in fault.message
        assert ("here paid.count_24h" in fault.message) == ref.startswith("rate")
    else:
        assert read_revision(sources(documents)).versions


@pytest.mark.parametrize(
    ("name", "path", "value", "fields"),
    [
        ("credit-pd-1", "features.1", {"ref": "applicant.age", "max_age": "1d"}, {"features[applicant.age].max_age"}),
        (
            "credit-pd-1",
            "features.1",
            {"ref": "applicant.age", "on_violation": "refer"},
            {"features[applicant.age].on_violation"},
        ),
        ("credit-pd-1", "governance", {"approved_by": "x"}, {"governance.approved_by", "governance.approvedBy"}),
        ("credit-pd-1", "outputs.0.from_", "x", {"outputs[probability].from_"}),
        ("applicant", "cache", {"ttl": "1s", "Negative-TTL": "1s"}, {"cache.Negative-TTL"}),
    ],
)
def test_a_field_has_one_name(name: str, path: str, value: object, fields: set[str]) -> None:
    """The one that is documented; another spelling of it is refused, and told how it is written."""
    found = refused(changed(sound(), name, f"spec.{path}", value))
    assert {fault.field.removeprefix("spec.") for fault in found} == fields
    [odd] = [fault for fault in found if "unknown" in fault.message]
    spelled = odd.field.rpartition(".")[2].replace("_", "").replace("-", "").lower()
    assert odd.message.startswith("unknown field; write ")
    assert odd.message.removeprefix("unknown field; write ").lower() == spelled


def test_a_name_of_another_place_is_not_told_to_be_written_so() -> None:
    """It is spelled as it should be, and does not belong there."""
    [fault] = refused(changed(sound(), "applicant", "spec.maxAge", "1d"))
    assert fault.message == "unknown field; remove it or correct its name"


@pytest.mark.parametrize(
    ("type_", "default", "said"),
    [
        ("BYTES", "YWI=", None),
        ("BYTES_LIST", ["YWI=", ""], None),
        ("BYTES", "YWI", "not base64, the text form of BYTES"),
        ("BYTES_LIST", ["?"], "not base64, the text form of BYTES"),
        ("UNIX_TIMESTAMP", "20260131", "send 2026-01-31, or a number of epoch seconds"),
    ],
)
def test_a_default_is_written_as_its_type_is(type_: str, default: Any, said: str | None) -> None:
    """Bytes in base64; what is none, or could be either of two things, is refused."""
    features = [{"ref": "inputs.b", "type": type_, "default": default}]
    documents = [*sound(), model_version("3", features=features)]
    if said is None:
        assert read_revision(sources(documents)).versions
    else:
        [fault] = refused(documents)
        assert fault.field == "spec.features[inputs.b].default"
        assert said in fault.message


ABSENT_LIST = "is null, and a tensor made of no DOUBLE_LIST has no shape"


@pytest.mark.parametrize(
    ("contract", "refusal"),
    [
        ({}, True),
        ({"default": None}, True),
        ({"onViolation": "default"}, True),
        ({"onViolation": "reject"}, True),
        ({"onViolation": "refer"}, True),
        ({"default": []}, False),
        ({"default": [0.5], "onViolation": "default"}, False),
        ({"required": True}, False),
        ({"required": True, "onViolation": "refer"}, False),
    ],
)
@pytest.mark.parametrize("ref", ["inputs.z", "applicant.overdue", "loan.y"])
def test_a_list_that_may_be_null_is_no_tensor(contract: dict[str, Any], ref: str, *, refusal: bool) -> None:
    """Of the request, stored or computed: an http backend is given a list whenever it is called; a pool takes null."""
    loan = {"features": [{"name": "y", "type": "DOUBLE_LIST"}], "onDemand": {"y": "applicant.overdue"}}
    documents = [*changed(sound(), "applicant", "spec.features.1", {"name": "overdue", "type": "DOUBLE_LIST"})]
    documents.append(document("FeatureView", "loan", loan))
    features = [{"ref": ref, **contract, **({"type": "DOUBLE_LIST"} if ref == "inputs.z" else {})}]
    queued = model_version("3", backend={"type": "kafka", "pool": "default"}, features=features)
    assert read_revision(sources([*documents, queued])).versions
    called = [*documents, model_version("3", features=features)]
    if refusal:
        [fault] = refused(called)
        assert fault.field == f"spec.features[{ref}].default"
        assert fault.message.startswith(ABSENT_LIST)
        assert "default: [], or required: true" in fault.message
    else:
        assert read_revision(sources(called)).versions


def test_a_contract_that_cannot_be_read_is_not_told_to_have_no_default() -> None:
    """What is left of it says nothing of absence: its fault is told, and no echo of it."""
    features = [{"ref": "inputs.z", "type": "DOUBLE_LIST", "required": "always"}]
    [fault] = refused([*sound(), model_version("3", features=features)])
    assert fault.field == "spec.features[inputs.z].required"


def test_what_a_source_or_an_input_cannot_hold_is_refused() -> None:
    """Bytes have no form in a feature server's JSON, and a list none in a matrix."""
    http = {"type": "http", "endpoints": ["http://127.0.0.1:1"]}
    entities = [{"name": "applicant_id", "type": "INT64"}]
    features = [{"name": "x", "type": "BYTES_LIST"}, {"name": "y", "type": "INT64_LIST"}]
    documents = with_view(entities=entities, features=features, source=http)
    documents.append(
        model_version(
            "3",
            backend={
                "type": "http",
                "endpoints": ["http://127.0.0.1:1"],
                "input": {"layout": "matrix", "tensor": "x", "datatype": "FP64"},
            },
            features=[{"ref": "loan.y", "default": [1, 2]}, {"ref": "inputs.z", "type": "DOUBLE_LIST"}],
        )
    )
    assert [(each.field, each.message.partition(",")[0]) for each in refused(documents)] == [
        ("spec.features[x].type", "is BYTES_LIST"),
        ("spec.features[loan.y]", "is INT64_LIST"),
        ("spec.features[inputs.z]", "is DOUBLE_LIST"),
    ]
