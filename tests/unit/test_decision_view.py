"""What `decision show` prints of a decision and of what ran beside it."""

import orjson
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
