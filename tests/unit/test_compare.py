"""What `compare` collects from the audit's log, and how it is shown."""

from dataclasses import replace
from typing import Any

from rich.console import Console

from app.commands.compare import collect, results_table, scores_table
from app.domain.requests import InboundRecord
from tests.support.audit_records import audit_record


def shadow(offset: int, *, execution: str | None = None, **more: Any) -> InboundRecord:
    evidence = {
        "task": "pd",
        "champion": "3",
        "shadow": "4",
        "outputs": {"champion": {"probability": 0.1}, "shadow": {"probability": 0.3}},
        "result": {"champion": {"decision": "approve"}, "shadow": {"decision": "refer"}},
        "flipped": True,
        "segment": "web",
        "latency_ms": 7.5,
    }
    return audit_record(offset, "r", execution or f"s-{offset}", kind="shadow", evidence=evidence | more)


def test_only_the_shadows_of_the_route_s_task_count() -> None:
    """Decisions, other tasks, other routes and records that cannot be read are passed by; versions are kept apart."""
    damaged = replace(shadow(5), value=b"\xc3\x01damaged")
    records = [
        audit_record(0),
        shadow(1),
        shadow(2, task="fraud"),
        shadow(3, shadow="5", champion="2"),
        damaged,
        replace(shadow(6), value=None),
    ]
    found = collect(records, "credit-decision", "pd")
    assert {version: (each.comparison.overall.count, each.champions) for version, each in found.items()} == {
        "4": (1, {"3"}),
        "5": (1, {"2"}),
    }
    assert collect(records, "another", "pd") == {}


def test_a_record_that_is_in_the_log_twice_counts_once() -> None:
    """A worker that is killed may have recorded a shadow that the next one records again."""
    found = collect([shadow(1, execution="s"), shadow(2, execution="s"), shadow(3)], "credit-decision", "pd")
    assert found["4"].comparison.overall.count == 2


def test_the_tables_say_the_figures() -> None:
    """Overall first, then each segment."""
    (compared,) = collect([shadow(1), shadow(2, flipped=False)], "credit-decision", "pd").values()
    console = Console(width=120)
    with console.capture() as capture:
        console.print(results_table(compared.comparison))
        console.print(scores_table(compared.comparison))
    text = capture.get()
    assert "50.00%" in text
    assert "+0.2" in text
    assert text.index("all") < text.index("web")
