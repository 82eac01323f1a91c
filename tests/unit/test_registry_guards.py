"""Expressions that look at a task which may be absent are refused, unless a guard keeps them from it."""

from typing import Any

import pytest

from app.domain.errors import DocumentsRefused
from app.domain.expression_syntax import syntax
from app.domain.registry import read_revision
from tests.support.registry_documents import changed, route, sound, sources, task

PD = task(select={"version": "1"})
OPTIONAL = task(name="fraud", select={"version": "1"}, need="optional")
DOUBTFUL = task(name="lgd", select={"version": "1"}, after=["pd"], when="outputs.pd.probability >= 0.3")
LAST = task(name="last", select={"version": "1"}, after=["lgd"])


def faults(tasks: list[dict[str, Any]], text: str, **rule: Any) -> list[tuple[str, str]]:
    whole = {"name": "default", "tasks": tasks, "result": {"decision": text}} | rule
    try:
        read_revision(sources([*sound(), route("guarded", "/guarded", rules=[whole])]))
    except DocumentsRefused as error:
        return [(fault.field, fault.message) for fault in error.faults]
    return []


ALL = [PD, OPTIONAL, DOUBTFUL, LAST]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("outputs.fraud.probability < 0.5", "fraud"),
        ("has(outputs.fraud.probability) && outputs.fraud.probability < 0.5", "fraud"),
        ("has(outputs.pd) && outputs.fraud.probability < 0.5", "fraud"),
        ("has(outputs.fraud) || outputs.fraud.probability < 0.5", "fraud"),
        ("has(outputs.fraud) ? 0.0 : outputs.fraud.probability", "fraud"),
        ("outputs.pd.probability < 0.3 && outputs.fraud.probability < 0.5", "fraud"),
        ("metadata.channel == 'web' && outputs['fraud']['probability'] < 0.5", "fraud"),
        ("(has(outputs.fraud) && has(outputs.lgd)) || outputs.fraud.probability < 0.5", "fraud"),
        ("mean([outputs.pd.probability, outputs.fraud.probability])", "fraud"),
        ("outputs.lgd.probability", "lgd"),
        ("outputs.last.probability", "last"),
        # The condition in other words, and wrong by a hair.
        ("outputs.pd.probability <= 0.3 ? outputs.lgd.probability : 1.0", "lgd"),
        ("outputs.pd.probability < 0.2 ? 0.0 : outputs.lgd.probability", "lgd"),
        ("size(outputs) > 1 ? outputs.fraud.probability : 0.0", "fraud"),
    ],
)
def test_an_unguarded_task_is_refused(text: str, name: str) -> None:
    """The message names the task, why it may be absent, and what to write."""
    ((field, message),) = faults(ALL, text)
    assert field == "spec.rules[default].result.decision"
    assert message.startswith(f"outputs.{name}: task {name} may have no output (")
    assert f"write `has(outputs.{name}) ? … : …`" in message


@pytest.mark.parametrize(
    "text",
    [
        "has(outputs.fraud) && outputs.fraud.probability < 0.5",
        "outputs.fraud.probability < 0.5 && has(outputs.fraud)",
        "!has(outputs.fraud) || outputs.fraud.probability < 0.5",
        "!(has(outputs.fraud)) ? 0.0 : outputs.fraud.probability",
        "has(outputs.fraud) ? outputs.fraud.probability : 0.0",
        "'fraud' in outputs && outputs['fraud'].probability < 0.5",
        "has(outputs.fraud) && (outputs.pd.probability < 0.3 && outputs.fraud.probability < 0.5)",
        "has(outputs.fraud) && has(outputs.lgd) ? outputs.fraud.probability + outputs.lgd.probability : 0.0",
        "!has(outputs.fraud) || !has(outputs.lgd) || outputs.fraud.probability < outputs.lgd.probability",
        "has(outputs.fraud) ? (outputs.pd.probability < 0.3 ? outputs.fraud.probability : 0.0) : 1.0",
        "has(outputs.fraud) && has(outputs.fraud.probability) && outputs.fraud.probability < 0.5",
        "(has(outputs.fraud) ? true : false) && outputs.fraud.probability < 0.5",
        "false && outputs.fraud.probability < 0.5",
        "[1.0].all(each, has(outputs.fraud) && outputs.fraud.probability < each)",
        "mean(has(outputs.fraud) ? [outputs.fraud.probability] : [outputs.pd.probability])",
        "{'a': has(outputs.fraud) ? outputs.fraud.probability : -0.5e-3}.a",
        # Its own condition is a guard, as it is written and in other words.
        "outputs.pd.probability >= 0.3 ? outputs.lgd.probability : 0.0",
        "outputs.pd.probability >= 0.3 && path != '' ? outputs.last.probability : 0.0",
        "outputs.pd.probability < 0.3 ? 0.0 : outputs.lgd.probability",
        "!(outputs.pd.probability < 0.3) && outputs.lgd.probability > 0.1",
        "size(outputs) == 4 ? outputs.fraud.probability : 0.0",
        "outputs.all(name, outputs[name].probability < 0.5)",
    ],
)
def test_a_guarded_task_is_sound(text: str) -> None:
    """In either order, by ternaries, negations, lists, and by the condition without which the task is not run."""
    assert faults(ALL, text) == []


def test_reasons_and_conditions_are_held_to_the_same() -> None:
    """Whoever evaluates it, an absent task fails the expression."""
    after = task(name="next", select={"version": "1"}, after=["fraud"], when="outputs.fraud.probability > 0.5")
    found = faults(
        [PD, OPTIONAL, after], "path", reasons=[{"code": "FRAUD", "when": "outputs.fraud.probability > 0.5"}]
    )
    assert [field for field, _ in found] == [
        "spec.rules[default].reasons[FRAUD].when",
        "spec.rules[default].tasks[next].when",
    ]
    after = after | {"when": "has(outputs.fraud) && outputs.fraud.probability > 0.5"}
    assert faults([PD, OPTIONAL, after], "path") == []


@pytest.mark.parametrize(
    "changes",
    [
        {"need": "default", "default": {"probability": 0.5}},
        {"need": "optional", "fallback": [{"default": {"probability": 0.5}}]},
        {"need": "required"},
    ],
)
def test_what_always_has_an_output_needs_no_guard(changes: dict[str, Any]) -> None:
    """A fixed answer, or no decision without it."""
    assert faults([PD, OPTIONAL | changes], "outputs.fraud.probability < 0.5") == []


@pytest.mark.parametrize(
    ("join", "text", "sound_"),
    [
        ({"policy": "first"}, "outputs.pd.probability", False),
        ({"policy": "first"}, "has(outputs.pd) ? outputs.pd.probability : outputs.other.probability", True),
        ({"policy": "first"}, "has(outputs.other) || outputs.pd.probability < 0.5", True),
        ({"policy": "first"}, "!has(outputs.other) && outputs.pd.probability < 0.5", True),
        ({"policy": "first"}, "has(outputs.pd) ? outputs.other.probability : outputs.pd.probability", False),
        ({"policy": "quorum", "n": 2}, "outputs.pd.probability + outputs.other.probability", True),
        ({"policy": "quorum", "n": 1}, "outputs.pd.probability + outputs.other.probability", False),
    ],
)
def test_so_many_answers_there_are(join: dict[str, Any], text: str, sound_: bool) -> None:
    """Of two of which one answers, the other is there where one is not."""
    found = faults([PD, task(name="other", select={"version": "1"})], text, join=join)
    assert (found == []) is sound_


def test_a_condition_on_the_request_is_believed() -> None:
    """Whether another expression over the request says the same cannot be tried: it is not refused."""
    rich = DOUBTFUL | {"when": "inputs.amount > 1000.0"}
    assert faults([PD, rich], "inputs.amount <= 1000.0 ? 0.0 : outputs.lgd.probability") == []
    assert faults([PD, rich], "outputs.lgd.probability") != []


def test_what_cannot_be_read_is_left_alone() -> None:
    """Syntax beyond what is read here proves nothing."""
    assert syntax("a ? b") is None
    assert syntax("f(a b)") is None
    assert syntax("(" * 3_000 + "a") is None
    assert syntax("a.") is None
    assert syntax("a.b{c: 1}") is not None
    assert syntax("f(a)[0].b + -1u * 0x1F / .5") is not None


@pytest.mark.parametrize(
    ("value", "field", "said"),
    [
        ({"probability": "high"}, "default.probability", "'high', which is not FP64, by version 1"),
        ({"probability": True}, "default.probability", "which is not FP64"),
        ({"probability": None}, "default.probability", "which is not FP64"),
        ({"probability": 1.5}, "default.probability", "is 1.5, outside 0.0 to 1.0, by version 1"),
        ({"probability": -1}, "default.probability", "outside 0.0 to 1.0"),
        ({"score": 0.5}, "default", "names score, and version 1 answers probability"),
        ({"probability": 0.5, "score": 0.5}, "default", "names probability, score"),
    ],
)
def test_a_fixed_answer_is_one_that_the_version_could_give(value: dict[str, Any], field: str, said: str) -> None:
    """Names, datatypes and bounds are the version's own, whether the answer is a default or a last fallback."""
    for changes, at in (
        ({"need": "default", "default": value}, field),
        ({"fallback": [{"version": "2"}, {"default": value}]}, f"fallback[1].{field}"),
    ):
        found = faults([task(select={"version": "1"}, **changes)], "path")
        assert found[0][0] == f"spec.rules[default].tasks[pd].{at}"
        assert said in found[0][1]


def test_a_whole_number_stands_for_a_float() -> None:
    """YAML's 0 is 0.0 where the output is one, so that expressions compare it as they do answers."""
    changes = {"need": "default", "default": {"probability": 0}, "fallback": [{"version": "2"}]}
    other = {"fallback": [{"default": {"probability": 1}}]}
    tasks = [task(select={"version": "1"}, **changes), task(name="other", select={"version": "1"}, **other)]
    rules = [{"name": "default", "tasks": tasks, "result": {"low": "outputs.pd.probability < 0.3"}}]
    revision = read_revision(sources([*sound(), route("typed", "/typed", rules=rules)]))
    (typed,) = (each for each in revision.routes if each.name == "typed")
    default, last = typed.rules[0].tasks[0].spec.default, typed.rules[0].tasks[1].spec.fallback[0].default
    assert default is not None
    assert last is not None
    assert isinstance(default["probability"], float)
    assert isinstance(last["probability"], float)


def test_a_shadow_s_outputs_are_its_own() -> None:
    """A fixed answer stands in for what decides, and a shadow never does."""
    changes = {"need": "default", "default": {"probability": 0.5}, "shadow": [{"version": "2"}]}
    documents = [each for each in sound() if each["kind"] != "Route"]
    documents = changed(documents, "credit-pd-2", "spec.outputs", [{"name": "score", "datatype": "INT64"}])
    rules = [{"name": "default", "tasks": [task(select={"version": "1"}, **changes)]}]
    assert read_revision(sources([*documents, route("shadowed", "/shadowed", rules=rules)])).routes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max(outputs.pd.probability, 0.5)", "max takes 1 value, not 2: a list, as max([a, b])"),
        ("[outputs.pd.probability].map(each, mean())[0]", "mean takes 1 value, not 0"),
        ("path.startsWith()", "startsWith takes 2 values, not 1"),
        ("weightedMean([outputs.pd.probability], [1, 2])", "weighs 1 values by 2 weights"),
        ("inputs.name.matches('(') ? 1 : 0", "matches: '(' is no regular expression (error: unclosed group)"),
        ("mean([])", "a list of numbers is wanted"),
        ("max(['a', 'b'])", "a list of numbers is wanted"),
        ("[1][3]", "index out of bounds"),
        ("1 / 0", "division by zero"),
        ("1.0 / 0.0", "gives NaN or infinity"),
        ("b'abc'", "gives bytes, which JSON cannot hold"),
        ("[{1: 2}]", "gives an object whose keys are not text"),
        ("{'a': duration('1s')}", "gives a duration, which JSON cannot hold; write string(…)"),
        ("outputs.pd.probability > 0.5 ? b'x' : b'y'", "gives bytes"),
        ("outputs.pd.probability + mean([])", "a list of numbers is wanted"),
        ("vote([outputs.pd])", "no list or object"),
    ],
)
def test_a_result_that_no_answer_could_make_is_refused(text: str, said: str) -> None:
    """Calls with too many values, constants that fail, and what JSON has no form for."""
    ((field, message),) = faults([PD], text)
    assert field == "spec.rules[default].result.decision"
    assert said in message
    assert "lambda" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "max([outputs.pd.probability, 0.5])",
        "weightedMean([outputs.pd.probability, 0.5], [1, 2])",
        "weightedMean([outputs.pd.probability].filter(each, each > 0.5) + [0.1], [1])",
        "path.matches(r'^/[a-z]+$')",
        "string(timestamp('2026-01-01T00:00:00Z'))",
        "timestamp('2026-01-01T00:00:00Z')",
        "timestamp('2026-01-01T00:00:00Z').getFullYear()",
        "{'whole': 1, 'list': [1.5, null, 'text', true]}",
        "1.0 / (outputs.pd.probability - 0.5)",
        "outputs.pd.probability > 0.999 ? 1 : 1 / 0",
        "mean(inputs.scores)",
        "'decline'",
    ],
)
def test_a_result_that_some_answer_makes_is_sound(text: str) -> None:
    """What depends on the answer or the request is left alone."""
    assert faults([PD], text) == []


A, B, C = (task(name=name, select={"version": "1"}) for name in "abc")
OPTIONAL_A, OPTIONAL_B, OPTIONAL_C = (each | {"need": "optional"} for each in (A, B, C))
QUORUM = {"join": {"policy": "quorum", "n": 2}}
B_AFTER = B | {"after": ["a"]}
SUM = "outputs.a.probability + outputs.b.probability"


@pytest.mark.parametrize(
    ("tasks", "text", "rule"),
    [
        (
            [A, B, C],
            f"has(outputs.a) && has(outputs.b) ? ({SUM}) / 2.0 : has(outputs.a) && has(outputs.c) ? "
            "outputs.a.probability + outputs.c.probability : outputs.b.probability + outputs.c.probability",
            QUORUM,
        ),
        (
            [A, OPTIONAL_B, OPTIONAL_C],
            "has(outputs.b) || has(outputs.c) ? (has(outputs.b) ? outputs.b.probability : outputs.c.probability) "
            ": outputs.a.probability",
            {},
        ),
        ([A, OPTIONAL_B], "has(outputs.b) == true ? outputs.b.probability : outputs.a.probability", {}),
        ([A, OPTIONAL_B], "has(outputs.b) == false ? outputs.a.probability : outputs.b.probability", {}),
        ([A, OPTIONAL_B, OPTIONAL_C], "has(outputs.b) != has(outputs.c) || has(outputs.b) == false || "
         "outputs.b.probability < outputs.c.probability", {}),
        ([A, B, C], f"(has(outputs.a) ? 1 : 0) + (has(outputs.b) ? 1 : 0) == 2 ? {SUM} : 0.0", QUORUM),
        ([A, B, C], f"size(outputs) == 3 ? {SUM} : 0.0", QUORUM),
        ([OPTIONAL_A, B_AFTER | {"when": "has(outputs.a)"}], f"has(outputs.b) ? {SUM} : 0.0", {}),
        ([OPTIONAL_A, B_AFTER], f"has(outputs.b) ? {SUM} : 0.0", {}),
        (
            [A, B_AFTER | {"when": "outputs.a.probability > 0.2"}, C | {"after": ["b"]}],
            f"has(outputs.c) ? {SUM} : outputs.a.probability",
            {},
        ),
        ([A, B_AFTER | {"when": "true"}], "outputs.b.probability", {}),
        ([OPTIONAL_A, B_AFTER | {"when": "!has(outputs.a)"}], "has(outputs.a) ? outputs.a.probability : "
         "outputs.b.probability", {}),
    ],
)  # fmt: skip
def test_what_is_there_together_is_known(tasks: list[dict[str, Any]], text: str, rule: dict[str, Any]) -> None:
    """Quorums, tasks that come after others, and conditions say which tasks can have an output at once."""
    assert faults(tasks, text, **rule) == []


@pytest.mark.parametrize(
    ("tasks", "text", "rule", "name"),
    [
        ([A, B, C], f"has(outputs.c) ? {SUM} : 0.0", QUORUM, "a"),
        ([A, OPTIONAL_B, OPTIONAL_C], "has(outputs.b) || has(outputs.c) ? outputs.b.probability : 0.0", {}, "b"),
        ([A, OPTIONAL_B], "has(outputs.b) == false ? outputs.b.probability : 0.0", {}, "b"),
        ([A, OPTIONAL_B, OPTIONAL_C], "has(outputs.b) == has(outputs.c) ? outputs.b.probability : 0.0", {}, "b"),
        ([OPTIONAL_A, B_AFTER | {"when": "!has(outputs.a)"}], f"has(outputs.b) ? {SUM} : 0.0", {}, "a"),
        ([A, B_AFTER | {"when": "false"}], "outputs.b.probability", {}, "b"),
        ([A, B_AFTER | {"need": "optional", "when": "true"}], "outputs.b.probability", {}, "b"),
    ],
)
def test_what_can_be_absent_together_is_known(
    tasks: list[dict[str, Any]], text: str, rule: dict[str, Any], name: str
) -> None:
    """A guard of another task, or of the wrong way round, is none."""
    assert f"outputs.{name}: task {name} may have no output" in faults(tasks, text, **rule)[0][1]


def test_many_tasks_are_judged_by_syntax() -> None:
    """Where the sets of tasks are too many to look at each, guards are read as they are written."""
    tasks = [task(name=f"t{number}", select={"version": "1"}, need="optional") for number in range(12)]
    assert faults(tasks, "has(outputs.t3) ? outputs.t3.probability : 0.0") == []
    assert "outputs.t4" in faults(tasks, "has(outputs.t3) ? outputs.t4.probability : 0.0")[0][1]
