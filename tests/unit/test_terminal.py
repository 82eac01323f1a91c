"""What commands print on a terminal of 80 columns: nothing is squeezed into columns of five characters."""

import orjson
import pytest
from rich.console import Console

from app.adapters.dead_letter_topics import DeadLetter
from app.adapters.dead_letters import dead_letter
from app.adapters.registry_topic import Head
from app.commands.compare import results_table, scores_table
from app.commands.dlt import print_letters
from app.commands.registry import print_changes
from app.commands.rollouts import told
from app.domain.comparison_stats import Comparison
from app.domain.registry import Revision
from app.domain.registry_diff import Change, differences
from app.domain.requests import InboundRecord
from app.domain.rollout_stats import StepStats
from app.domain.rollouts import RolloutName, Running
from app.domain.route_documents import Rollout, RolloutStatus, TaskSpec
from tests.support.registry_documents import changed, revision, sound

REASON = "record of an unknown view: applicant_history_of_a_branch; apply a FeatureView of that name, then redrive"


def test_a_letter_is_told_in_whole_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Place, time, kind and state stand in one line; origin and reason wrap at words under it."""
    monkeypatch.setenv("COLUMNS", "80")
    letters = []
    for offset in (9, 10):
        sent = InboundRecord("features.updates", 3, offset, 1_700_000_000_000, None, None, ())
        out = dead_letter(sent, REASON, "feature_update_refused", "features")
        lies = InboundRecord(out.topic, 3, offset, 1_700_000_000_000, None, None, tuple(out.headers))
        letters.append(DeadLetter(lies, redriven=False))
    print_letters(Console(), letters)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.rstrip() for line in lines if not line.startswith("    ")] == [
        "3/9   2023-11-14T22:13:20  feature_update_refused  waiting",
        "3/10  2023-11-14T22:13:20  feature_update_refused  waiting",
    ]
    told = " ".join(" ".join(lines[1:]).split())
    assert f"of features.updates/3/9: {REASON}" in told


def test_changes_are_told_by_document(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A document's changes stand under its name; digests are cut to what tells them apart."""
    monkeypatch.setenv("COLUMNS", "80")
    before, after = revision(), revision(changed(sound(), "credit", "spec.rules.0.tasks.0.select.split.0.weight", 80))
    digests = (f"sha256:{'a' * 64}", f"sha256:{'b' * 64}")
    changes = (
        *differences(before.documents, after.documents),
        Change("ModelVersion credit-pd-1", "artifact.digest", *digests),
        Change("Route other", "", None, {}),
    )
    print_changes(changes, Head(before.id, None), after)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "Route credit",
        "  rules[default].tasks[pd].select.split[1].weight: 90 → 80",
        "ModelVersion credit-pd-1",
        "  artifact.digest: sha256:aaaaaaaaaaaa… → sha256:bbbbbbbbbbbb…",
        "Route other: new",
        f"1 added, 2 changed → {after.id[:19]}…",
    ]


def test_rollouts_are_readable_in_80_columns() -> None:
    """A rollout's name, state, figures and reason stand whole, however long its route is called."""
    running = Running(
        RolloutName("credit-decision", "private-customers", "probability-of-default"),
        TaskSpec.model_validate_json('{"name": "pd", "model": "credit-pd", "select": {"alias": "champion"}}'),
        Rollout.model_validate_json('{"to": "2026-11-rc1", "steps": [5, 25, 50, 100], "every": "10m"}'),
        RolloutStatus(state="paused", step=1, since=1_790_000_000_000, of="x", reason="errors " + "of many " * 12),
        25.0,
    )
    stats = StepStats(decisions=1_234_567, errors=1_234, compared=123_456, flips=1_234)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(told(revision(), [running], {running.name: stats}, 1_790_000_600_000))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert lines[0] == "credit-decision/private-customers/probability-of-default to version 2026-11-rc1"
    assert lines[1] == "  state  paused: step 2 of 4, 25 %, since 2026-09-21T14:13:20+00:00"
    assert lines[2] == "  seen   1234567 decisions, 1234 errors, 1234 of 123456 flips"
    assert lines[3].startswith("  why    errors of many")
    assert all(line.startswith("         ") for line in lines[4:])


@pytest.mark.parametrize(
    ("decisions", "errors", "after_ms", "said"),
    [
        (10, 0, 544_339, "20m56s of 30m left"),
        (9, 0, 544_339, "9 of at least 10 decisions by version 2"),
        (10, 10, 544_339, "errors in 10 of 10 decisions, above 50.00%"),
        (10, 0, 1_800_000, "10 decisions in 30m or more, within all bounds"),
    ],
)
def test_what_a_rollout_waits_for_is_told(decisions: int, errors: int, after_ms: int, said: str) -> None:
    """Time in minutes and seconds; what comes before it, or is worse, is told in its stead."""
    assert judged(revision(), decisions, errors, after_ms) == said


def test_a_rollout_to_what_has_expired_is_told_to_end() -> None:
    """Nothing is waited for where the new version may not decide."""
    expires = changed(sound(), "credit-pd-2", "spec.governance.validUntil", "2026-09-20")
    assert judged(revision(expires), 10, 0, 544_339) == "credit-pd 2 was valid until 2026-09-20"


def judged(revision: Revision, decisions: int, errors: int, after_ms: int) -> str:
    """What the terminal says of a rollout that has run for ``after_ms``."""
    since = 1_790_000_000_000
    rollout = {"to": "2", "steps": [5, 100], "every": "30m", "minDecisions": 10, "abortOn": {"errorRate": 0.5}}
    running = Running(
        RolloutName("credit", "default", "pd"),
        TaskSpec.model_validate_json('{"name": "pd", "model": "credit-pd", "select": {"alias": "champion"}}'),
        Rollout.model_validate_json(orjson.dumps(rollout)),
        RolloutStatus(state="progressing", step=0, since=since, of="x"),
        25.0,
    )
    console = Console(width=80)
    with console.capture() as capture:
        stats = StepStats(decisions=decisions, errors=errors)
        console.print(told(revision, [running], {running.name: stats}, since + after_ms))
    (line,) = [line for line in capture.get().splitlines() if line.startswith("  judged")]
    return line.removeprefix("  judged").strip()


def test_comparisons_are_readable_in_80_columns() -> None:
    """No figure and no ordinary name is broken over lines."""
    comparison = Comparison()
    for number in range(200):
        outputs = {"champion": {"probability": number / 200}, "shadow": {"probability": number / 210}}
        comparison.feed(
            {
                "outputs": outputs,
                "result": {},
                "flipped": number % 2 == 0,
                "segment": "partner-channel-north",
                "latency_ms": 123.4,
            }
        )
    console = Console(width=80)
    with console.capture() as capture:
        console.print(results_table(comparison))
        console.print(scores_table(comparison))
    lines = capture.get().splitlines()
    assert sum("partner-channel-north" in line for line in lines) == 2
    assert sum(line.startswith("  probability ") for line in lines) == 2
    assert sum("50.00%" in line for line in lines) == 2
