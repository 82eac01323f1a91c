"""The applicants: one row of the data is one person who asks for one loan.

A row is split the way a lender sees it. The loan asked for (`INPUTS`) comes from the caller with the request; what is
known about the applicant (`FEATURES`) waits in the feature store; the label, what became of the loan, is known only to
whoever measures the models. Rows carry no identifier, so their place in the file, counted from 1, is the
`applicant_id`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, cast

DATA = Path(__file__).parent / "data" / "german_credit.csv"
PROJECT = "credit"
VIEW = "applicant"

Label = Literal["good", "bad"]

INPUTS = ("credit_amount", "duration_in_month", "purpose")
FEATURES = (
    "status_of_existing_checking_account",
    "credit_history",
    "savings_account_and_bonds",
    "present_employment_since",
    "installment_rate_in_percentage_of_disposable_income",
    "personal_status_and_sex",
    "other_debtors_or_guarantors",
    "present_residence_since",
    "property",
    "age_in_years",
    "other_installment_plans",
    "housing",
    "number_of_existing_credits_at_this_bank",
    "job",
    "number_of_people_being_liable_to_provide_maintenance_for",
    "telephone",
    "foreign_worker",
)
NUMBERS = frozenset(
    {
        "credit_amount",
        "duration_in_month",
        "installment_rate_in_percentage_of_disposable_income",
        "present_residence_since",
        "age_in_years",
        "number_of_existing_credits_at_this_bank",
        "number_of_people_being_liable_to_provide_maintenance_for",
    }
)
LABEL = "creditability"


@dataclass(frozen=True, slots=True)
class Applicant:
    """One applicant: what is stored about them, what they ask for, and what became of the loan."""

    applicant_id: int
    features: Mapping[str, str | int]
    inputs: Mapping[str, str | int]
    label: Label

    def value(self, column: str) -> str | int:
        """The attribute under the data's own column name, wherever it comes from at decision time."""
        return self.inputs[column] if column in self.inputs else self.features[column]


def read_applicants(path: Path) -> list[Applicant]:
    """Read applicants from a CSV file with the data's columns.

    Raises ValueError naming file, line and column for a file that is not that data.
    """
    with path.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        missing = {*INPUTS, *FEATURES, LABEL}.difference(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: columns missing: {', '.join(sorted(missing))}")
        return [_applicant(path, number, row) for number, row in enumerate(reader, start=1)]


@cache
def applicants() -> tuple[Applicant, ...]:
    """The applicants of the example, in the file's order; `applicant_id` runs from 1 to 1000."""
    return tuple(read_applicants(DATA))


@cache
def categories(column: str) -> tuple[str, ...]:
    """Every label a column of text takes in the data, sorted; a model refuses any other."""
    if column in NUMBERS:
        raise ValueError(f"{column} holds numbers, not categories")
    return tuple(sorted({str(applicant.value(column)) for applicant in applicants()}))


def _applicant(path: Path, number: int, row: Mapping[str, str]) -> Applicant:
    label = row[LABEL]
    if label not in ("good", "bad"):
        raise ValueError(f"{path}, row {number}: {LABEL} is {label!r}, expected good or bad")
    return Applicant(
        applicant_id=number,
        features={column: _value(path, number, column, row[column]) for column in FEATURES},
        inputs={column: _value(path, number, column, row[column]) for column in INPUTS},
        label=cast("Label", label),
    )


def _value(path: Path, number: int, column: str, text: str) -> str | int:
    if column not in NUMBERS:
        return text
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{path}, row {number}: {column} is {text!r}, expected a whole number") from error
