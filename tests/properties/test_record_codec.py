"""Decision records as bytes: what is written is read back, whatever is in it; what is damaged is refused."""

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.adapters.record_codec import (
    EntryState,
    decode_record,
    encode_entry,
    encode_record,
    entry_record,
    read_entry_header,
)
from app.domain.decisions import DecisionRecord, Kind, TaskRecord
from app.domain.dispatch import Attempt, TaskResult, TaskStatus
from app.domain.errors import Code, Problem
from app.domain.features import FeatureStatus, FeatureValue
from app.domain.join import Status
from app.domain.requests import InboundRecord, RequestId

NEEDS: tuple[Literal["required", "optional", "default"], ...] = ("required", "optional", "default")
text = st.text(max_size=20)
binary = st.binary(max_size=40)
times = st.integers(-1, 2**62)
whole = st.integers(-(2**63), 2**63 - 1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
scalars: st.SearchStrategy[Any] = st.none() | st.booleans() | whole | numbers | text
optional_text = st.none() | text
problems = st.builds(Problem, st.sampled_from(Code), text, optional_text, optional_text)
features = st.builds(
    FeatureValue,
    text,
    st.sampled_from(FeatureStatus),
    scalars | binary | st.lists(scalars | binary, max_size=4).map(tuple),
    st.none() | whole,
    text,
    optional_text,
)
attempts = st.builds(Attempt, text, times, numbers, text)
outputs = st.none() | st.dictionaries(text, scalars, max_size=3)


@st.composite
def tasks(draw: st.DrawFn) -> TaskRecord:
    """A task, answered or not; its result carries its name."""
    name = draw(text)
    result = None
    if draw(st.booleans()):
        result = TaskResult(
            name,
            draw(st.sampled_from(TaskStatus)),
            draw(outputs),
            draw(st.none() | problems),
            draw(numbers),
            tuple(draw(st.lists(attempts, max_size=2))),
            draw(binary),
        )
    need = draw(st.sampled_from(NEEDS))
    governance = draw(st.none() | st.dictionaries(text, text, max_size=2))
    given_ = tuple(draw(st.lists(features, max_size=3)))
    return TaskRecord(
        name, draw(text), draw(text), draw(text), draw(text), draw(text), need, governance, given_, result
    )


sources = st.builds(
    InboundRecord,
    text,
    st.integers(0, 2**31 - 1),
    times,
    times,
    st.none() | binary,
    st.none() | binary,
    st.lists(st.tuples(text, binary), max_size=3).map(tuple),
)
records = st.builds(
    DecisionRecord,
    st.sampled_from(Kind),
    text.map(RequestId),
    text,
    sources,
    text,
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    times,
    times,
    text,
    optional_text,
    optional_text,
    optional_text,
    optional_text,
    st.lists(tasks(), max_size=3).map(tuple),
    st.none() | st.sampled_from(Status),
    st.none() | times,
    st.lists(problems, max_size=3).map(tuple),
    st.none() | binary,
)


@given(records)
def test_what_is_written_is_read_back(record: DecisionRecord) -> None:
    """Every member, and the same bytes again from what was read."""
    encoded = encode_record(record)
    assert decode_record(encoded) == record
    assert encode_record(decode_record(encoded)) == encoded


@given(records, st.sampled_from(EntryState))
def test_an_entry_is_a_header_and_the_records_very_bytes(record: DecisionRecord, state: EntryState) -> None:
    """State, time and digest are readable without the record; the record comes back as it went in."""
    encoded = encode_record(record)
    entry = encode_entry(state, record, encoded)
    header = read_entry_header(entry)
    assert (header.state, header.body) == (state, record.body)
    assert header.time_ms == (record.deadline_ms if record.decided_ms is None else record.decided_ms)
    assert entry_record(entry) == encoded


@given(records, st.data())
def test_a_part_of_a_record_is_refused(record: DecisionRecord, data: st.DataObject) -> None:
    """Bytes cut short are a ValueError, never another record."""
    encoded = encode_record(record)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(ValueError, match=r"Avro|damaged|fingerprint"):
        decode_record(encoded[:cut])


@pytest.mark.parametrize("entry", [b"", b"\x01\x01", b"\x09" + b"\0" * 60])
def test_entries_of_another_kind_are_refused(entry: bytes) -> None:
    """Too short, or of a version that this worker does not read."""
    with pytest.raises(ValueError, match="joins entry"):
        read_entry_header(entry)


def test_an_entry_whose_record_is_damaged() -> None:
    """The header is read; the record is refused."""
    header = b"\x01\x03" + b"\0" * 8 + b"\0" * 32
    assert read_entry_header(header).state is EntryState.COMPLETED
    with pytest.raises(ValueError, match="damaged joins entry"):
        entry_record(header + b"not zstandard")
