"""The example's pool runner: `expected-amount`, run inside a pool worker's own process.

A pool worker names it as `examples.credit.runner:load`. A factory takes no arguments, so where the models are comes
from the environment: `CREDIT_MODELS_DIR`, the directory that `train` wrote.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.domain.features import Value
from app.ports.model_backend import ModelRunner
from examples.credit.applicants import kind
from examples.credit.artifacts import ArtifactError
from examples.credit.artifacts import load as load_artifact
from examples.credit.inference import Compiled, compile_artifact

MODELS_DIR = "CREDIT_MODELS_DIR"
MODEL = "expected-amount"
VERSION = "1"
OUTPUT = "amount"


@dataclass(frozen=True, slots=True)
class AmountRunner:
    """Answers `amount`, the amount that applicants like a row's ask for, for every row."""

    model: Compiled

    def predict(self, model: str, version: str, columns: Mapping[str, Sequence[Value]]) -> Mapping[str, Sequence[Any]]:
        """Amounts by row; LookupError for another model or version, ValueError for inputs that cannot be used."""
        if (model, version) != (self.model.model, self.model.version):
            raise LookupError(f"{model} version {version} is not here; this runner has {MODEL} version {VERSION}")
        unlike = set(self.model.columns) ^ set(columns)
        if unlike:
            raise ValueError(f"inputs missing or not known: {', '.join(sorted(unlike))}")
        ordered = [_checked(column, columns[column]) for column in self.model.columns]
        if len(set(map(len, ordered))) != 1:
            raise ValueError("inputs differ in their number of rows")
        return {OUTPUT: [self.model.predict(row) for row in zip(*ordered, strict=True)]}


def load() -> ModelRunner:
    """A runner with the artifact in `CREDIT_MODELS_DIR`; ArtifactError when it is not there."""
    directory = os.environ.get(MODELS_DIR)
    if not directory:
        raise ArtifactError(f"{MODELS_DIR} is not set: set it to what `python -m examples.credit.train --out` wrote")
    return AmountRunner(compile_artifact(load_artifact(Path(directory), MODEL, VERSION)))


def _checked(column: str, values: Sequence[Value]) -> list[str | int | float]:
    checked: list[str | int | float] = []
    wanted = kind(column)
    for value in values:
        # Not isinstance: True is an int, and no number of anything.
        if type(value) is not wanted:
            raise ValueError(f"{column} holds {str(value)[:80]!r} ({type(value).__name__}), not {wanted.__name__}")
        checked.append(value)
    return checked
