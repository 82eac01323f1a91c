"""The shape of FeatureView documents: features of an entity, where they come from, and how they are computed."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from app.domain.aggregates import Aggregation, Plan
from app.domain.document_parts import CallDurationMs, CelText, DocumentPart, Identifier, ValueType
from app.durations import WrittenDurationMs, parse_duration_ms, within


class EntitySpec(DocumentPart):
    """A join key of a view."""

    name: Identifier
    type: Literal["INT64", "INT32", "STRING"]


class FeatureSpec(DocumentPart):
    """A feature of a view."""

    name: Identifier
    type: ValueType


class RedisSource(DocumentPart):
    """Feast's Redis layout, under this Feast project's name."""

    type: Literal["redis"]
    project: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,128}$")]


class CacheSpec(DocumentPart):
    """How long a worker may use a row that it has read before, without asking the store."""

    ttl: Annotated[WrittenDurationMs, within("1ms", "1d")] = Field(description="of a row that the store has")
    negative_ttl: Annotated[WrittenDurationMs, within("1ms", "1d")] | None = Field(
        None,
        alias="negativeTtl",
        description="of a row that it lacks, that cannot be read, or is STALE; absent: asked each time",
    )
    stale_if_error: Annotated[WrittenDurationMs, within("1ms", "30d")] | None = Field(
        None,
        alias="staleIfError",
        description="how long past its ttl, while the store does not answer, a row serves contracts without maxAge",
    )


AggregateOp = Literal["sum", "count", "mean", "min", "max", "last", "distinct"]
WindowText = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,5}(s|m|h|d)$")]
"""A window's length as its features' names have it, so as it is written: 24h and 1d are two names."""


class AggregateSpec(DocumentPart):
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


class WriteBack(DocumentPart):
    """Where what a feature server says is kept: Redis, in Feast's layout, under this project's name.

    What is there is used for as long as its event time is not older than ``maxAge``, nor than contracts allow.
    """

    project: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,128}$")]
    max_age: WrittenDurationMs = Field(alias="maxAge", description="older event times are asked for anew")


class HttpSource(DocumentPart):
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

    def is_as(self, other: "HttpSource") -> bool:
        """Whether both are the same view of the same server: one endpoint in common is enough."""
        return self.view == other.view and not set(self.endpoints).isdisjoint(other.endpoints)


class ComputedBy(DocumentPart):
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


class FeatureViewSpec(DocumentPart):
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
