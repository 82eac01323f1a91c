"""What model versions need of stored features, held against what a store has for a sample of entities."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from app.domain.document_parts import ValueType
from app.domain.features import (
    REQUEST_SOURCES,
    EntityKey,
    FeatureRef,
    FeatureStatus,
    Fetched,
    FetchedFeatures,
    ViewNeed,
    too_old,
    within_ttl,
)
from app.domain.on_demand import Computations
from app.domain.version_documents import FeatureContract, ModelVersionSpec
from app.domain.view_documents import FeatureViewSpec

STORED_STATUSES = (
    FeatureStatus.PRESENT,
    FeatureStatus.NULL,
    FeatureStatus.MISSING,
    FeatureStatus.STALE,
    FeatureStatus.ERROR,
)


_UNSOUND = (FeatureStatus.STALE, FeatureStatus.ERROR)
_ABSENT = (FeatureStatus.MISSING, FeatureStatus.NULL)


@dataclass(frozen=True, slots=True)
class Use:
    """A version's need of a feature, its own or through what is computed of it, and what a violation of it does."""

    version: str
    required: bool
    violation: Literal["reject", "default", "refer"]


@dataclass(slots=True)
class Finding:
    """One feature under one age bound: who uses it so, and how many entities have it in which status."""

    view: str
    feature: str
    type: ValueType
    max_age_ms: int | None
    uses: list[Use] = field(default_factory=list)
    statuses: Counter[FeatureStatus] = field(default_factory=Counter)

    @property
    def required_by(self) -> list[str]:
        """The versions that cannot do without it."""
        return _once(use.version for use in self.uses if use.required)

    @property
    def optional_for(self) -> list[str]:
        """The versions that can."""
        needed = self.required_by
        return _once(use.version for use in self.uses if use.version not in needed)

    @property
    def sampled(self) -> int:
        """How many entities were looked at."""
        return self.statuses.total()

    def share(self, status: FeatureStatus) -> float:
        """The part of the entities that have it in ``status``."""
        return self.statuses[status] / self.sampled if self.sampled else 0.0

    def rejected_by(self, tolerated: float) -> list[str]:
        """The versions that would reject more than the part ``tolerated`` of the entities.

        Where the store knows no entity it has nothing of any.
        """
        return self._violated("reject", tolerated)

    def referred_by(self, tolerated: float) -> list[str]:
        """The versions that would leave more than the part ``tolerated`` of the entities to a person; see above."""
        return self._violated("refer", tolerated)

    def _violated(self, violation: str, tolerated: float) -> list[str]:
        unsound = sum(self.share(status) for status in _UNSOUND)
        absent = sum(self.share(status) for status in _ABSENT) if self.sampled else 1.0
        return _once(
            use.version
            for use in self.uses
            if use.violation == violation and unsound + (absent if use.required else 0.0) > tolerated
        )

    def judge(self, found: Fetched, ttl_ms: int | None, now_ms: int) -> None:
        """Count what the store has for one entity."""
        found = within_ttl(found, ttl_ms, now_ms)
        bound_ms = self.max_age_ms
        stale = found.status is FeatureStatus.PRESENT and bound_ms is not None and too_old(found, bound_ms, now_ms)
        self.statuses[FeatureStatus.STALE if stale else found.status] += 1


def findings_of(
    versions: Iterable[ModelVersionSpec],
    views: Mapping[str, FeatureViewSpec],
    computations: Computations,
    only: str | None = None,
) -> dict[str, list[Finding]]:
    """What ``versions`` need of ``views``, by view, nothing found yet; ``only``: of one view.

    What is computed on demand needs its ingredients, each as young as the contract wants the whole.
    """
    found: dict[tuple[str, str, int | None], Finding] = {}
    for version in versions:
        label = f"{version.model}/{version.version}"
        for contract in version.features:
            for (view, feature), required in _needed(contract, computations).items():
                if view in REQUEST_SOURCES or view not in views or (only is not None and view != only):
                    continue
                identity = (view, feature, contract.max_age)
                finding = found.setdefault(identity, Finding(*identity[:2], views[view].types[feature], identity[2]))
                finding.uses.append(Use(label, required, contract.violation))
    by_view: dict[str, list[Finding]] = {}
    for finding in found.values():
        by_view.setdefault(finding.view, []).append(finding)
    return by_view


def _needed(contract: FeatureContract, computations: Computations) -> dict[FeatureRef, bool]:
    """All that a contract is about, and whether it is violated where that is absent."""
    needed: dict[FeatureRef, bool] = {}
    waiting = [((contract.source, contract.feature), contract.required)]
    while waiting:
        ref, required = waiting.pop()
        if ref in needed and (needed[ref] or not required):
            continue
        needed[ref] = required
        made = computations.get(ref)
        if made is not None:
            waiting += [(each.ref, required and not each.optional) for each in made.ingredients]
    return needed


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def need_of(findings: Iterable[Finding], key: EntityKey) -> ViewNeed:
    """What to fetch of one entity for the findings of one view."""
    types = {finding.feature: finding.type for finding in findings}
    view = next(iter(findings)).view
    return ViewNeed(view, key, tuple(types), tuple(types.values()))


def judge_all(findings: Iterable[Finding], fetched: FetchedFeatures, ttl_ms: int | None, now_ms: int) -> None:
    """Count one entity in each finding of its view."""
    for finding in findings:
        found = fetched.get((finding.view, finding.feature), Fetched(FeatureStatus.MISSING))
        finding.judge(found, ttl_ms, now_ms)
