"""The audit's rules: framing, names, what a stored object and the log must agree on."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import zstandard

from app.domain.audit import (
    Evidence,
    beside,
    cut,
    frame,
    object_key,
    point,
    read_evidence,
    read_index,
    reconcile,
)
from app.domain.audit_view import readable
from app.domain.decisions import Kind
from app.domain.requests import InboundRecord
from tests.support.audit_records import CODEC, audit_record


def evidence(*offsets: int, note: str = "") -> list[Evidence]:
    return [read_evidence(audit_record(offset, note=note)) for offset in offsets]


def with_header(record: InboundRecord, name: str, *values: bytes) -> InboundRecord:
    kept = tuple(header for header in record.headers if header[0] != name)
    return replace(record, headers=(*kept, *((name, value) for value in values)))


def test_each_record_is_cut_out_by_its_byte_range() -> None:
    """A record's range, decompressed alone, gives its very bytes."""
    batch = evidence(5, 6, 9)
    made = frame(batch)
    for record in batch:
        place = made.places[record.offset]
        assert cut(made.body[place.start : place.start + place.length], place.sha256) == record.value


def test_the_object_is_a_plain_zstandard_file() -> None:
    """Any Zstandard tool reads all records, one after the other; the index is skipped."""
    batch = evidence(0, 1, 2)
    made = frame(batch)
    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(made.body), read_across_frames=True)
    assert reader.read() == b"".join(record.value for record in batch)


def test_the_metadata_names_the_stretch_of_the_log() -> None:
    """Start, end, count, format and the digest of the whole body."""
    made = frame(evidence(5, 6, 9))
    assert made.key == "audit/inference.audit/partition=00000/00000000000000000005.avro.zst"
    assert made.metadata == {
        "format": "model-broker-audit/1",
        "start-offset": "5",
        "end-offset": "9",
        "records": "3",
        "sha256": hashlib.sha256(made.body).hexdigest(),
    }


def test_the_index_reads_back() -> None:
    """An object says by itself which records it holds and where."""
    made = frame(evidence(5, 6, 9))
    index = read_index(made.body, made.metadata)
    assert (index.topic, index.partition, index.start, index.end) == ("inference.audit", 0, 5, 9)
    assert index.places == made.places


def test_keys_sort_as_offsets_do() -> None:
    """Listing a partition's objects gives them in the log's order."""
    keys = [object_key("t", 3, offset) for offset in (0, 9, 10, 99_999, 2**62)]
    assert keys == sorted(keys)


@pytest.mark.parametrize("offsets", [(), (3, 3), (4, 3)])
def test_a_batch_rises(offsets: tuple[int, ...]) -> None:
    """A batch that is empty, or whose offsets do not rise, is refused."""
    with pytest.raises(ValueError, match="rising offsets"):
        frame(evidence(*offsets))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda body: body[:-1], "metadata says"),
        (lambda body: b"", "metadata says"),
        (lambda body: body[:40] + bytes([body[40] ^ 1]) + body[41:], "metadata says"),
    ],
)
def test_a_damaged_object_is_not_believed(damage: Callable[[bytes], bytes], said: str) -> None:
    """An object whose bytes are not those that were written is refused."""
    made = frame(evidence(5))
    with pytest.raises(ValueError, match=said):
        read_index(damage(made.body), made.metadata)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no index"),
        (b"x" * 100, "does not begin with an index"),
        (b"\x50\x2a\x4d\x18\xff\xff\xff\x7f", "does not begin with an index"),
        (b"\x50\x2a\x4d\x18\x02\x00\x00\x00{}", "cannot be read"),
        (b"\x50\x2a\x4d\x18\x02\x00\x00\x00[]", "cannot be read"),
        (b"\x50\x2a\x4d\x18\x02\x00\x00\x00{]", "."),
        (b'\x50\x2a\x4d\x18\x0e\x00\x00\x00{"format":"x"}', "format is 'x'"),
    ],
)
def test_a_foreign_object_is_not_believed(body: bytes, said: str) -> None:
    """An object of another making is refused with a reason."""
    with pytest.raises(ValueError, match=said):
        read_index(body, {})


def test_an_index_that_does_not_add_up_is_not_believed() -> None:
    """An object that ends elsewhere than its index says is refused, even without metadata to compare."""
    with pytest.raises(ValueError, match="accounts for"):
        read_index(frame(evidence(5)).body + b"more", {})


def test_a_stored_object_covers_a_longer_batch_in_part() -> None:
    """What the object holds is pointed into; the rest goes on after its end."""
    stored = frame(evidence(5, 6))
    found = reconcile(evidence(5, 6, 7, 8), read_index(stored.body, stored.metadata))
    assert [record.offset for record in found.covered] == [5, 6]
    assert [record.offset for record in found.rest] == [7, 8]
    assert found.faults == ()


def test_a_stored_object_covers_a_shorter_batch_whole() -> None:
    """A replay with smaller batches finds its records in the larger object."""
    stored = frame(evidence(5, 6, 7, 8))
    for offsets in ((5, 6), (6, 7), (8,)):
        found = reconcile(evidence(*offsets), read_index(stored.body, stored.metadata))
        assert [record.offset for record in found.covered] == list(offsets)
        assert (found.rest, found.faults) == ((), ())


@pytest.mark.parametrize(
    ("held", "fault"),
    [
        (evidence(5, 6, 7, note="other"), "offset 5 has SHA-256"),
        (evidence(5, 7), "offset 6 lies in the object and not in the log"),
        (evidence(4, 5, 6, 7), "not offset 4"),
        ([replace(record, partition=1) for record in evidence(5, 6, 7)], "not offset 5"),
    ],
)
def test_an_object_that_contradicts_the_log_covers_nothing(held: list[Evidence], fault: str) -> None:
    """Other bytes, a record too many, another stretch or partition: each is a fault, and nothing is pointed there."""
    stored = frame(evidence(5, 6, 7))
    found = reconcile(held, read_index(stored.body, stored.metadata))
    assert found.covered == ()
    assert any(fault in said for said in found.faults), found.faults


def test_a_record_that_the_object_lacks_is_a_fault() -> None:
    """A record of the log that lies between the object's ends and is not in it contradicts the log."""
    stored = frame(evidence(5, 7))
    found = reconcile(evidence(5, 6, 7), read_index(stored.body, stored.metadata))
    assert found.faults == ("offset 6 lies in the log and not in the object",)


def test_a_contested_object_has_a_name_of_its_own() -> None:
    """The same bytes always get the same second name, other bytes another."""
    one, other = frame(evidence(5)), frame(evidence(5, note="other"))
    assert beside(one).key == beside(frame(evidence(5))).key
    assert len({one.key, beside(one).key, beside(other).key}) == 3


def test_a_forged_range_is_not_believed() -> None:
    """Bytes that are no frame, a frame of another record, and a frame that claims too much are refused."""
    record = evidence(5)[0]
    with pytest.raises(ValueError, match="not one Zstandard frame"):
        cut(b"no frame", record.sha256)
    with pytest.raises(ValueError, match="its pointer says"):
        cut(zstandard.compress(b"another"), record.sha256)
    with pytest.raises(ValueError, match="not one Zstandard frame"):
        cut(zstandard.compress(record.value) * 2, record.sha256)
    huge = zstandard.compress(bytes(17 * 1024 * 1024))
    with pytest.raises(ValueError, match="are believed"):
        cut(huge, record.sha256)


def test_pointers_are_named_by_kind() -> None:
    """A decision has one place a request; each refusal, shadow and step of a rollout its own."""
    made = frame(evidence(5))
    records = [read_evidence(audit_record(5, "r", "e", kind=kind)) for kind in Kind]
    places = [point(record, made.places[5], "bucket", made.key, None).sort_key for record in records]
    assert places == ["DECISION", "REFUSAL#e", "SHADOW#e", "ROLLOUT#e"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (replace(audit_record(1), headers=()), "header request-id is there 0 times"),
        (with_header(audit_record(1), "execution-id", b"a", b"b"), "header execution-id is there 2 times"),
        (with_header(audit_record(1), "request-id", b""), "1 to 512 are allowed"),
        (with_header(audit_record(1), "request-id", b"x" * 513), "1 to 512 are allowed"),
        (with_header(audit_record(1), "status", b"\xff"), "header status is not UTF-8"),
        (with_header(audit_record(1), "kind", b"rumour"), "header kind is 'rumour': one of decision, refusal"),
        (replace(audit_record(1), value=None), "starts with nothing"),
        (replace(audit_record(1), value=b"{}"), "starts with 7b7d"),
    ],
)
def test_malformed_records_say_why(record: InboundRecord, said: str) -> None:
    """What cannot be kept as evidence is refused with the reason that its dead letter carries."""
    with pytest.raises(ValueError, match=said):
        read_evidence(record)


def test_a_record_opens_for_reading() -> None:
    """JSON members become values, features get names, bytes that are no text stay recognisable."""
    opened = readable(CODEC.decode(audit_record(5, "r").value or b""))
    assert opened["reply"]["request_id"] == "r"
    assert opened["tasks"][0]["features"][0]["ref"] == "applicant.age_years"
    assert opened["tasks"][0]["result"]["output"] == {"probability": 0.12}
    assert opened["source"]["headers"][0]["value"] == {"b64": "AP8="}
