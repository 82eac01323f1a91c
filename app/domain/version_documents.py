"""The shape of ModelVersion documents: where a version runs, what it needs, what it answers, who approved it."""

import datetime
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, model_validator

from app.domain.document_parts import (
    CallDurationMs,
    Datatype,
    DocumentPart,
    Identifier,
    Name,
    Scalar,
    ValueType,
    VersionLabel,
)
from app.durations import WrittenDurationMs, within


class ColumnsInput(DocumentPart):
    """How features become tensors: one tensor a feature, or one matrix of them all in the order they are declared."""

    layout: Literal["columns", "matrix"] = "columns"
    tensor: str | None = Field(None, description="the matrix's tensor name")
    datatype: Datatype | None = Field(None, description="the matrix's datatype")

    @model_validator(mode="after")
    def _matrix_is_whole(self) -> "ColumnsInput":
        if self.layout == "matrix" and (self.tensor is None or self.datatype not in ("FP32", "FP64", "INT32", "INT64")):
            raise ValueError(
                "layout: matrix needs tensor (its name) and a numeric datatype: FP32, FP64, INT32 or INT64"
            )
        if self.layout == "columns" and (self.tensor or self.datatype):
            raise ValueError("tensor and datatype belong to layout: matrix")
        return self


class HttpBackend(DocumentPart):
    """An inline backend: an Open Inference Protocol v2 server at one or more endpoints, taken in turn."""

    type: Literal["http"]
    protocol: Literal["oip-v2"] = "oip-v2"
    endpoints: tuple[Annotated[str, StringConstraints(pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$")], ...] = Field(
        min_length=1, max_length=64
    )
    model_name: str | None = Field(None, alias="modelName", description="the server's name of the model; default: ours")
    model_version: str | None = Field(
        None, alias="modelVersion", description="the server's version; default: ours; empty: none in the URL"
    )
    input: ColumnsInput = ColumnsInput()


class KafkaBackend(DocumentPart):
    """A queued backend: tasks go to ``inference.tasks.<pool>``, and pool workers answer on ``inference.results``."""

    type: Literal["kafka"]
    pool: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]


Backend = Annotated[HttpBackend | KafkaBackend, Field(discriminator="type")]


class FeatureContract(DocumentPart):
    """One input of a model version: where it comes from, and what holds when it is missing or old."""

    ref: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_-]*\.[A-Za-z_][A-Za-z0-9_]*$")]
    name: Identifier | None = Field(None, description="the model's name of it; default: the part after the dot")
    required: bool = False
    default: Scalar | tuple[Scalar, ...] = None
    max_age: WrittenDurationMs | None = Field(None, alias="maxAge", description="older values are STALE")
    on_violation: Literal["reject", "default", "refer"] | None = Field(
        None, alias="onViolation", description="default: reject where required, else default; refer: a person decides"
    )
    type: ValueType | None = Field(None, description="of inputs, entities and metadata; a view declares its own")

    @cached_property
    def source(self) -> str:
        """The part before the dot: a view, or ``inputs``, ``entities``, ``metadata``."""
        return self.ref.partition(".")[0]

    @cached_property
    def feature(self) -> str:
        """The part after the dot."""
        return self.ref.partition(".")[2]

    @cached_property
    def column(self) -> str:
        """The model's name of it."""
        return self.name or self.feature

    @cached_property
    def violation(self) -> Literal["reject", "default", "refer"]:
        """What a violation does: a required value that is missing or null, or any that is stale or an error."""
        return self.on_violation or ("reject" if self.required else "default")

    @model_validator(mode="after")
    def _required_or_default(self) -> "FeatureContract":
        if self.required and "default" in self.model_fields_set:
            raise ValueError("a feature is either required or has a default; remove one")
        if self.required and self.on_violation == "default":
            raise ValueError(
                "required and onViolation: default contradict one another: remove required, or reject or refer"
            )
        return self


class OutputContract(DocumentPart):
    """One output of a model version: the server's tensor, which element of a row, and what values are sound."""

    name: Identifier
    from_: str | None = Field(None, alias="from", description="the server's tensor; default: the same name")
    element: int | None = Field(None, ge=0, description="of a row; default: the only one")
    datatype: Datatype
    min: float | None = None
    max: float | None = None

    @property
    def tensor(self) -> str:
        """The server's name of it."""
        return self.from_ or self.name


class Outlier(DocumentPart):
    """When an endpoint that keeps failing is left out for a while: as Envoy's outlier detection."""

    consecutive_failures: int = Field(
        5, alias="consecutiveFailures", ge=0, le=1_000, description="in a row: timeouts, 5xx, no connection; 0: never"
    )
    base_ejection: Annotated[WrittenDurationMs, within("1ms", "1h")] = Field(
        5_000, alias="baseEjection", description="for so long, times how often it was ejected"
    )
    max_ejection: Annotated[WrittenDurationMs, within("1ms", "1h")] = Field(
        60_000, alias="maxEjection", description="and never longer"
    )

    @model_validator(mode="after")
    def _base_within_max(self) -> "Outlier":
        if self.base_ejection > self.max_ejection:
            raise ValueError("baseEjection is above maxEjection; lower it, or raise maxEjection")
        return self


class BatchPolicy(DocumentPart):
    """That rows of several requests may share a call while the model is busy; its server must take several rows."""

    max_size: int = Field(alias="maxSize", ge=2, le=256, description="rows of one call")


class CallPolicy(DocumentPart):
    """How a version is called; of a queued one, only how long its answer is waited for."""

    timeout: CallDurationMs = Field(1_000, description="one attempt, or a queued task, within the request's deadline")
    retries: int = Field(1, ge=0, le=1, description="further attempts, on another endpoint where there is one")
    concurrency: int = Field(64, ge=1, le=4_096, description="calls of this version at once from one worker")
    outlier: Outlier = Outlier()
    batch: BatchPolicy | None = Field(None, description="rows share a call while the model is busy; default: never")


class Governance(DocumentPart):
    """Who answers for a version and until when; recorded with the version, and an ended validity is refused."""

    approved_by: str = Field(alias="approvedBy", min_length=1)
    valid_until: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = Field(
        None, alias="validUntil", description="the last day, UTC"
    )
    risk_tier: Literal["low", "medium", "high"] | None = Field(None, alias="riskTier")

    @property
    def last_day(self) -> datetime.date | None:
        """``validUntil`` as a date."""
        return datetime.date.fromisoformat(self.valid_until) if self.valid_until else None

    @cached_property
    def recorded(self) -> Mapping[str, Any]:
        """As it was written, for the records of each decision."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    @model_validator(mode="after")
    def _day_exists(self) -> "Governance":
        _ = self.last_day
        return self


Count = Annotated[int, Field(ge=0)]
CategoryText = Annotated[str, StringConstraints(max_length=128)]
RESERVED_CATEGORIES: Final = frozenset({"(other)", "(missing)"})
"""What bins that are no category's own are called."""


class FeatureBaseline(DocumentPart):
    """How one input was distributed at training: numbers in bins between ``edges``, or texts by category.

    The first of ``counts`` is of numbers below the first edge, the last of those above the last; a number that equals
    an edge counts below it, and the first edge counts into the first bin. ``missing`` are rows without a value.
    """

    edges: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] | None = Field(None, min_length=2, max_length=65)
    counts: tuple[Count, ...] | None = None
    categories: Mapping[CategoryText, Count] | None = Field(None, max_length=64)
    other: Count = Field(0, description="rows of categories that are not named")
    missing: Count = 0

    @cached_property
    def rows(self) -> int:
        """How many rows it counts."""
        named = self.counts if self.counts is not None else (self.categories or {}).values()
        return sum(named) + self.other + self.missing

    @model_validator(mode="after")
    def _one_kind(self) -> "FeatureBaseline":
        if (self.edges is None) != (self.counts is None) or (self.edges is None) == (self.categories is None):
            raise ValueError("a baseline has either edges and counts (numbers) or categories (text)")
        if self.edges is not None and self.counts is not None:
            first, *rest = self.edges
            if rest[0] < first or any(after <= before for before, after in pairwise(rest)):
                raise ValueError("edges must rise")
            if len(self.counts) != len(self.edges) + 1:
                raise ValueError(f"{len(self.edges)} edges make {len(self.edges) + 1} counts, not {len(self.counts)}")
            if "other" in self.model_fields_set:
                raise ValueError("other belongs to categories; numbers beyond the edges have bins of their own")
        if self.categories is not None and (taken := RESERVED_CATEGORIES & self.categories.keys()):
            raise ValueError(f"{', '.join(sorted(taken))}: no category may be called so; count it in other")
        return self


class Baseline(DocumentPart):
    """What a version was trained on, in bins: what its inputs are compared with. ``features`` by the model's names.

    In files ``{file: PATH}`` stands for it, which ``apply`` reads; a revision holds all of it.
    """

    format: Literal[1] = Field(description="of this document; another one says that it cannot be read here")
    model: Name
    version: VersionLabel
    rows: int = Field(ge=1, description="of the training data, each counted once a feature")
    features: Mapping[Identifier, FeatureBaseline] = Field(min_length=1, max_length=1_000)

    @model_validator(mode="after")
    def _rows_agree(self) -> "Baseline":
        for name, feature in self.features.items():
            if feature.rows != self.rows:
                raise ValueError(f"{name} counts {feature.rows} rows, and there are {self.rows}; make it anew")
        return self


class ModelVersionSpec(DocumentPart):
    """One immutable version of a model: where it runs, what it needs, what it answers."""

    model: Name
    version: VersionLabel
    digest: Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
    backend: Backend
    features: tuple[FeatureContract, ...] = Field(max_length=1_000)
    outputs: tuple[OutputContract, ...] = Field(min_length=1, max_length=100)
    policy: CallPolicy = CallPolicy()
    governance: Governance | None = None
    baseline: Baseline | None = None
