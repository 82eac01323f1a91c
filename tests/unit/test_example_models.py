"""The credit example's models: training gives the same files again, and compiled answers are scikit-learn's."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from examples.credit.applicants import COMPUTED, FEATURES, INPUTS, applicants, categories, read_applicants
from examples.credit.artifacts import SPECS, ArtifactError, ModelSpec, load, read_digests, read_manifest
from examples.credit.inference import UnknownLabelError, compile_artifact
from examples.credit.train import matrix

TRAIN_SECONDS = 120


def _by_sklearn(spec: ModelSpec, pipeline: Any) -> Any:
    rows = matrix(applicants(), spec.columns)
    match spec.model:
        case "credit-pd":
            return pipeline.predict_proba(rows)[:, 1]
        case "application-anomaly":
            return -pipeline.score_samples(rows)
        case _:
            return pipeline.predict(rows)


def test_applicants_are_numbered_in_the_order_of_the_data() -> None:
    """1,000 applicants, ids from 1, each attribute either the caller's or the store's."""
    people = applicants()
    assert [person.applicant_id for person in people] == list(range(1, 1001))
    assert all(tuple(person.inputs) == INPUTS and tuple(person.features) == FEATURES for person in people)
    assert people[0].value("credit_amount") == 1169
    assert people[0].value("age_in_years") == 67
    assert people[0].value("purpose") == "radio/television"
    assert people[0].value("monthly_installment") == 1169 / 6
    assert sum(person.label == "bad" for person in people) == 300


def test_a_file_that_is_not_the_data_is_refused_by_column(tmp_path: Path) -> None:
    """A file without the data's columns is refused and the columns are named."""
    file = tmp_path / "other.csv"
    file.write_text("purpose,age_in_years\nrepairs,40\n")
    with pytest.raises(ValueError, match=r"other\.csv: columns missing: .*credit_amount"):
        read_applicants(file)


def test_no_model_reads_what_a_lender_may_not_decide_by() -> None:
    """Sex and origin are stored for checks of unequal treatment; no model version has them as a column."""
    for spec in SPECS:
        assert not {"personal_status_and_sex", "foreign_worker"} & set(spec.columns)


def test_the_expected_amount_is_not_told_the_amount() -> None:
    """The model that predicts the amount takes neither it nor what is computed of it."""
    told = {"credit_amount", *COMPUTED}
    assert not any(told & set(spec.columns) for spec in SPECS if spec.model == "expected-amount")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_compiled_answers_equal_scikit_learn_for_every_applicant(credit_models: Path, spec: ModelSpec) -> None:
    """The compiled model agrees with its pipeline on all 1,000 applicants to rounding."""
    artifact = load(credit_models, spec.model, spec.version)
    compiled = compile_artifact(artifact)
    rows = [[person.value(column) for column in spec.columns] for person in applicants()]
    np.testing.assert_allclose(
        [compiled.predict(row) for row in rows], _by_sklearn(spec, artifact.pipeline), rtol=1e-12, atol=0
    )
    assert compiled.digest == artifact.digest


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_label_that_no_model_knows_is_refused(credit_models: Path, spec: ModelSpec) -> None:
    """A text outside a column's labels is an error that names column, text and labels; nothing is guessed."""
    compiled = compile_artifact(load(credit_models, spec.model, spec.version))
    row = [applicants()[0].value(column) for column in spec.columns]
    row[spec.columns.index("purpose")] = "a boat"
    with pytest.raises(UnknownLabelError, match=r"purpose is 'a boat', .* known: business"):
        compiled.predict(row)


def test_training_again_gives_the_same_digests(credit_models: Path, tmp_path: Path) -> None:
    """Another process trains to the same files, and says so as JSON."""
    command = [sys.executable, "-m", "examples.credit.train", "--out", str(tmp_path), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, timeout=TRAIN_SECONDS)
    printed = orjson.loads(done.stdout)
    assert {name: entry["digest"] for name, entry in printed["artifacts"].items()} == read_digests(credit_models)
    assert read_manifest(tmp_path) == printed


def test_models_are_measured_on_applicants_they_have_not_seen(credit_models: Path) -> None:
    """A fifth is held out, and on it both scorecards beat saying good to everyone (70 %)."""
    manifest = read_manifest(credit_models)
    assert len(set(manifest["holdout"])) == 200
    for name in ("credit-pd-1", "credit-pd-2"):
        assert manifest["artifacts"][name]["metrics"]["accuracy"] > 0.72
        assert manifest["artifacts"][name]["metrics"]["auc"] > 0.75
    assert manifest["artifacts"]["expected-amount-1"]["metrics"]["r2"] > 0.4


def test_a_file_that_is_not_the_manifest_s_is_not_opened(credit_models: Path, tmp_path: Path) -> None:
    """An artifact whose digest is not the manifest's is refused before it is unpickled."""
    for file in credit_models.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "credit-pd-1.joblib").write_bytes(b"something else")
    with pytest.raises(ArtifactError, match=r"credit-pd-1\.joblib is sha256:.*, the manifest says sha256:"):
        load(tmp_path, "credit-pd", "1")


def test_a_directory_without_models_says_how_to_get_them(tmp_path: Path) -> None:
    """Loading from an empty directory names the command that trains."""
    with pytest.raises(ArtifactError, match=r"manifest\.json does not exist: run `python -m examples\.credit\.train"):
        load(tmp_path, "credit-pd", "1")


def test_categories_are_of_text_columns_only() -> None:
    """Labels are every text of a column; a column of numbers has none."""
    assert categories("telephone") == ("none", "yes, registered under the customers name")
    with pytest.raises(ValueError, match="age_in_years holds numbers"):
        categories("age_in_years")
