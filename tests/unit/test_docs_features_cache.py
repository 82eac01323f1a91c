"""docs/features-cache.md: its example is a document as it stands, and its numbers are the code's."""

import orjson
import yaml

from app.adapters.update_announcer import SETTLED_MS
from app.domain.breaker import BreakerPolicy
from app.domain.documents import FeatureView
from app.domain.features import EntityKey, FeatureStatus, Fetched, ViewNeed
from app.domain.near_cache import FLOOR_MS, LAG_MS, NearCache, size_of
from tests.support.markdown import ROOT, blocks_of

PAGE = ROOT / "docs" / "features-cache.md"
NOW_MS = 1_750_000_000_000


def test_the_example_does_what_its_comments_say() -> None:
    """The rows of its view are fresh for 30 s, the absent for 2 s, and not overdue for 10 min more."""
    (block,) = (block for block in blocks_of(PAGE) if block.language == "yaml")
    document = FeatureView.model_validate_json(orjson.dumps(yaml.safe_load(block.text)))
    spec = document.spec.cache
    assert spec is not None
    key = EntityKey("credit", ("applicant_id",), (17,), ("INT64",))
    need = ViewNeed("applicant", key, ("age_years",), ("INT64",))
    cache = NearCache(entries_max=10, bytes_max=10_000)
    cache.store(need, {("applicant", "age_years"): Fetched(FeatureStatus.PRESENT, 35, NOW_MS)}, NOW_MS)
    entry = cache.find(need)
    assert entry is not None
    assert [entry.fresh(spec, NOW_MS + age_ms) for age_ms in (30_000, 30_001)] == [True, False]
    assert [entry.served_stale(spec, NOW_MS + age_ms)[0].overdue for age_ms in (630_000, 630_001)] == [False, True]
    cache.store(need, {("applicant", "age_years"): Fetched(FeatureStatus.MISSING)}, NOW_MS)
    entry = cache.find(need)
    assert entry is not None
    assert [entry.fresh(spec, NOW_MS + age_ms) for age_ms in (2_000, 2_001)] == [True, False]


def test_its_numbers_are_the_codes() -> None:
    """How long a row is read each time after an update, how long failures must last, how much a row takes."""
    text = PAGE.read_text()
    assert f"past them it is {FLOOR_MS // 1000} s" in text
    assert text.count(f"for {LAG_MS // 60_000} minutes at most") == 3
    assert f"once more {SETTLED_MS // 1000} seconds later" in text
    assert f"over {BreakerPolicy().failing_ms:.0f} ms at least" in text
    assert f"about {size_of([Fetched(FeatureStatus.PRESENT, 1.5)] * 10) / 1000:.1f} kB" in text
