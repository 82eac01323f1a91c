"""Trains the example's models on the spot: `python -m examples.credit.train --out DIR [--json]`.

A fifth of the applicants is held out, the same fifth each time, and no model is fitted on it: the figures printed, and
any accuracy the demo reports on those applicants, are honest. The mean amounts by purpose are of all, as they are when
models are asked; they tell nothing of what became of a loan. Everything random is seeded and everything runs on one
thread, so the same data and library versions give artifacts with the same digests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor, IsolationForest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, r2_score, roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from app.domain.skew import baseline_of, written
from app.domain.version_documents import Baseline
from examples.credit.applicants import Applicant, applicants, categories, kind
from examples.credit.artifacts import SPECS, ModelSpec, baseline_file, read_manifest, save, save_manifest, write_whole

SEED = 20
HOLDOUT_SHARE = 0.2
BAD = 1  # the class whose probability is the probability of default


@dataclass(frozen=True, slots=True)
class Part:
    """Applicants with the target of each kind of model: 1 for a bad loan, and the amount asked for."""

    people: Sequence[Applicant]
    bad: NDArray[np.int64]
    amount: NDArray[np.float64]


def matrix(people: Sequence[Applicant], columns: Sequence[str]) -> NDArray[np.object_]:
    """Raw attributes, one row an applicant and one column an attribute: text and numbers as they come."""
    rows = np.empty((len(people), len(columns)), dtype=object)
    for i, person in enumerate(people):
        rows[i] = [person.value(column) for column in columns]
    return rows


def split() -> tuple[Part, Part]:
    """The applicants that models are fitted on, and those held out."""
    everyone = applicants()
    fitted, held = train_test_split(
        everyone,
        test_size=HOLDOUT_SHARE,
        random_state=SEED,
        stratify=[person.label for person in everyone],
    )
    return _part(fitted), _part(sorted(held, key=lambda person: person.applicant_id))


def fit(spec: ModelSpec, part: Part) -> Any:
    """Fit one model version's pipeline."""
    pipeline = _PIPELINES[spec.name](spec)
    target = part.amount if spec.model == "expected-amount" else part.bad
    return pipeline.fit(matrix(part.people, spec.columns), target)


def measure(spec: ModelSpec, pipeline: Any, part: Part) -> dict[str, float]:
    """How a fitted pipeline does on applicants it has not seen."""
    rows = matrix(part.people, spec.columns)
    match spec.model:
        case "credit-pd":
            probability = pipeline.predict_proba(rows)[:, BAD]
            return {
                "accuracy": float(accuracy_score(part.bad, probability >= 0.5)),
                "auc": float(roc_auc_score(part.bad, probability)),
            }
        case "application-anomaly":
            score = -pipeline.score_samples(rows)
            return {"score_median": float(np.median(score)), "score_max": float(score.max())}
        case _:
            return {"r2": float(r2_score(part.amount, pipeline.predict(rows)))}


def train(directory: Path) -> dict[str, Any]:
    """Train every model version into a directory; returns the manifest written there."""
    directory.mkdir(parents=True, exist_ok=True)
    fitted, held = split()
    digests: dict[str, str] = {}
    metrics: dict[str, dict[str, float]] = {}
    for spec in SPECS:
        pipeline = fit(spec, fitted)
        digests[spec.name] = save(directory, spec, pipeline)
        metrics[spec.name] = measure(spec, pipeline, held)
        write_whole(baseline_file(directory, spec), written(_baseline(spec, fitted)))
    save_manifest(directory, digests, metrics, [person.applicant_id for person in held.people])
    return read_manifest(directory)


def _baseline(spec: ModelSpec, part: Part) -> Baseline:
    """How the inputs that a version was fitted on are distributed: what its inputs are compared with when it serves."""
    rows = ({column: person.value(column) for column in spec.columns} for person in part.people)
    return baseline_of(rows, model=spec.model, version=spec.version)


def _part(people: Sequence[Applicant]) -> Part:
    return Part(
        people=people,
        bad=np.array([person.label == "bad" for person in people], dtype=np.int64),
        amount=np.array([person.value("credit_amount") for person in people], dtype=np.float64),
    )


def _encoder(spec: ModelSpec, numbers: Any) -> ColumnTransformer:
    """Text to one column a label, numbers through `numbers`; columns are found by place, not by name."""
    texts = [i for i, column in enumerate(spec.columns) if kind(column) is str]
    # The labels are given, not learned: a label that the held-out part alone has is still known at inference.
    labels = [list(categories(spec.columns[i])) for i in texts]
    return ColumnTransformer(
        [
            ("text", OneHotEncoder(categories=labels, sparse_output=False, handle_unknown="error"), texts),
            ("number", numbers, [i for i, column in enumerate(spec.columns) if kind(column) is not str]),
        ]
    )


def _scorecard(spec: ModelSpec) -> Pipeline:
    return Pipeline([("encode", _encoder(spec, StandardScaler())), ("model", LogisticRegression(C=0.5, max_iter=1000))])


def _boosted(spec: ModelSpec) -> Pipeline:
    model = GradientBoostingClassifier(
        n_estimators=80, max_depth=3, learning_rate=0.08, subsample=0.8, random_state=SEED
    )
    return Pipeline([("encode", _encoder(spec, "passthrough")), ("model", model)])


def _anomaly(spec: ModelSpec) -> Pipeline:
    # The second version looks at twice as many applications a tree.
    samples = {"1": 128, "2": 256}[spec.version]
    model = IsolationForest(n_estimators=60, max_samples=samples, random_state=SEED)
    return Pipeline([("encode", _encoder(spec, "passthrough")), ("model", model)])


def _amount(spec: ModelSpec) -> Pipeline:
    # Amounts are skewed: fitted on their logarithm, errors count in proportion.
    model = TransformedTargetRegressor(
        GradientBoostingRegressor(n_estimators=80, max_depth=3, learning_rate=0.08, random_state=SEED),
        func=np.log,
        inverse_func=np.exp,
    )
    return Pipeline([("encode", _encoder(spec, "passthrough")), ("model", model)])


_PIPELINES: dict[str, Callable[[ModelSpec], Pipeline]] = {
    "credit-pd-1": _scorecard,
    "credit-pd-2": _boosted,
    "application-anomaly-1": _anomaly,
    "application-anomaly-2": _anomaly,
    "expected-amount-1": _amount,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, then print each artifact's digest and held-out figures."""
    parser = argparse.ArgumentParser(prog="python -m examples.credit.train", description="Train the example's models.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the artifacts go")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    options = parser.parse_args(arguments)
    try:
        manifest = train(options.out)
    except OSError as error:
        print(f"cannot write the models to {options.out}: {error}", file=sys.stderr)
        return 1
    if options.json:
        sys.stdout.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2).decode() + "\n")
        return 0
    table = Table(title=f"models in {options.out}, measured on {len(manifest['holdout'])} applicants held out")
    for heading in ("model", "version", "held out", "digest"):
        table.add_column(heading)
    for entry in manifest["artifacts"].values():
        figures = ", ".join(f"{name} {value:.3f}" for name, value in entry["metrics"].items())
        table.add_row(entry["model"], entry["version"], figures, entry["digest"][:23] + "…")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
