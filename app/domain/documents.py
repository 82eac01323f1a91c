"""Registry documents, each kind's shape: what people write in YAML and what a revision holds.

Shapes only: each field's type and bounds. What documents say of one another (references, weights, paths) is checked in
``registry``. Unknown fields are errors; those in ``NOT_SUPPORTED_YET`` are refused by that name, so that nobody
believes in a safeguard that is not there.
"""

import datetime
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from app.domain.aggregates import Aggregation, Plan
from app.durations import WrittenDurationMs, parse_duration_ms, within

API_VERSION: Final = "modelbroker.dev/v1alpha1"

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
"""A document's name: a DNS subdomain, as Kubernetes requires."""
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
"""A name that expressions use: tasks, features, outputs, entities."""
VersionLabel = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]

ValueType = Literal[
    "BYTES", "STRING", "INT32", "INT64", "DOUBLE", "FLOAT", "BOOL", "UNIX_TIMESTAMP",
    "BYTES_LIST", "STRING_LIST", "INT32_LIST", "INT64_LIST", "DOUBLE_LIST", "FLOAT_LIST", "BOOL_LIST",
    "UNIX_TIMESTAMP_LIST",
]  # fmt: skip
"""Feast's scalar value types, and lists of them."""
Datatype = Literal["BOOL", "INT8", "INT16", "INT32", "INT64", "FP32", "FP64", "BYTES"]
"""Open Inference Protocol v2's tensor datatypes that a feature can be sent as."""

CallDurationMs = Annotated[WrittenDurationMs, within("1ms", "1h")]
"""How long callers and models are waited for."""

Scalar = str | int | float | bool | None

NOT_SUPPORTED_YET: Final[Mapping[str, str]] = {
    "hedgeAfter": "a second call when the first is slow",
}
"""Fields of the design whose behaviour does not exist yet, and what they would do."""

VALUES_NOT_SUPPORTED_YET: Final = frozenset({"csv", "json", "kubernetes", "sagemaker"})
"""Values of ``backend.type`` and ``backend.protocol`` of which the same is true."""

IN_WORDS: Final[Mapping[str, str]] = {
    r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$": "lower-case letters, digits, - and ., the first and last no sign",
    r"^[A-Za-z_][A-Za-z0-9_]{0,127}$": "letters, digits and _, the first no digit, 128 at most",
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$": "letters, digits, ., _ and -, the first no sign, 63 at most",
    r"^[^\s:]{1,256}$": "the view's name at the server, without spaces and colons",
    r"^[A-Za-z_][A-Za-z0-9_.-]{0,127}$": "an entry point's name: letters, digits, _, . and -, the first no digit",
    r"^https?://[^\s/?#]+(/[^\s?#]*)?$": "http://HOST:PORT or https://HOST:PORT, with a path if need be",
    r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$": "lower-case letters, digits and -, the first and last no -, 63 at most",
    r"^[A-Za-z_][A-Za-z0-9_-]*\.[A-Za-z_][A-Za-z0-9_]*$": "VIEW.FEATURE, or inputs.NAME, entities.NAME, metadata.NAME",
    r"^\d{4}-\d{2}-\d{2}$": "a day as YYYY-MM-DD",
    r"^sha256:[0-9a-f]{64}$": "sha256: and 64 hexadecimal digits in lower case",
    r"^[A-Za-z0-9_]{1,128}$": "1 to 128 letters, digits and _",
    r"^((entities|inputs|metadata)\.)?[A-Za-z_][A-Za-z0-9_]*$": "an entity's name, or inputs.NAME or metadata.NAME",
    r"^[1-9][0-9]{0,5}(s|m|h|d)$": "a whole number and a unit, as 90s, 15m, 24h or 30d",
    r"^[A-Z][A-Z0-9_]{0,63}$": "upper-case letters, digits and _, the first a letter, 64 at most",
    r"^/[^\s?#]{0,255}$": "/ and up to 255 characters, none of them a space, ? or #",
}
"""What to write where a pattern is not met: for people, who need not read it."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)


class Metadata(_Document):
    """A document's name; the names of a kind are unique."""

    name: Name


# --- ModelVersion -----------------------------------------------------------------------------------------------------


class ColumnsInput(_Document):
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


class HttpBackend(_Document):
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


class KafkaBackend(_Document):
    """A queued backend: tasks go to ``inference.tasks.<pool>``, and pool workers answer on ``inference.results``."""

    type: Literal["kafka"]
    pool: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]


Backend = Annotated[HttpBackend | KafkaBackend, Field(discriminator="type")]


class FeatureContract(_Document):
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


class OutputContract(_Document):
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


class Outlier(_Document):
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


class BatchPolicy(_Document):
    """That rows of several requests may share a call while the model is busy; its server must take several rows."""

    max_size: int = Field(alias="maxSize", ge=2, le=256, description="rows of one call")


class CallPolicy(_Document):
    """How a version is called; of a queued one, only how long its answer is waited for."""

    timeout: CallDurationMs = Field(1_000, description="one attempt, or a queued task, within the request's deadline")
    retries: int = Field(1, ge=0, le=1, description="further attempts, on another endpoint where there is one")
    concurrency: int = Field(64, ge=1, le=4_096, description="calls of this version at once from one worker")
    outlier: Outlier = Outlier()
    batch: BatchPolicy | None = Field(None, description="rows share a call while the model is busy; default: never")


class Governance(_Document):
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


class FeatureBaseline(_Document):
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


class Baseline(_Document):
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


class ModelVersionSpec(_Document):
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


# --- Model, FeatureView -----------------------------------------------------------------------------------------------


class ModelSpec(_Document):
    """A model: an owner, and names that move between its versions."""

    owner: str = Field(min_length=1)
    aliases: Mapping[Name, VersionLabel] = {}


class EntitySpec(_Document):
    """A join key of a view."""

    name: Identifier
    type: Literal["INT64", "INT32", "STRING"]


class FeatureSpec(_Document):
    """A feature of a view."""

    name: Identifier
    type: ValueType


class RedisSource(_Document):
    """Feast's Redis layout, under this Feast project's name."""

    type: Literal["redis"]
    project: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,128}$")]


class CacheSpec(_Document):
    """How long a worker may use a row that it has read before, without asking the store."""

    ttl: Annotated[WrittenDurationMs, within("1ms", "1d")] = Field(description="of a row that the store has")
    negative_ttl: Annotated[WrittenDurationMs, within("1ms", "1d")] | None = Field(
        None, alias="negativeTtl", description="of a row that it lacks, or that cannot be read; absent: asked each time"
    )
    stale_if_error: Annotated[WrittenDurationMs, within("1ms", "30d")] | None = Field(
        None,
        alias="staleIfError",
        description="how long past its ttl, while the store does not answer, a row serves contracts without maxAge",
    )


AggregateOp = Literal["sum", "count", "mean", "min", "max", "last", "distinct"]
WindowText = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,5}(s|m|h|d)$")]
"""A window's length as its features' names have it, so as it is written: 24h and 1d are two names."""


class AggregateSpec(_Document):
    """A function over sliding windows of a view's updates; each window is a feature ``OF_OP_WINDOW``."""

    of: Identifier | None = Field(None, description="a feature of the view; count needs none: it counts updates")
    op: AggregateOp
    windows: Annotated[tuple[WindowText, ...], Field(strict=False, min_length=1, max_length=8)]

    def aggregations(self, types: Mapping[str, ValueType]) -> tuple[tuple[Aggregation, ValueType], ...]:
        """Each window's feature and its type, where the view declares ``types``."""
        computed: ValueType = "INT64" if self.op in ("count", "distinct") else "DOUBLE"
        if self.op in ("min", "max", "last"):
            computed = types.get(self.of or "", computed)
        prefix = f"{self.of}_{self.op}" if self.of else self.op
        return tuple(
            (Aggregation(f"{prefix}_{window}", self.of, self.op, parse_duration_ms(window), computed), computed)
            for window in self.windows
        )


def _listed(value: object) -> object:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, Mapping) else value


class WriteBack(_Document):
    """Where what a feature server says is kept: Redis, in Feast's layout, under this project's name.

    What is there is used for as long as its event time is not older than ``maxAge``, nor than contracts allow.
    """

    project: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,128}$")]
    max_age: WrittenDurationMs = Field(alias="maxAge", description="older event times are asked for anew")


class HttpSource(_Document):
    """A Feast feature server, asked by ``POST /get-online-features``; its endpoints are taken in turn."""

    type: Literal["http"]
    endpoints: tuple[Annotated[str, StringConstraints(pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$")], ...] = Field(
        min_length=1, max_length=64
    )
    view: Annotated[str, StringConstraints(pattern=r"^[^\s:]{1,256}$")] | None = Field(
        None, description="the server's name of the view; default: ours"
    )
    timeout: CallDurationMs = Field(100, description="one request, within the fetch's own timeout")
    write_back: WriteBack | None = Field(None, alias="writeBack")


CelText = Annotated[str, StringConstraints(min_length=1, max_length=4_096)]


class ComputedBy(_Document):
    """A Python function that decide workers have, by its entry point's name, and the values that it is given."""

    function: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,127}$")]
    inputs: tuple[
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_-]*\.[A-Za-z_][A-Za-z0-9_]*$")], ...
    ] = Field(min_length=1, max_length=100)


def _computed_how(value: object) -> str:
    return "[cel]" if isinstance(value, str) else "[function]"


ComputedHow = Annotated[
    Annotated[CelText, Tag("[cel]")] | Annotated[ComputedBy, Tag("[function]")], Discriminator(_computed_how)
]


PARTS_MAX: Final = 256
"""A producer whose names come in ever another order must not fill the memory."""


class ViewPart(NamedTuple):
    """Some of a view's features with their types, and the names of the others."""

    names: tuple[str, ...]
    types: tuple[ValueType, ...]
    others: tuple[str, ...]


class FeatureViewSpec(_Document):
    """Features of one entity from one source, or features that are computed on demand."""

    entities: tuple[EntitySpec, ...] = Field((), min_length=1, max_length=8)
    features: tuple[FeatureSpec, ...] = Field(min_length=1, max_length=1_000)
    source: Annotated[RedisSource | HttpSource, Field(discriminator="type")] | None = None
    on_demand: Mapping[Identifier, ComputedHow] | None = Field(
        None, alias="onDemand", description="how each feature is computed: CEL, or {function: NAME, inputs: [REF]}"
    )
    cache: CacheSpec | None = Field(None, description="absent: each request reads the store")
    ttl: Annotated[WrittenDurationMs, within("1s", "3650d")] | None = Field(
        None, description="older values are STALE, and the store may forget them"
    )
    aggregate: Annotated[tuple[AggregateSpec, ...], BeforeValidator(_listed)] = Field(
        (), max_length=64, description="features computed from the view's updates; one of them needs no list"
    )
    lateness: Annotated[WrittenDurationMs, within("1s", "30d")] = Field(
        3_600_000, description="of updates that aggregates still count, before the entity's latest"
    )

    @property
    def project(self) -> str:
        """The Feast project that rows are stored under; empty where nothing is stored."""
        if isinstance(self.source, HttpSource):
            return self.source.write_back.project if self.source.write_back else ""
        return self.source.project if self.source is not None else ""

    @model_validator(mode="after")
    def _source_or_on_demand(self) -> "FeatureViewSpec":
        if (self.source is None) == (self.on_demand is None):
            raise ValueError("a view has either source, where its features are, or onDemand, how they are computed")
        if self.cache is not None and self.source is None:
            raise ValueError("cache: what is computed on demand is computed for each request; remove it")
        return self

    @cached_property
    def sorted_entities(self) -> tuple[EntitySpec, ...]:
        """The join keys by name: the order in which a row's key holds them."""
        return tuple(sorted(self.entities, key=lambda entity: entity.name))

    @cached_property
    def entity_names(self) -> tuple[str, ...]:
        """Of the join keys, in a row key's order."""
        return tuple(entity.name for entity in self.sorted_entities)

    @cached_property
    def entity_types(self) -> tuple[str, ...]:
        """Of the join keys, in a row key's order."""
        return tuple(entity.type for entity in self.sorted_entities)

    def part(self, names: tuple[str, ...]) -> "ViewPart | None":
        """What an update of ``names`` is about; None where one of them is not a declared feature.

        Made once for each order of names: what a producer sends all has the same.
        """
        known = self._parts.get(names)
        if known is None and self.declared.keys() >= set(names):
            if len(self._parts) >= PARTS_MAX:
                self._parts.clear()
            others = tuple(name for name in self.types if name not in names)
            known = self._parts[names] = ViewPart(names, tuple(self.types[name] for name in names), others)
        return known

    @cached_property
    def _parts(self) -> dict[tuple[str, ...], "ViewPart"]:
        return {}

    @cached_property
    def types(self) -> Mapping[str, ValueType]:
        """Each feature's value type, those that are computed among them."""
        return self.declared | {each.name: type_ for each, type_ in self._computed}

    @cached_property
    def declared(self) -> dict[str, ValueType]:
        """The types of the features that updates carry. Of two of one name, a fault by itself, the first counts."""
        declared: dict[str, ValueType] = {}
        for feature in self.features:
            declared.setdefault(feature.name, feature.type)
        return declared

    @cached_property
    def _computed(self) -> tuple[tuple[Aggregation, ValueType], ...]:
        return tuple(pair for spec in self.aggregate for pair in spec.aggregations(self.declared))

    @cached_property
    def plan(self) -> Plan | None:
        """How the computed features are computed; None where there are none."""
        return Plan([each for each, _ in self._computed], self.lateness) if self._computed else None


# --- Route ------------------------------------------------------------------------------------------------------------


Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole: 0.02 is 2 %."""


class WeightedVersion(_Document):
    """An arm of a split."""

    version: VersionLabel
    weight: int = Field(ge=0, le=1_000_000)


class Selection(_Document):
    """Which version serves a task: one pinned, one by alias, or one drawn by weight.

    What is drawn is drawn for a subject: the value of ``stickyBy``, or else the request's own id.
    """

    version: VersionLabel | None = None
    alias: Name | None = None
    split: tuple[WeightedVersion, ...] | None = Field(None, min_length=1, max_length=64)
    sticky_by: Annotated[
        str | None, StringConstraints(pattern=r"^((entities|inputs|metadata)\.)?[A-Za-z_][A-Za-z0-9_]*$")
    ] = Field(None, alias="stickyBy", description="an entity, or inputs.NAME or metadata.NAME: one arm a subject")
    experiment: Name | None = Field(None, description="salts the draw; default: the route's and the task's names")

    @cached_property
    def subject(self) -> tuple[str, str] | None:
        """Where the subject stands in a request: the section and the name."""
        if self.sticky_by is None:
            return None
        section, dot, name = self.sticky_by.rpartition(".")
        return (section if dot else "entities", name)

    @model_validator(mode="after")
    def _exactly_one(self) -> "Selection":
        if sum(choice is not None for choice in (self.version, self.alias, self.split)) != 1:
            raise ValueError("select needs exactly one of version, alias, split")
        if self.split is not None and sum(arm.weight for arm in self.split) <= 0:
            raise ValueError("the weights of a split must sum to more than 0")
        return self


class Shadow(_Document):
    """A version that runs beside a task's own, on a part of its requests, and never answers."""

    version: VersionLabel | None = None
    alias: Name | None = None
    percent: float = Field(100, gt=0, le=100, description="of the task's decisions")
    segment: CelText | None = Field(None, description="CEL that names the segment a decision is compared in, as text")

    @model_validator(mode="after")
    def _exactly_one(self) -> "Shadow":
        if (self.version is None) == (self.alias is None):
            raise ValueError("a shadow needs exactly one of version, alias")
        return self


class Fallback(_Document):
    """What stands in for a version that failed or may not be used: another version, or a fixed answer."""

    version: VersionLabel | None = None
    alias: Name | None = None
    default: Mapping[Identifier, Scalar] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "Fallback":
        if sum(choice is not None for choice in (self.version, self.alias, self.default)) != 1:
            raise ValueError("a fallback needs exactly one of version, alias, default")
        return self


class AbortOn(_Document):
    """What ends a rollout: each is a bound that the new version must stay within."""

    error_rate: Share | None = Field(None, alias="errorRate", description="of the new version's tasks")
    p99: CallDurationMs | None = Field(None, description="of the new version's tasks")
    flip_rate: Share | None = Field(
        None,
        alias="flipRate",
        description="of results, had the new version decided; needs it as a shadow",
    )


class Rollout(_Document):
    """Stepwise promotion of a version: so many percent of the subjects, for so long, as long as all is well."""

    to: VersionLabel
    steps: tuple[Annotated[int, Field(ge=1, le=100)], ...] = Field(min_length=1, max_length=20)
    every: Annotated[WrittenDurationMs, within("1s", "30d")] = Field(description="the least time of a step")
    abort_on: AbortOn = Field(AbortOn(), alias="abortOn")
    min_decisions: int = Field(
        1, alias="minDecisions", ge=1, le=1_000_000_000, description="by the new version, a step"
    )

    @model_validator(mode="after")
    def _rising_to_all(self) -> "Rollout":
        if list(self.steps) != sorted(set(self.steps)) or self.steps[-1] != 100:
            raise ValueError("steps must rise and end in 100")
        return self


class TaskSpec(_Document):
    """One model's part in a decision."""

    name: Identifier
    model: Name
    select: Selection
    rollout: Rollout | None = None
    shadow: tuple[Shadow, ...] = Field((), max_length=16)
    need: Literal["required", "optional", "default"] = "required"
    default: Mapping[Identifier, Scalar] | None = None
    fallback: tuple[Fallback, ...] = Field((), max_length=8, description="tried in order when the version fails")
    on_unavailable: Literal["next", "reject"] = Field(
        "next", alias="onUnavailable", description="an expired or unapproved version: the next fallback, or a rejection"
    )
    after: tuple[Identifier, ...] = Field((), max_length=64, description="tasks that must have ended before")
    when: CelText | None = Field(None, description="CEL over outputs of `after` and the request; false: skipped")

    @model_validator(mode="after")
    def _default_with_need(self) -> "TaskSpec":
        if (self.need == "default") != (self.default is not None):
            raise ValueError("need: default and default: {output: value} go together")
        return self

    @model_validator(mode="after")
    def _draws_have_a_draw(self) -> "TaskSpec":
        select = self.select
        if self.rollout is not None and select.split is not None:
            raise ValueError("a rollout leads from one version to another: select by version or alias, not by split")
        if self.rollout is None and select.split is None and (select.sticky_by or select.experiment):
            raise ValueError("stickyBy and experiment belong to a split or a rollout: there is nothing to draw")
        flips = self.rollout is not None and self.rollout.abort_on.flip_rate is not None
        if flips and all(shadow.version != self.rollout.to for shadow in self.shadow if self.rollout):
            raise ValueError("abortOn.flipRate needs the new version among the task's shadows, by version")
        return self

    @model_validator(mode="after")
    def _fallbacks_differ(self) -> "TaskSpec":
        named = [(fallback.version, fallback.alias) for fallback in self.fallback if fallback.default is None]
        if len(set(named)) < len(named):
            raise ValueError("a fallback is named twice, and what has failed is not asked again: keep one")
        if self.rollout is None and self.select.version is not None and (self.select.version, None) in named:
            raise ValueError(f"fallback names version {self.select.version}, which is selected: name another")
        return self

    @model_validator(mode="after")
    def _fixed_answer_is_last(self) -> "TaskSpec":
        if any(fallback.default is not None for fallback in self.fallback[:-1]):
            raise ValueError("a fallback's default always holds: put it last")
        if self.default is not None and self.fallback and self.fallback[-1].default is not None:
            raise ValueError("default and the last fallback's default say the same; keep one")
        return self


class JoinSpec(_Document):
    """When the answers are together."""

    policy: Literal["all", "quorum", "first"] = "all"
    n: int | None = Field(None, ge=1, le=64, description="of a quorum: so many answers")

    @model_validator(mode="after")
    def _quorum_has_a_number(self) -> "JoinSpec":
        if (self.policy == "quorum") != (self.n is not None):
            raise ValueError("policy: quorum and n: NUMBER go together")
        return self


ReasonCode = Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")]


class Reason(_Document):
    """A code that is told with the result where ``when`` holds."""

    code: ReasonCode
    when: CelText = Field(description="CEL over result and what result sees")


class RuleSpec(_Document):
    """What happens to requests for which ``when`` holds."""

    name: Name
    when: CelText | None = Field(None, description="CEL over path, entities, inputs, metadata; absent: always")
    tasks: tuple[TaskSpec, ...] = Field(min_length=1, max_length=64)
    join: JoinSpec = JoinSpec()
    result: Mapping[Identifier, CelText] = Field({}, description="CEL over outputs, path, entities, inputs, metadata")
    reasons: tuple[Reason, ...] = Field((), max_length=100, description="the most important first, as they are told")
    refer_result: Mapping[Identifier, Scalar] | None = Field(
        None, alias="referResult", description="the result where a feature's contract refers the decision to a person"
    )

    @model_validator(mode="after")
    def _referred_result_is_whole(self) -> "RuleSpec":
        if self.refer_result is not None and set(self.refer_result) != set(self.result):
            given, wanted = (
                ", ".join(sorted(self.refer_result)) or "nothing",
                ", ".join(sorted(self.result)) or "nothing",
            )
            raise ValueError(f"referResult names {given}, and result names {wanted}; name the same")
        return self


class RouteSpec(_Document):
    """A path that callers name, and its rules in order: the first match wins."""

    path: Annotated[str, StringConstraints(pattern=r"^/[^\s?#]{0,255}$")]
    deadline: CallDurationMs
    pinnable: tuple[Identifier, ...] = Field(
        (), max_length=64, description="tasks whose version a caller may name by metadata.model_version"
    )
    rules: tuple[RuleSpec, ...] = Field(min_length=1, max_length=100)


class RolloutStatus(_Document):
    """How far a rollout is. ``step`` counts from 0; ``since`` is when it began, epoch milliseconds.

    ``of`` is the digest of what it rolls out, so that a changed document begins anew.
    """

    state: Literal["progressing", "paused", "promoted", "aborted"]
    step: int = Field(ge=0)
    since: int = Field(ge=0)
    of: str
    reason: str | None = None


class RouteStatus(_Document):
    """What the broker keeps with a route; nobody writes it by hand. ``rollouts`` by ``RULE/TASK``."""

    rollouts: Mapping[str, RolloutStatus] = {}


# --- documents --------------------------------------------------------------------------------------------------------


class ModelVersion(_Document):
    """A ModelVersion document."""

    api_version: Literal["modelbroker.dev/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["ModelVersion"]
    metadata: Metadata
    spec: ModelVersionSpec


class Model(_Document):
    """A Model document; its name is the model's."""

    api_version: Literal["modelbroker.dev/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["Model"]
    metadata: Metadata
    spec: ModelSpec


class FeatureView(_Document):
    """A FeatureView document; its name is the view's."""

    api_version: Literal["modelbroker.dev/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["FeatureView"]
    metadata: Metadata
    spec: FeatureViewSpec


class Route(_Document):
    """A Route document."""

    api_version: Literal["modelbroker.dev/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["Route"]
    metadata: Metadata
    spec: RouteSpec
    status: RouteStatus | None = None


Document = ModelVersion | Model | FeatureView | Route
KINDS: Final[Mapping[str, type[Document]]] = {
    "FeatureView": FeatureView,
    "Model": Model,
    "ModelVersion": ModelVersion,
    "Route": Route,
}


def item_label(item: object, index: int) -> str:
    """How messages and differences call an item of a list: by what names it where it has a name, else by its place.

    >>> item_label({"version": "3", "weight": 90}, 0), item_label("http://127.0.0.1:1", 2)
    ('3', '2')
    """
    if isinstance(item, Mapping):
        for key in ("name", "ref", "version", "code"):
            if isinstance(item.get(key), str):
                return str(item[key])
    return str(index)
