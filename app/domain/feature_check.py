"""What model versions need of stored features, held against what a store has for a sample of entities."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from app.domain.documents import FeatureViewSpec, ModelVersionSpec, ValueType
from app.domain.features import (
    EVENT_TIME_AHEAD_MS_MAX,
    REQUEST_SOURCES,
    EntityKey,
    FeatureStatus,
    Fetched,
    FetchedFeatures,
    ViewNeed,
    within_ttl,
)

STORED_STATUSES = (
    FeatureStatus.PRESENT,
    FeatureStatus.NULL,
    FeatureStatus.MISSING,
    FeatureStatus.STALE,
    FeatureStatus.ERROR,
)


@dataclass(slots=True)
class Finding:
    """One feature under one age bound: which versions need it so, and how many entities have it in which status."""

    view: str
    feature: str
    type: ValueType
    max_age_ms: int | None
    required_by: list[str] = field(default_factory=list)
    optional_for: list[str] = field(default_factory=list)
    statuses: Counter[FeatureStatus] = field(default_factory=Counter)

    @property
    def sampled(self) -> int:
        """How many entities were looked at."""
        return self.statuses.total()

    def share(self, status: FeatureStatus) -> float:
        """The part of the entities that have it in ``status``."""
        return self.statuses[status] / self.sampled if self.sampled else 0.0

    def rejects(self, tolerated: float) -> bool:
        """Whether versions that require it would reject more than the part ``tolerated`` of the entities."""
        return bool(self.required_by) and self.sampled > 0 and 1 - self.share(FeatureStatus.PRESENT) > tolerated

    def judge(self, found: Fetched, ttl_ms: int | None, now_ms: int) -> None:
        """Count what the store has for one entity."""
        found = within_ttl(found, ttl_ms, now_ms)
        dated = self.max_age_ms is not None and found.event_time_ms is not None
        if found.status is FeatureStatus.PRESENT and dated and not self._young(found, now_ms):
            self.statuses[FeatureStatus.STALE] += 1
        else:
            self.statuses[found.status] += 1

    def _young(self, found: Fetched, now_ms: int) -> bool:
        age_ms = now_ms - (found.event_time_ms or 0)
        return -EVENT_TIME_AHEAD_MS_MAX <= age_ms <= (self.max_age_ms or 0)


def findings_of(
    versions: Iterable[ModelVersionSpec], views: Mapping[str, FeatureViewSpec], only: str | None = None
) -> dict[str, list[Finding]]:
    """What ``versions`` need, by view, nothing found yet; ``only``: of one view."""
    found: dict[tuple[str, str, int | None], Finding] = {}
    for version in versions:
        label = f"{version.model}/{version.version}"
        for contract in version.features:
            view = contract.source
            if view in REQUEST_SOURCES or view not in views or (only is not None and view != only):
                continue
            identity = (view, contract.feature, contract.max_age)
            finding = found.setdefault(
                identity, Finding(*identity[:2], views[view].types[contract.feature], contract.max_age)
            )
            (finding.required_by if contract.required else finding.optional_for).append(label)
    by_view: dict[str, list[Finding]] = {}
    for finding in found.values():
        by_view.setdefault(finding.view, []).append(finding)
    return by_view


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
