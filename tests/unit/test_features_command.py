"""`model-broker features`: what is told before anything is asked."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app


@pytest.mark.parametrize("times", [[], ["--event-time", "at", "--event-time-value", "2026-01-31"]])
def test_a_load_names_the_time_of_its_values(tmp_path: Path, times: list[str]) -> None:
    """Exactly one of the two options: there is no default that would make a second load newer than the first."""
    file = tmp_path / "people.csv"
    file.write_text("applicant_id,age_years,at\n1,41,2026-01-31\n")
    result = CliRunner().invoke(app, ["features", "load", str(file), "--view", "applicant", *times])
    assert result.exit_code == 2
    assert "give either --event-time COLUMN, or --event-time-value ISO" in result.stderr
