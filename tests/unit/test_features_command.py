"""`model-broker features`: what is told before anything is asked."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.commands.features import named_values
from app.domain.errors import ConfigurationError


@pytest.mark.parametrize("times", [[], ["--event-time", "at", "--event-time-value", "2026-01-31"]])
def test_a_load_names_the_time_of_its_values(tmp_path: Path, times: list[str]) -> None:
    """Exactly one of the two options: there is no default that would make a second load newer than the first."""
    file = tmp_path / "people.csv"
    file.write_text("applicant_id,age_years,at\n1,41,2026-01-31\n")
    result = CliRunner().invoke(app, ["features", "load", str(file), "--view", "applicant", *times])
    assert result.exit_code == 2
    assert "give either --event-time COLUMN, or --event-time-value ISO" in result.stderr


@pytest.mark.parametrize(
    ("given", "names", "expected"),
    [
        (["iban=DE,1"], ["iban"], {"iban": "DE,1"}),
        (["branch=3,iban=DE,1"], ["iban", "branch"], {"branch": "3", "iban": "DE,1"}),
        (["iban=DE,1", "branch=3"], ["iban", "branch"], {"iban": "DE,1", "branch": "3"}),
        (["iban=a=b"], ["iban"], {"iban": "a=b"}),
    ],
)
def test_a_key_may_have_commas(given: list[str], names: list[str], expected: dict[str, str]) -> None:
    """Any key that can be stored can be named, also as `get` and updates' keys write it."""
    assert named_values(given, names) == expected


@pytest.mark.parametrize("given", [["iban=1", "iban=2"], ["iban=1,iban=2"]])
def test_a_key_is_named_once(given: list[str]) -> None:
    """Of two values of one name neither is taken."""
    with pytest.raises(ConfigurationError, match="iban is given twice: 1 and 2"):
        named_values(given, ["iban", "branch"])
