"""The credit example's registry documents and feature updates: they fit the contract, the models and each other."""

import csv
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.adapters.documents_yaml import read_directory
from app.domain.aggregates import Event, State
from app.domain.expressions import Activation, compile_expression
from app.domain.feature_rows import Occurrences, Update, row_reader
from app.domain.feature_updates import FeatureRow
from app.domain.features import FeatureStatus, Fetched
from app.domain.on_demand import closure, compute
from app.domain.registry import Revision, compile_revision, parse
from examples.credit.applicants import (
    COMPUTED,
    DATA,
    FEATURES,
    MEAN_AMOUNT,
    NUMBERS,
    PURPOSE_VIEW,
    VIEW,
    applicants,
    categories,
    kind,
)
from examples.credit.artifacts import SPECS, baseline_files, read_digests
from examples.credit.documents import TEMPLATES, main, write_documents
from examples.credit.loads import commands
from tests.support.registry_documents import request

NOW = datetime(2026, 1, 31, tzinfo=UTC)
NOW_MS = int(NOW.timestamp()) * 1_000
ENDPOINTS = ["http://127.0.0.1:7001", "http://127.0.0.1:7002"]


def _documents(directory: Path) -> dict[tuple[str, str], dict[str, Any]]:
    documents = [
        document for path in sorted(directory.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
    ]
    return {(document["kind"], document["metadata"]["name"]): document["spec"] for document in documents}


@pytest.fixture(scope="module")
def written(credit_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("documents")
    files = baseline_files(credit_models)
    write_documents(out, endpoints=ENDPOINTS, digests=read_digests(credit_models), baselines=files)
    return out


def test_templates_and_written_documents_are_whole_revisions(written: Path) -> None:
    """The documents, as committed and as written, are together a revision that `apply` accepts."""
    for directory in (TEMPLATES, written):
        sources, faults = read_directory([directory])
        assert not faults
        revision = compile_revision(parse(sources))
        assert set(revision.versions) == {(spec.model, spec.version) for spec in SPECS}


def test_a_version_s_baseline_is_of_what_it_was_fitted_on(written: Path) -> None:
    """Each version's has all of its columns, and the 800 applicants that are not held out."""
    sources, _ = read_directory([written])
    versions = compile_revision(parse(sources)).versions
    for spec in SPECS:
        baseline = versions[spec.model, spec.version].baseline
        assert baseline is not None
        assert (set(baseline.features), baseline.rows) == (set(spec.columns), 800)
        for column, feature in baseline.features.items():
            assert (feature.edges is not None) == (kind(column) is not str)


def test_endpoints_and_digests_are_the_run_s(written: Path, credit_models: Path) -> None:
    """Every version carries its artifact's digest, and every HTTP backend the run's servers; the rest is unchanged."""
    templates, documents = _documents(TEMPLATES), _documents(written)
    digests = read_digests(credit_models)
    assert documents.keys() == templates.keys()
    for (sort, name), spec in documents.items():
        expected = templates[sort, name]
        if sort == "ModelVersion":
            expected["digest"] = digests[name]
            copied = (written / spec["baseline"]["file"]).read_bytes()
            assert copied == (credit_models / f"{name}.baseline.json").read_bytes()
            expected["baseline"] = spec["baseline"]
            if expected["backend"]["type"] == "http":
                expected["backend"]["endpoints"] = ENDPOINTS
        assert spec == expected


def test_versions_declare_what_their_artifacts_read() -> None:
    """A version's features are its artifact's columns, each from where it is; types and defaults are the model's."""
    documents = _documents(TEMPLATES)
    view = {feature["name"]: feature["type"] for feature in documents["FeatureView", VIEW]["features"]}
    assert view == {name: "INT64" if name in NUMBERS else "STRING" for name in FEATURES}
    sources = dict.fromkeys(FEATURES, VIEW) | {
        "purpose": "entities",
        "monthly_installment": "loan",
        "amount_to_mean": "loan",
        "credit_amount_mean_30d": PURPOSE_VIEW,
    }
    for spec in SPECS:
        features = documents["ModelVersion", spec.name]["features"]
        assert [feature["ref"].partition(".")[2] for feature in features] == list(spec.columns)
        for feature in features:
            source, _, column = feature["ref"].partition(".")
            assert source == sources.get(column, "inputs")
            assert feature.get("required") or "default" in feature
            if "default" in feature:
                assert type(feature["default"]) is kind(column)
                assert kind(column) is not str or feature["default"] in categories(column)


@pytest.mark.parametrize(
    ("probability", "outputs", "decision"),
    [
        (0.1, {"anomaly": {"score": 0.45}, "amount": {"amount": 2000.0}}, "approve"),
        (0.1, {"anomaly": {"score": 0.45}}, "approve"),
        (0.1, {"anomaly": {"score": 0.45}, "amount": {"amount": 1000.0}}, "refer"),
        (0.1, {"anomaly": {"score": 1.0}, "amount": {"amount": 2000.0}}, "refer"),
        (0.5, {"anomaly": {"score": 0.45}, "amount": {"amount": 2000.0}}, "refer"),
        (0.6, {"anomaly": {"score": 1.0}}, "decline"),
    ],
)
def test_the_route_s_result(probability: float, outputs: dict[str, Any], decision: str) -> None:
    """Likely losses are declined; unlikely, usual and usually sized loans approved; all else goes to a person."""
    rule = _documents(TEMPLATES)["Route", "credit"]["rules"][0]
    values = {"outputs": {"pd": {"probability": probability}, **outputs}, "inputs": {"credit_amount": 3500}}
    activation = Activation(values)
    results = {
        name: compile_expression(text, ("outputs", "inputs")).evaluate(activation)
        for name, text in rule["result"].items()
    }
    assert results == {"decision": decision}


def test_only_products_that_the_data_knows_match() -> None:
    """A mortgage matches no rule."""
    when = compile_expression(_documents(TEMPLATES)["Route", "credit"]["rules"][0]["when"], ("metadata",))
    assert when.evaluate(Activation({"metadata": {"product": "consumer"}})) is True
    assert when.evaluate(Activation({"metadata": {"product": "mortgage"}})) is False


def test_nothing_is_written_without_an_endpoint_or_a_digest(credit_models: Path, tmp_path: Path) -> None:
    """Missing endpoints or digests are refused before a file is written."""
    digests = read_digests(credit_models)
    with pytest.raises(ValueError, match="at least one endpoint"):
        write_documents(tmp_path, endpoints=[], digests=digests)
    del digests["credit-pd-2"]
    with pytest.raises(ValueError, match="no digest of credit-pd-2"):
        write_documents(tmp_path, endpoints=ENDPOINTS, digests=digests)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_and_refuses(
    credit_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command lists what it wrote; without models it says how to train them and exits 1."""
    arguments = ["--endpoint", "http://127.0.0.1:7001/", "--out", str(tmp_path / "out")]
    assert main(["--models", str(credit_models), *arguments]) == 0
    assert str(tmp_path / "out" / "credit-pd.yaml") in capsys.readouterr().out
    spec = _documents(tmp_path / "out")["ModelVersion", "credit-pd-1"]
    assert spec["backend"]["endpoints"] == ["http://127.0.0.1:7001"]
    assert main(["--models", str(tmp_path), *arguments]) == 1
    assert "run `python -m examples.credit.train" in capsys.readouterr().err


def _rows(revision: Revision, view: str) -> Iterator[tuple[Update, FeatureRow]]:
    """What the demo's load of ``view`` publishes of each row of the data."""
    words = commands(NOW)[view]
    mapping = {"@row": "applicant_id"} if "@row=applicant_id" in words else {}
    with DATA.open(newline="") as lines:
        cells = csv.DictReader(lines)
        reader, _ = row_reader(
            view,
            revision.views[view],
            cells.fieldnames or (),
            mapping=mapping,
            time_column=None,
            time_ms=NOW_MS,
            text=True,
        )
        same = Occurrences()
        for number, cell in enumerate(cells, start=1):
            update, row = reader.read(number, cell, NOW_MS)
            yield same.numbered(update), row


@pytest.fixture(scope="module")
def revision() -> Revision:
    return compile_revision(parse(read_directory([TEMPLATES])[0]))


def test_what_is_loaded_of_an_applicant_is_what_models_were_fitted_on(revision: Revision) -> None:
    """The rows that `features load` makes of the data; the loan asked for and its label stay out of the view."""
    loaded = [row for _, row in _rows(revision, VIEW)]
    assert [row.key.values for row in loaded] == [(person.applicant_id,) for person in applicants()]
    for row, person in zip(loaded, applicants(), strict=True):
        assert dict(zip(row.names, row.values, strict=True)) == person.features


def test_what_is_computed_is_what_models_were_fitted_on(revision: Revision) -> None:
    """The aggregate of the loaded loans, and what is computed of it on demand, equal training's values bit by bit."""
    view = revision.views[PURPOSE_VIEW]
    assert view.plan is not None
    states: defaultdict[str, State] = defaultdict(State)
    for offset, (update, row) in enumerate(_rows(revision, PURPOSE_VIEW)):
        event = Event(offset, row.event_time_ms, dict(zip(row.names, row.values, strict=True)), update.id.decode())
        assert view.plan.feed(states[str(row.key.values[0])], event) == "counted"
    computations = closure([("loan", "monthly_installment"), ("loan", "amount_to_mean")], revision.computations)
    for person in applicants():
        (mean,) = view.plan.values(states[person.purpose], NOW_MS)
        stored = {(PURPOSE_VIEW, MEAN_AMOUNT): Fetched(FeatureStatus.PRESENT, mean, NOW_MS)}
        asked = request(entities=dict(person.entities), inputs=dict(person.inputs))
        found = compute(computations, asked, stored, {}, revision.views, NOW_MS)
        assert {name: value.value for (_, name), value in found.items()} == person.computed
    assert set(person.computed) == set(COMPUTED)
