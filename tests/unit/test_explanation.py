"""The explanation of a request says what routing would do, from the same functions."""

from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from typer.testing import CliRunner

from app.cli import app
from app.commands.explain import _lines
from app.domain.assignment import assign, fraction, score
from app.domain.errors import Code
from app.domain.explanation import Explanation, explain
from app.domain.registry import Revision, compile_revision
from app.domain.requests import Request
from app.domain.rollout_status import with_status
from app.domain.rollouts import Advance, follow, moved, rollouts_in
from app.domain.routing import Plan, route
from tests.support.registry_documents import NOW_MS, changed, model_version, request, revision, sound, task

WHEN = 'metadata.channel == "batch"'
AFTER_MS = 1_830_000_000_000  # the end of 2027, when the sound versions' validity has ended


def told_of(whole: Revision, asked: Request, *, drawn: bool = True, now_ms: int = NOW_MS) -> Explanation:
    return explain(whole, asked, now_ms, drawn=drawn)


def with_task(**changes: object) -> Revision:
    """The sound registry, its version 2 over HTTP, with one task of these changes."""
    documents = [each for each in sound() if each["metadata"]["name"] != "credit-pd-2"]
    documents += [model_version("2", governance={"approvedBy": "risk"}), model_version("3")]
    return revision(changed(documents, "credit", "spec.rules.0.tasks.0", task(**changes)))


def test_everything_that_would_happen_is_told() -> None:
    """Route, placeholders, rules tried and why, versions and how selected, features, entities, result."""
    rules = [{"name": "batch", "when": WHEN, "tasks": [task()]}, sound()[4]["spec"]["rules"][0]]
    whole = revision(changed(sound(), "credit", "spec.rules", rules))
    asked = request(metadata={"channel": "web"}, entities={"applicant_id": 17}, inputs={"amount": 5})
    told = told_of(whole, asked)
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
    plan = route(whole, asked, NOW_MS)
    assert isinstance(plan, Plan)
    assert traced.version is plan.tasks[0].version
    assert (traced.selected_by, traced.experiment, traced.subject) == ("split", "credit/pd", "r-1")
    assert [
        (each.version, each.weight, each.percent, each.fraction, each.score, each.drawn) for each in traced.arms
    ] == [
        ("1", 90, 90.0, fraction("credit/pd", "1", "r-1"), score("credit/pd", "1", 90, "r-1"), True),
        ("2", 10, 10.0, fraction("credit/pd", "2", "r-1"), score("credit/pd", "2", 10, "r-1"), False),
    ]
    (own,) = traced.versions
    assert [(each.ref, each.type, each.contract, each.max_age_ms) for each in own.features] == [
        ("inputs.amount", "DOUBLE", "required", None),
        ("applicant.age", "INT64", "default 35", 30 * 86_400_000),
    ]
    assert [(need.view, need.key.values) for need in told.needs] == [("applicant", (17,))]
    assert (told.result, told.reasons, told.join) == ({"decision": "outputs.pd.probability < 0.3"}, {}, "all")
    assert (told.problems, traced.problems, told.refused) == ((), (), None)


def test_without_a_request_id_every_arm_is_told() -> None:
    """The arm is drawn by the request's id; of arms that are never drawn no version is told."""
    documents = changed(sound(), "credit", "spec.rules.0.tasks.0.select.split.0.weight", 30)
    (traced,) = told_of(revision(documents), request(), drawn=False).tasks
    assert (traced.version, traced.subject) == (None, None)
    assert [(each.version, each.percent, each.fraction, each.drawn) for each in traced.arms] == [
        ("1", 75.0, None, False),
        ("2", 25.0, None, False),
    ]
    assert [(each.role, each.selected_by, each.backend) for each in traced.versions] == [
        ("arm", "arm 1", "http oip-v2: http://127.0.0.1:9001"),
        ("arm", "arm 2", "kafka: pool default"),
    ]
    documents = changed(sound(), "credit", "spec.rules.0.tasks.0.select.split.0.weight", 0)
    (traced,) = told_of(revision(documents), request(), drawn=False).tasks
    assert [each.selected_by for each in traced.versions] == ["arm 2"]


def test_a_sticky_arm_is_known_without_a_request_id() -> None:
    """The subject is in the request, and the arm is the one that assignment gives."""
    whole = with_task(select=task()["select"] | {"stickyBy": "applicant_id", "experiment": "ab"})
    for subject in range(20):
        (traced,) = told_of(whole, request(entities={"applicant_id": subject}), drawn=False).tasks
        assert traced.version is not None
        assert traced.version.version == assign("ab", [("1", 90), ("2", 10)], str(subject))
        assert [each.version for each in traced.arms if each.drawn] == [traced.version.version]
        assert (traced.experiment, traced.subject) == ("ab", str(subject))


def test_a_pinned_version_is_told() -> None:
    """How a version was selected is said in the words of the document; a caller's pin draws nothing."""
    documents = changed(sound(), "credit", "spec.rules.0.tasks.0.select", {"alias": "champion"})
    assert told_of(revision(documents), request(), drawn=False).tasks[0].selected_by == "alias champion"
    pinnable = revision(changed(sound(), "credit", "spec.pinnable", ["pd"]))
    told = told_of(pinnable, request(metadata={"model_version": "2"}), drawn=False)
    assert told.pinnable == ("pd",)
    (traced,) = told.tasks
    assert traced.version is not None
    assert (traced.version.version, traced.selected_by, traced.arms) == ("2", "pin", ())


def test_what_stands_by_and_what_shadows_are_told() -> None:
    """Each fallback in order, each shadow with its part of the decisions, and whether it runs for this one."""
    whole = with_task(
        select={"version": "1"},
        fallback=[{"alias": "challenger"}, {"default": {"probability": 0.5}}],
        shadow=[{"version": "3", "segment": "metadata.product"}, {"version": "2", "percent": 0.0001}],
    )
    (traced,) = told_of(whole, request()).tasks
    assert [(each.role, each.selected_by, each.output) for each in traced.versions] == [
        ("own", "version", None),
        ("fallback", "fallback alias challenger", None),
        ("fallback", "fallback default", {"probability": 0.5}),
        ("shadow", "shadow version 3", None),
        ("shadow", "shadow version 2", None),
    ]
    assert [(each.percent, each.drawn, each.segment) for each in traced.versions[3:]] == [
        (100, True, "metadata.product"),
        (0.0001, False, None),
    ]


def test_an_expired_version_is_told_with_what_serves_instead() -> None:
    """The version is barred, and what the request lacks is looked at for what stands in."""
    whole = with_task(select={"version": "1"}, fallback=[{"version": "3"}, {"alias": "challenger"}])
    (traced,) = told_of(whole, request(), now_ms=AFTER_MS).tasks
    assert traced.barred is not None
    assert traced.barred.code is Code.VERSION_EXPIRED
    assert [(each.selected_by, each.expired) for each in traced.versions] == [
        ("version", True),
        ("fallback version 3", True),
        ("fallback alias challenger", False),
    ]
    assert [each.selected_by for each in traced.serving] == ["fallback alias challenger"]


def test_a_rollout_is_told() -> None:
    """Before the broker has taken it up it has no subjects."""
    whole = with_task(select={"version": "1"}, rollout={"to": "2", "steps": [5, 100], "every": "10m"})
    (traced,) = told_of(whole, request()).tasks
    assert traced.rollout is not None
    assert (traced.rollout.state, traced.rollout.percent, traced.rollout.steps) == ("not begun", 0, (5, 100))
    assert [(each.version, each.weight) for each in traced.arms] == [("1", 100), ("2", 0)]


def test_a_rollouts_step_is_told_as_the_list_of_rollouts_tells_it() -> None:
    """Counted from one, of so many."""
    whole = with_task(select={"version": "1"}, rollout={"to": "2", "steps": [5, 100], "every": "10m"})
    assert "rollout to 2: not begun, 0 %" in "\n".join(_lines(told_of(whole, request())))
    (running,) = rollouts_in(with_status(whole.documents, (), NOW_MS))
    status = follow(running, Advance("it held"), NOW_MS + 1)
    second = compile_revision(moved(with_status(whole.documents, (), NOW_MS), running.name, status))
    assert "rollout to 2: progressing, step 2 of 2, 100 %; it held" in "\n".join(_lines(told_of(second, request())))


def test_what_the_request_lacks_is_told() -> None:
    """A missing entity and a missing required input are problems before anything runs."""
    told = told_of(revision(), request())
    assert [each.code for each in told.problems] == [Code.ENTITY_MISSING]
    assert [each.code for each in told.tasks[0].problems] == [Code.FEATURE_MISSING]


BARE = model_version("3", features=[])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fallback": [{"version": "2"}, {"version": "3"}]}, "fallback version 3 is asked instead"),
        ({"fallback": [{"version": "2"}, {"default": {"probability": 0.5}}]}, "its fixed answer stands in"),
        ({"need": "default", "default": {"probability": 0.5}}, "its fixed answer stands in"),
        ({"need": "optional"}, "it has no output"),
        ({"after": ["first"]}, "where it is run, the decision fails"),
    ],
)
def test_what_the_request_may_lack_is_a_note(changes: dict[str, Any], said: str) -> None:
    """Where something stands in, a missing input is no problem: what would happen is told instead."""
    tasks = [task(name="first", select={"version": "3"}), task(select={"version": "1"}, **changes)]
    rules = [{"name": "default", "tasks": tasks}]
    whole = [*changed(sound(), "credit", "spec.rules", rules), BARE]
    told = told_of(revision(whole), request(entities={"applicant_id": 17}))
    traced = told.tasks[1]
    assert (told.problems, traced.problems) == ((), ())
    (note,) = traced.notes
    assert note.startswith("version 1: required feature inputs.amount is missing; ")
    assert note.endswith(said)


def test_a_missing_answer_among_several_is_a_note() -> None:
    """A quorum goes on without it."""
    tasks = [task(name="first", select={"version": "3"}), task(select={"version": "1"})]
    rules = [{"name": "default", "tasks": tasks, "join": {"policy": "first"}}]
    whole = [*changed(sound(), "credit", "spec.rules", rules), BARE]
    told = told_of(revision(whole), request(entities={"applicant_id": 17}))
    assert told.tasks[1].problems == ()
    assert told.tasks[1].notes[0].endswith("it is not among the answers")


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
    told = told_of(revision(documents), request(path))
    assert told.refused is not None
    assert told.refused.code is code
    assert [each.matched for each in told.rules] == tried
    assert told.tasks == ()


@pytest.mark.parametrize(("channel", "rule"), [("batch", "by-header"), ("web", "default")])
def test_the_command_takes_headers(channel: str, rule: str, tmp_path: Path) -> None:
    """A header decides as it would in a request; text and JSON say the same."""
    rules = [
        {
            "name": "by-header",
            "when": 'metadata.headers["x-channel"] == "batch"',
            "tasks": [task(select={"version": "1"})],
        },
        {
            "name": "default",
            "tasks": [
                task(name="cheap", select={"version": "1"}),
                task(
                    after=["cheap"],
                    when="has(outputs.cheap) && outputs.cheap.probability > 0.1",
                    select=task()["select"],
                ),
            ],
            "join": {"policy": "quorum", "n": 1},
            "reasons": [{"code": "LOW", "when": "has(outputs.cheap) && outputs.cheap.probability < 0.1"}],
        },
    ]
    file = tmp_path / "registry.yaml"
    file.write_text(yaml.safe_dump_all(changed(sound(), "credit", "spec.rules", rules)))
    asked = ["explain", "/credit/card", "-f", str(file), "--header", f"X-Channel={channel}", "--request-id", "r-1"]
    asked += ["--entities", "applicant_id=17", "--inputs", "amount=5"]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    told = orjson.loads(done.stdout)
    assert told["rule"] == rule
    shown = CliRunner().invoke(app, asked).stdout
    assert max(map(len, shown.splitlines())) <= 80
    # What is too long goes on in the next line.
    text = shown + " ".join(shown.split())
    assert f"rule      {rule}: matches" in text
    if rule == "default":
        assert told["tasks"][1]["after"] == ["cheap"]
        assert [arm["drawn"] for arm in told["tasks"][1]["arms"]] == [True, False]
        assert "arm 1: weight 90 (90 %), fraction 0." in text
        assert "after cheap, when has(outputs.cheap) && outputs.cheap.probability > 0.1" in text
        assert "join      quorum 1" in text
        assert "reason    LOW if has(outputs.cheap) && outputs.cheap.probability < 0.1" in text
    assert CliRunner().invoke(app, ["explain", "/a", "-f", str(file), "--header", "x"]).exit_code == 2
