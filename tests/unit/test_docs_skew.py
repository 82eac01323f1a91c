"""docs/features-skew.md: its baseline is made, applied and held against inputs as the page says."""

import csv
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from app.agents.skew import SkewGuard
from app.cli import app
from app.commands.registry import read_files
from app.domain.features import FeatureStatus, FeatureValue
from app.settings import Settings
from tests.support.markdown import ROOT, blocks_of
from tests.support.request_reply import FixedClock

PAGE = ROOT / "docs" / "features-skew.md"
BLOCKS = blocks_of(PAGE)


def test_the_example_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training data, command, document and indices: rows of training with amounts changed give what is shown."""
    monkeypatch.chdir(tmp_path)
    (program,) = (block.text for block in BLOCKS if block.language == "python")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    (command,) = (block.text for block in BLOCKS if block.language == "bash")
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    documents, _ = (block.text for block in BLOCKS if block.language == "yaml")
    Path("registry.yaml").write_text(documents)
    revision = read_files([tmp_path], today=None)
    guard = SkewGuard(clock=FixedClock(), settings=Settings())
    guard.on_revision(revision)
    spec = revision.versions["credit-pd", "3"]
    (factor,) = re.findall(r"<!-- skew: ([\d.]+) -->", PAGE.read_text())
    with Path("training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in random.Random(1).sample(rows, len(rows)):
        age = FeatureStatus.PRESENT if row["age"] else FeatureStatus.DEFAULTED
        given = [
            FeatureValue("inputs.amount", FeatureStatus.PRESENT, round(int(row["amount"]) * float(factor)), None, "t"),
            FeatureValue("inputs.age", age, int(row["age"] or 35), None, "t"),
            FeatureValue("inputs.purpose", FeatureStatus.PRESENT, row["purpose"], None, "t"),
        ]
        guard.observe(spec, given)
    (index, *_) = guard.metrics()
    (shown,) = (block.text for block in BLOCKS if block.text.startswith("broker_feature_psi"))
    samples = [sample for family in text_string_to_metric_families(shown) for sample in family.samples]
    assert [(each.labels, each.value) for each in samples] == [
        (each.labels, round(each.value, 2)) for each in index.samples
    ]


def test_the_rules_name_what_is_told() -> None:
    """Every metric in the alert rules is exported with the labels that they sum by, or recorded above."""
    (rules,) = (block.text for block in BLOCKS if block.text.startswith("groups:"))
    families = list(SkewGuard(clock=FixedClock(), settings=Settings()).metrics())
    exported = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    labels = {label for family in families for label in family._labelnames}  # type: ignore[attr-defined]  # no other way
    recorded: set[str] = set()
    for rule in yaml.safe_load(rules)["groups"][0]["rules"]:
        assert set(re.findall(r"\bbroker_[a-z_]+", rule["expr"])) <= exported
        assert set(re.findall(r"\bbroker:[a-z_]+(?::\w+)?", rule["expr"])) <= recorded
        for listed in re.findall(r"(?:by|on) \(([^)]*)\)", rule["expr"]):
            assert set(listed.split(", ")) <= labels
        recorded |= {rule["record"]} if "record" in rule else set()
