"""What somebody else wrote into a table's changelog: told, passed by, and no entry's end."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from faust.types import TP, EventT
from structlog.testing import capture_logs

from app.adapters.changelog import ReadEntry
from app.adapters.faust_app import create_app
from app.adapters.faust_table import DurableTable
from app.adapters.record_codec import EntryState, encode_entry, read_entry_header
from app.adapters.window_follower import WindowFollower
from app.agents.aggregates import check_entry
from app.domain.aggregates import State, write_state
from app.domain.comparison_stats import Comparison
from app.domain.decisions import DecisionRecord, Kind
from app.domain.requests import InboundRecord, RequestId
from app.domain.rollout_stats import StepStats
from app.domain.windows import ShadowName, check_window, shadow_key, step_key, write_entry, write_intent
from app.ports.log import OutboundRecord
from app.settings import Settings

CHANGELOG = "changelog"
REPLY = b'{"request_id":"r","execution_id":"e","status":"completed","errors":[]}'
SOURCE = InboundRecord("inference.requests", 0, 1, 0, None, b"{}", ())
JOIN = encode_entry(
    EntryState.PENDING,
    DecisionRecord(Kind.DECISION, RequestId("r"), "e", SOURCE, "application/json", "0" * 64, 0, 9, "one"),
    b"record",
)
ENTITY = '["applicant","credit",17]'
STEP = step_key("credit|consumer|pd|4|2")
SHADOW = shadow_key(ShadowName("credit", "pd", "4"), 600_000)
STEP_ENTRY = write_entry(7, StepStats().as_json())
SHADOW_ENTRY = write_entry(7, Comparison().as_json())
INTENT = write_intent(f"sha256:{'a' * 64}", b"record")


def read_join(_: str, entry: bytes) -> None:
    """As the decide worker reads."""
    read_entry_header(entry)


class Silent:
    """A publisher that is never asked."""

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """See ``ports.log.Publisher``."""
        raise AssertionError(records)


@pytest.mark.parametrize(
    ("read", "key", "entry"),
    [
        (read_join, "r", JOIN),
        (check_entry, ENTITY, write_state(State())),
        (check_entry, '["all","credit"]', write_state(State())),
        (check_window, STEP, STEP_ENTRY),
        (check_window, SHADOW, SHADOW_ENTRY),
        (check_window, "intent|e", INTENT),
        (check_window, "told|e", b"1700000000000"),
    ],
)
def test_what_workers_write_is_recovered(read: ReadEntry, key: str, entry: bytes, tmp_path: Path) -> None:
    """A foreign record of the same key does not take its place, whatever lies around it; a deletion does."""
    app = create_app(Settings(data_dir=tmp_path), role="decide", instance="one")
    table = DurableTable(app, name="any", changelog=CHANGELOG, publisher=Silent(), read=read)
    tp = TP(CHANGELOG, 0)

    def recover(*records: tuple[bytes | None, bytes | None]) -> None:
        first = (table._store.persisted_offset(tp) or 0) + 1
        messages = [
            SimpleNamespace(tp=tp, offset=first + at, key=name, value=value, headers=())
            for at, (name, value) in enumerate(records)
        ]
        events = [cast(EventT[Any], SimpleNamespace(message=message)) for message in messages]
        table._store.apply_changelog_batch(events, lambda each: each, lambda each: each)

    foreign = [(b"\xff", REPLY), (None, REPLY), (b"17", REPLY), (key.encode(), REPLY)]
    with capture_logs() as logs:
        recover(*foreign, (key.encode(), entry), *foreign)
    assert list(table.entries(0)) == [(key, entry)]
    assert table._store.persisted_offset(tp) == 9
    assert [(each["event"], each["partition"], each["offset"]) for each in logs] == [
        ("changelog_record_foreign", 0, offset) for offset in (1, 2, 3, 4, 6, 7, 8, 9)
    ]
    assert {each["key"] for each in logs} == {repr(name or b"") for name, _ in foreign}
    recover((key.encode(), None))
    assert not list(table.entries(0))


@pytest.mark.parametrize(
    ("read", "key", "entry"),
    [
        (read_join, "r", b""),
        (read_join, "r", b"\x01\x09" + JOIN[2:]),
        (check_entry, "17", write_state(State())),
        (check_entry, '{"view":"applicant"}', write_state(State())),
        (check_entry, '["applicant"]', write_state(State())),
        (check_entry, "[1,2,3]", write_state(State())),
        (check_entry, ENTITY, b""),
        (check_window, STEP, SHADOW_ENTRY),
        (check_window, STEP, write_entry(7, {**StepStats().as_json(), "latencies": 1})),
        (check_window, STEP, write_entry(cast(int, "7"), StepStats().as_json())),
        (check_window, SHADOW, b""),
        (check_window, "shadow|credit|pd|4|noon", SHADOW_ENTRY),
        (check_window, "shadow|credit", SHADOW_ENTRY),
        (check_window, "intent|e", b"\xff\n"),
        (check_window, "intent|e", b"r\nrecord"),
        (check_window, "intent|", INTENT),
        (check_window, "told|e", b"today"),
        (check_window, "told|", b"1"),
        (check_window, "anything", STEP_ENTRY),
    ],
)
def test_what_no_worker_writes(read: ReadEntry, key: str, entry: bytes) -> None:
    """Keys of another form, entries that hold something else."""
    with pytest.raises(ValueError, match=r"."):
        read(key, entry)


def test_who_judges_rollouts_passes_foreign_windows_by(tmp_path: Path) -> None:
    """It follows every partition's changelog by itself."""
    settings = Settings(data_dir=tmp_path)
    followed = WindowFollower(
        settings, changelog=CHANGELOG, log_topic="inference.audit", partitions=1, group="g", client_id="one"
    )
    tp = cast(Any, TP(CHANGELOG, 0))
    sent = [
        (STEP.encode(), STEP_ENTRY),
        (STEP.encode(), REPLY),
        (b"\xff", REPLY),
        (None, REPLY),
        (b"shadow|a|b|c|d", REPLY),
    ]
    with capture_logs() as logs:
        followed._take({tp: [written(at, key, value) for at, (key, value) in enumerate(sent)]})
    assert followed.partitions == {0: {STEP: STEP_ENTRY}}
    assert [each["offset"] for each in logs] == [1, 2, 3, 4]
    followed._take({tp: [written(5, STEP.encode(), None)]})
    assert followed.partitions == {0: {}}


def test_who_judges_rollouts_passes_by_what_a_frozen_worker_counted(tmp_path: Path) -> None:
    """It lies behind its successor's, and counts less."""
    settings = Settings(data_dir=tmp_path)
    followed = WindowFollower(
        settings, changelog=CHANGELOG, log_topic="inference.audit", partitions=1, group="g", client_id="one"
    )
    tp, key = cast(Any, TP(CHANGELOG, 0)), STEP.encode()
    later = write_entry(9, StepStats().as_json())
    followed._take({tp: [written(0, key, STEP_ENTRY, epoch=3), written(1, key, later, epoch=4)]})
    followed._take({tp: [written(2, key, STEP_ENTRY, epoch=3), written(3, key, None, epoch=3)]})
    assert followed.partitions == {0: {STEP: later}}
    followed._take({tp: [written(4, key, STEP_ENTRY, epoch=4)]})
    assert followed.partitions == {0: {STEP: STEP_ENTRY}}


def written(offset: int, key: bytes | None, value: bytes | None, *, epoch: int = 0) -> SimpleNamespace:
    return SimpleNamespace(offset=offset, key=key, value=value, headers=(("epoch", str(epoch).encode()),))
