"""What `decision show` prints of a decision and of what ran beside it."""

from collections.abc import Mapping

import orjson
import pytest
from rich.console import Console

from app.commands.decision import describe
from app.domain.audit_view import readable
from tests.support.audit_records import CODEC, audit_value

EVIDENCE = {
    "task": "pd",
    "champion": "3",
    "shadow": "4",
    "outputs": {"champion": {"probability": 0.12}, "shadow": {"probability": 0.42}},
    "result": {"champion": {"decision": "approve"}, "shadow": {"decision": "refer"}},
    "flipped": True,
    "segment": "web",
    "latency_ms": 7.5,
}


def shown(*shadows: bytes) -> str:
    console = Console(width=160, record=True, file=None, quiet=False)
    record = readable(CODEC.decode(audit_value("r", "e")))
    with console.capture() as capture:
        console.print(describe(record, (), [readable(CODEC.decode(each)) for each in shadows]))
    return capture.get()


def test_a_decision_s_shadows_are_listed_briefly() -> None:
    """Which version, what it would have said, whether that would have changed the result, and in which segment."""
    text = shown(audit_value("r", "s", kind="shadow", evidence=EVIDENCE))
    (line,) = [line for line in text.splitlines() if "pd 4" in line]
    for part in (orjson.dumps({"probability": 0.42}).decode(), '{"decision":"refer"}', "yes", "web"):
        assert part in line


def test_a_shadow_without_an_answer_is_listed_too() -> None:
    """A shadow that failed has no output and flips nothing."""
    failed = EVIDENCE | {"outputs": {"champion": {"probability": 0.12}, "shadow": None}, "result": {}, "flipped": None}
    text = shown(audit_value("r", "s", kind="shadow", evidence=failed))
    assert any("pd 4" in line and "yes" not in line for line in text.splitlines())


def test_a_decision_alone_lists_no_shadows() -> None:
    """Nothing ran beside it, nothing is said of it."""
    assert "would have said" not in shown()


def test_the_steps_of_a_rollout_are_listed_with_their_evidence() -> None:
    """What was done, at which percentage, and what it was judged by."""
    stats = {"decisions": 212, "errors": 7, "flips": 0}
    told = {"action": "abort", "step": 1, "percent": 0, "reason": "errors in 7 of 212 decisions", "stats": stats}
    step = readable(CODEC.decode(audit_value("rollout/a/b/c", "s", kind="rollout", evidence=told)))
    console = Console(width=160)
    with console.capture() as capture:
        console.print(describe(None, (), (), [step]))
    (line,) = [line for line in capture.get().splitlines() if "abort" in line]
    assert all(part in line for part in ("212", "7", "errors in 7 of 212 decisions"))


@pytest.mark.parametrize("decided", [False, True])
def test_what_was_only_refused_says_why_and_what_to_do(decided: bool) -> None:
    """Each refusal's code, message and place; without a decision that the id is still free."""
    said = "reply topic inference.audit is not allowed: the broker keeps its own records there; name one of your own"
    refusal = CODEC.decode(audit_value("r", "f", kind="refusal"))
    refusal["problems"] = orjson.dumps([{"code": "reply_topic_not_allowed", "message": said}])
    record = readable(CODEC.decode(audit_value("r", "e"))) if decided else None
    console = Console(width=160)
    with console.capture() as capture:
        console.print(describe(record, (), refusals=[readable(refusal)]))
    text = capture.get()
    assert f"reply_topic_not_allowed: {said}" in text
    assert "refused  inference.requests/0/7 of 2023-11-14T22:13:20.000+00:00" in text
    assert ("send the request again under the same id" in text) is not decided


def told(task: Mapping[str, object], reply: Mapping[str, object]) -> str:
    """What is printed, 80 columns wide, of a decision whose task is changed so."""
    record = CODEC.decode(audit_value("r", "e"))
    record["tasks"][0] |= task
    record["reply"] = orjson.dumps(reply)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(describe(readable(record), ()))
    return capture.get()


def test_what_stood_in_is_shown_with_what_it_stood_in_for() -> None:
    """The versions that failed first, each with its problem and calls; the experiment and the arm that was drawn."""
    task = CODEC.decode(audit_value("r", "e"))["tasks"][0]
    problem = orjson.dumps({"code": "model_timeout", "message": "no answer within 80ms"})
    failed = task | {
        "version": "4",
        "experiment": "pd-test",
        "result": task["result"] | {"status": "timeout", "output": None, "problem": problem},
    }
    changes = {"selected_by": "fallback alias champion", "experiment": "pd-test", "earlier": [failed]}
    lines = [line.rstrip() for line in told(changes, {}).splitlines()]
    at = lines.index("experiment pd-test, arm 4")
    assert lines[at + 1 : at + 5] == [
        "instead of credit-pd 4, by split, http:",
        "  timeout null in 8.1 ms",
        "    http://127.0.0.1:9001: ok, 7.5 ms",
        "    model_timeout: no answer within 80ms",
    ]
    assert "pd  credit-pd 3, by fallback alias champion, http" in lines


def test_a_skipped_task_says_why() -> None:
    """Its condition, what it comes after, or that enough had answered: as it was recorded."""
    skipped = {"status": "skipped", "output": None, "reason": "its when is false: outputs.pd.probability > 0.3"}
    task = CODEC.decode(audit_value("r", "e"))["tasks"][0]
    text = told({"result": task["result"] | skipped | {"attempts": []}}, {})
    assert "skipped: its when is false: outputs.pd.probability > 0.3" in text


def test_result_and_reasons_stand_by_themselves() -> None:
    """Whoever asks why reads the codes without reading the reply's JSON."""
    text = told({}, {"result": {"decision": "refer"}, "reasons": ["HIGH_PD", "THIN_FILE"]})
    assert 'result  {"decision":"refer"}' in text
    assert "reasons  HIGH_PD, THIN_FILE" in text
