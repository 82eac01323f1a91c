"""Model artifacts: files that `train` leaves behind and that servers and runners load.

A models directory holds one joblib file for each model version and `manifest.json`, which names every file with its
sha256 digest and how the model did on applicants it was not fitted on. The digest is what the registry's ModelVersion
documents carry and what each decision records, so it is checked before a file is opened: a joblib file is code, and an
artifact that is not the registered one must not answer. Beside each artifact is the baseline of the inputs that it was
fitted on, which the document names and the registry holds.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import orjson

MANIFEST = "manifest.json"


class ArtifactError(Exception):
    """A models directory does not hold what it should; train again into it."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a model version is called and which attributes it reads, in the order of its columns."""

    model: str
    version: str
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the ModelVersion document: model and version."""
        return f"{self.model}-{self.version}"


# No model reads personal_status_and_sex or foreign_worker: they are stored so that decisions can be checked for
# unequal treatment, and a lender may not decide by them.
_SCORECARD = (
    "credit_amount",
    "duration_in_month",
    "purpose",
    "status_of_existing_checking_account",
    "credit_history",
    "savings_account_and_bonds",
    "present_employment_since",
    "installment_rate_in_percentage_of_disposable_income",
    "other_debtors_or_guarantors",
    "property",
    "age_in_years",
    "other_installment_plans",
    "housing",
)
_APPLICATION = (
    "credit_amount",
    "duration_in_month",
    "purpose",
    "status_of_existing_checking_account",
    "savings_account_and_bonds",
    "present_employment_since",
    "age_in_years",
    "number_of_existing_credits_at_this_bank",
)
SPECS = (
    ModelSpec("credit-pd", "1", _SCORECARD),
    ModelSpec(
        "credit-pd",
        "2",
        (
            *_SCORECARD,
            "present_residence_since",
            "number_of_existing_credits_at_this_bank",
            "job",
            "telephone",
            "monthly_installment",
        ),
    ),
    ModelSpec("application-anomaly", "1", _APPLICATION),
    ModelSpec("application-anomaly", "2", (*_APPLICATION, "credit_amount_mean_30d", "amount_to_mean")),
    ModelSpec(
        "expected-amount",
        "1",
        (
            "duration_in_month",
            "purpose",
            "present_employment_since",
            "installment_rate_in_percentage_of_disposable_income",
            "property",
            "age_in_years",
            "job",
            "telephone",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A fitted scikit-learn pipeline with the identity it was trained under."""

    spec: ModelSpec
    digest: str
    pipeline: Any


def spec_of(model: str, version: str) -> ModelSpec:
    """The example's model version of that name; LookupError when it has none."""
    for spec in SPECS:
        if (spec.model, spec.version) == (model, version):
            return spec
    raise LookupError(f"the example has no {model} version {version}")


def save(directory: Path, spec: ModelSpec, pipeline: Any) -> str:
    """Write a fitted pipeline under its version's name; returns the file's digest, `sha256:<hex>`."""
    buffer = io.BytesIO()
    content = {
        "model": spec.model,
        "version": spec.version,
        "columns": list(spec.columns),
        "pipeline": pipeline,
    }
    joblib.dump(content, buffer)
    data = buffer.getvalue()
    write_whole(directory / _file(spec), data)
    return _digest(data)


def baseline_file(directory: Path, spec: ModelSpec) -> Path:
    """Where the baseline of a version's inputs is, beside its artifact."""
    return directory / f"{spec.name}.baseline.json"


def baseline_files(directory: Path) -> dict[str, Path]:
    """The baselines of a models directory by ModelVersion name, as `write_documents` takes them."""
    files = {spec.name: baseline_file(directory, spec) for spec in SPECS}
    for path in files.values():
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist: {_remedy(directory)}")
    return files


def save_manifest(
    directory: Path, digests: Mapping[str, str], metrics: Mapping[str, Mapping[str, float]], holdout: list[int]
) -> None:
    """Write `manifest.json`; the last file written, so that its presence means training has ended."""
    manifest = {
        "artifacts": {
            spec.name: {
                "model": spec.model,
                "version": spec.version,
                "file": _file(spec),
                "digest": digests[spec.name],
                "metrics": metrics[spec.name],
            }
            for spec in SPECS
        },
        "holdout": holdout,
    }
    write_whole(directory / MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a models directory: `artifacts` by ModelVersion name, `holdout` applicant ids."""
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = orjson.loads(path.read_bytes())
        known = {name: str(entry["digest"]) for name, entry in manifest["artifacts"].items()}
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist: {_remedy(directory)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is no manifest ({error!r}): {_remedy(directory)}") from error
    missing = [spec.name for spec in SPECS if not known.get(spec.name, "").startswith("sha256:")]
    if missing:
        raise ArtifactError(f"{path} has no digest of {', '.join(missing)}: {_remedy(directory)}")
    return manifest


def read_digests(directory: Path) -> dict[str, str]:
    """Digests of a models directory by ModelVersion name, as `write_documents` takes them."""
    return {name: entry["digest"] for name, entry in read_manifest(directory)["artifacts"].items()}


def load(directory: Path, model: str, version: str) -> Artifact:
    """Load one model version after checking its digest against the manifest.

    Raises ArtifactError when the file is absent or not the one the manifest names.
    """
    spec = spec_of(model, version)
    path = directory / _file(spec)
    expected = read_digests(directory)[spec.name]
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist: {_remedy(directory)}") from error
    digest = _digest(data)
    if digest != expected:
        raise ArtifactError(f"{path} is {digest}, the manifest says {expected}: {_remedy(directory)}")
    content = joblib.load(io.BytesIO(data))
    if content["columns"] != list(spec.columns):
        raise ArtifactError(f"{path} reads {content['columns']}, expected {list(spec.columns)}: {_remedy(directory)}")
    return Artifact(spec, digest, content["pipeline"])


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def _remedy(directory: Path) -> str:
    return f"run `python -m examples.credit.train --out {directory}`"


def _file(spec: ModelSpec) -> str:
    return f"{spec.name}.joblib"


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
