"""The applicants: one row of the data is one person who asks for one loan.

A row is split the way a lender sees it. The loan asked for (`INPUTS`, and its purpose) comes from the caller with the
request; what is known about the applicant (`FEATURES`) waits in the feature store; the label, what became of the loan,
is known only to whoever measures the models. Rows carry no identifier, so their place in the file, counted from 1, is
the `applicant_id`.

`COMPUTED` is in no row: the broker computes it, of a request and of the loans that were asked for lately, and training
must be given the same. It is computed here as `registry/purpose.yaml` and `registry/loan.yaml` say; the tests hold one
against the other.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, cast

DATA = Path(__file__).parent / "data" / "german_credit.csv"
PROJECT = "credit"
VIEW = "applicant"
PURPOSE_VIEW = "purpose"

Label = Literal["good", "bad"]
Attribute = str | int | float

PURPOSE = "purpose"
INPUTS = ("credit_amount", "duration_in_month")
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
MONTHLY_INSTALLMENT = "monthly_installment"
MEAN_AMOUNT = "credit_amount_mean_30d"
AMOUNT_TO_MEAN = "amount_to_mean"
COMPUTED = (MONTHLY_INSTALLMENT, MEAN_AMOUNT, AMOUNT_TO_MEAN)
LABEL = "creditability"


@dataclass(frozen=True, slots=True)
class Applicant:
    """One applicant: what is stored about them, what they ask for, what is computed of it, what became of the loan."""

    applicant_id: int
    purpose: str
    features: Mapping[str, str | int]
    inputs: Mapping[str, int]
    computed: Mapping[str, float]
    label: Label

    @property
    def entities(self) -> Mapping[str, str | int]:
        """Whom and what a request is about: the keys of what is stored."""
        return {"applicant_id": self.applicant_id, PURPOSE: self.purpose}

    def value(self, column: str) -> Attribute:
        """The attribute under the models' name of it, wherever it comes from at decision time."""
        if column == PURPOSE:
            return self.purpose
        found: Attribute | None = self.inputs.get(column)
        if found is None:
            found = self.computed.get(column)
        return self.features[column] if found is None else found


def read_applicants(path: Path) -> list[Applicant]:
    """Read applicants from a CSV file with the data's columns.

    Raises ValueError naming file, line and column for a file that is not that data.
    """
    with path.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        missing = {PURPOSE, *INPUTS, *FEATURES, LABEL}.difference(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: columns missing: {', '.join(sorted(missing))}")
        rows = list(enumerate(reader, start=1))
    means = _mean_amounts((row[PURPOSE], _number(path, number, "credit_amount", row)) for number, row in rows)
    return [_applicant(path, number, row, means) for number, row in rows]


@cache
def applicants() -> tuple[Applicant, ...]:
    """The applicants of the example, in the file's order; `applicant_id` runs from 1 to 1000."""
    return tuple(read_applicants(DATA))


@cache
def categories(column: str) -> tuple[str, ...]:
    """Every label a column of text takes in the data, sorted; a model refuses any other."""
    if kind(column) is not str:
        raise ValueError(f"{column} holds numbers, not categories")
    return tuple(sorted({str(applicant.value(column)) for applicant in applicants()}))


def kind(column: str) -> type[Attribute]:
    """What a column holds: whole numbers, numbers, or text."""
    return int if column in NUMBERS else float if column in COMPUTED else str


def _mean_amounts(loans: Iterable[tuple[str, int]]) -> dict[str, float]:
    """The mean amount by purpose."""
    amounts: defaultdict[str, list[int]] = defaultdict(list)
    for purpose, amount in loans:
        amounts[purpose].append(amount)
    return {purpose: sum(those) / len(those) for purpose, those in amounts.items()}


def _applicant(path: Path, number: int, row: Mapping[str, str], means: Mapping[str, float]) -> Applicant:
    label = row[LABEL]
    if label not in ("good", "bad"):
        raise ValueError(f"{path}, row {number}: {LABEL} is {label!r}, expected good or bad")
    inputs = {column: _number(path, number, column, row) for column in INPUTS}
    amount, months, purpose = inputs["credit_amount"], inputs["duration_in_month"], row[PURPOSE]
    return Applicant(
        applicant_id=number,
        purpose=purpose,
        features={
            column: _number(path, number, column, row) if column in NUMBERS else row[column] for column in FEATURES
        },
        inputs=inputs,
        computed={
            MONTHLY_INSTALLMENT: amount / months,
            MEAN_AMOUNT: means[purpose],
            AMOUNT_TO_MEAN: amount / means[purpose],
        },
        label=cast("Label", label),
    )


def _number(path: Path, number: int, column: str, row: Mapping[str, str]) -> int:
    try:
        return int(row[column])
    except ValueError as error:
        raise ValueError(f"{path}, row {number}: {column} is {row[column]!r}, expected a whole number") from error
