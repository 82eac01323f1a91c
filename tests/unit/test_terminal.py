"""What commands print on a terminal of 80 columns: nothing is squeezed into columns of five characters."""

import pytest
from rich.console import Console

from app.adapters.dead_letter_topics import DeadLetter
from app.adapters.dead_letters import dead_letter
from app.adapters.registry_topic import Head
from app.commands.dlt import print_letters
from app.commands.registry import print_changes
from app.domain.registry_diff import Change, differences
from app.domain.requests import InboundRecord
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
