"""The credit example's pool runner: scikit-learn's amounts, and clear refusals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from app.domain.features import Value
from app.ports.model_backend import ModelRunner
from examples.credit.applicants import applicants
from examples.credit.artifacts import ArtifactError, load, spec_of
from examples.credit.runner import MODELS_DIR
from examples.credit.runner import load as load_runner
from examples.credit.train import matrix

MODEL = "expected-amount"


@pytest.fixture
def runner(credit_models: Path, monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    monkeypatch.setenv(MODELS_DIR, str(credit_models))
    return load_runner()


def _columns(rows: int) -> dict[str, Sequence[Value]]:
    people = applicants()[:rows]
    return {column: [person.value(column) for person in people] for column in spec_of(MODEL, "1").columns}


def test_amounts_are_scikit_learn_s(runner: ModelRunner, credit_models: Path) -> None:
    """One amount a row, in the rows' order."""
    outputs = runner.predict(MODEL, "1", _columns(50))
    expected = load(credit_models, MODEL, "1").pipeline.predict(matrix(applicants()[:50], spec_of(MODEL, "1").columns))
    assert list(outputs) == ["amount"]
    np.testing.assert_allclose(outputs["amount"], expected, rtol=1e-12)


@pytest.mark.parametrize(("model", "version"), [("credit-pd", "1"), (MODEL, "2")])
def test_another_model_or_version_is_not_here(runner: ModelRunner, model: str, version: str) -> None:
    """Only the version that was loaded answers."""
    with pytest.raises(LookupError, match=f"{model} version {version} is not here"):
        runner.predict(model, version, _columns(1))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("purpose", ["a boat"], "purpose is 'a boat'"),
        ("purpose", [None], r"purpose holds 'None' \(NoneType\), not str"),
        ("age_in_years", ["35"], r"age_in_years holds '35' \(str\), not int"),
        ("age_in_years", [True], r"age_in_years holds 'True' \(bool\), not int"),
        ("age_in_years", [35, 36], "inputs differ in their number of rows"),
        ("credit_amount", [5000], "not known: credit_amount"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused(
    runner: ModelRunner, column: str, values: list[Value], message: str
) -> None:
    """An unknown label, a value of another type, unequal rows or a column too many are refused by name."""
    with pytest.raises(ValueError, match=message):
        runner.predict(MODEL, "1", _columns(1) | {column: values})


def test_a_missing_column_is_refused(runner: ModelRunner) -> None:
    """A column that the model reads must be there."""
    columns = _columns(1)
    del columns["purpose"]
    with pytest.raises(ValueError, match="inputs missing or not known: purpose"):
        runner.predict(MODEL, "1", columns)


def test_where_the_models_are_must_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the environment's variable the factory says which to set."""
    monkeypatch.delenv(MODELS_DIR, raising=False)
    with pytest.raises(ArtifactError, match="CREDIT_MODELS_DIR is not set"):
        load_runner()
