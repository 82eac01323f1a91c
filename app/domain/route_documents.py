"""The shape of Route documents: rules, tasks and how each selects, shadows and rolls out versions, joins, results."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from app.domain.document_parts import CallDurationMs, CelText, DocumentPart, Identifier, Name, Scalar, VersionLabel
from app.durations import WrittenDurationMs, within

Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole: 0.02 is 2 %."""


class WeightedVersion(DocumentPart):
    """An arm of a split."""

    version: VersionLabel
    weight: int = Field(ge=0, le=1_000_000)


class Selection(DocumentPart):
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


class Shadow(DocumentPart):
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


class Fallback(DocumentPart):
    """What stands in for a version that failed or may not be used: another version, or a fixed answer."""

    version: VersionLabel | None = None
    alias: Name | None = None
    default: Mapping[Identifier, Scalar] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "Fallback":
        if sum(choice is not None for choice in (self.version, self.alias, self.default)) != 1:
            raise ValueError("a fallback needs exactly one of version, alias, default")
        return self


class AbortOn(DocumentPart):
    """What ends a rollout: each is a bound that the new version must stay within."""

    error_rate: Share | None = Field(None, alias="errorRate", description="of the new version's tasks")
    p99: CallDurationMs | None = Field(None, description="of the new version's tasks")
    flip_rate: Share | None = Field(
        None,
        alias="flipRate",
        description="of results, had the new version decided; needs it as a shadow",
    )


class Rollout(DocumentPart):
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


class TaskSpec(DocumentPart):
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


class JoinSpec(DocumentPart):
    """When the answers are together."""

    policy: Literal["all", "quorum", "first"] = "all"
    n: int | None = Field(None, ge=1, le=64, description="of a quorum: so many answers")

    @model_validator(mode="after")
    def _quorum_has_a_number(self) -> "JoinSpec":
        if (self.policy == "quorum") != (self.n is not None):
            raise ValueError("policy: quorum and n: NUMBER go together")
        return self


ReasonCode = Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")]


class Reason(DocumentPart):
    """A code that is told with the result where ``when`` holds."""

    code: ReasonCode
    when: CelText = Field(description="CEL over result and what result sees")


class RuleSpec(DocumentPart):
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


class RouteSpec(DocumentPart):
    """A path that callers name, and its rules in order: the first match wins."""

    path: Annotated[str, StringConstraints(pattern=r"^/[^\s?#]{0,255}$")]
    deadline: CallDurationMs
    pinnable: tuple[Identifier, ...] = Field(
        (), max_length=64, description="tasks whose version a caller may name by metadata.model_version"
    )
    rules: tuple[RuleSpec, ...] = Field(min_length=1, max_length=100)


class RolloutStatus(DocumentPart):
    """How far a rollout is. ``step`` counts from 0; ``since`` is when it began, epoch milliseconds.

    ``of`` is the digest of what it rolls out, so that a changed document begins anew.
    """

    state: Literal["progressing", "paused", "promoted", "aborted"]
    step: int = Field(ge=0)
    since: int = Field(ge=0)
    of: str
    reason: str | None = None


class RouteStatus(DocumentPart):
    """What the broker keeps with a route; nobody writes it by hand. ``rollouts`` by ``RULE/TASK``."""

    rollouts: Mapping[str, RolloutStatus] = {}
