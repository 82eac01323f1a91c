"""Requests under arbitrary bytes: read, or refused with a problem; never anything else."""

from typing import Any

import orjson
from hypothesis import assume, example, given
from hypothesis import strategies as st

from app.domain.errors import RequestRefused
from app.domain.requests import (
    REQUEST_ID_LENGTH_MAX,
    ROLLOUT_ID_PREFIX,
    Headers,
    InboundRecord,
    decode_json,
    digest_of,
    identify,
    positional_id,
    read_address,
    read_envelope,
    read_request,
)

NAMES = (
    "request-id", "deadline-ms", "traceparent", "priority", "content-type", "contentType", "kafka_correlationId",
    "kafka_replyTopic", "kafka_replyPartition", "correlation_id", "reply_to", "other",
)  # fmt: skip
VALUES = (b"", b"r-1", b"\xff", b"17", b"-1", b"1e3", b"normal", b"high", b'"application/json"', b"\0\0\0\7", b"\0")
headers = st.lists(
    st.tuples(st.sampled_from(NAMES), st.one_of(st.sampled_from(VALUES), st.binary(max_size=200))), max_size=8
).map(tuple)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
anything = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)
members = st.dictionaries(
    st.sampled_from(("request_id", "path", "entities", "inputs", "metadata", "colour")),
    st.one_of(anything, st.just("/credit/card"), st.dictionaries(st.text(), scalars)),
)


def record(value: bytes | None, record_headers: Headers = ()) -> InboundRecord:
    """A record at one position."""
    return InboundRecord("inference.requests", 3, 17, 0, None, value, record_headers)


def read(inbound: InboundRecord) -> object:
    """What admission does with a record, without its bounds."""
    return read_request(read_envelope(inbound), decode_json(inbound.value or b""), inbound)


@given(st.one_of(st.binary(), anything.map(orjson.dumps), members.map(orjson.dumps)), headers)
@example(b'{"path":"/a","inputs":{"x":' + b"[" * 300 + b"]" * 300 + b"}}", ())
@example(b'{"path":"/a","inputs":{"x":1e999}}', ())
@example(b'{"path":"/a","metadata":{"x":123456789012345678901234567890}}', ())
def test_anything_is_read_or_refused(value: bytes, record_headers: Headers) -> None:
    """No bytes and no headers raise anything but a refusal, which says what is wrong in text that can be sent."""
    inbound = record(value, record_headers)
    problem = None
    try:
        read(inbound)
    except RequestRefused as refused:
        problem = refused.problem
    if problem is not None:
        assert problem.message
        orjson.dumps(problem.as_json())
    address = read_address(record_headers)
    if address is not None:
        assert set(address.correlation) <= set(record_headers)
    request_id = identify(inbound)
    assert 1 <= len(request_id) <= REQUEST_ID_LENGTH_MAX
    assert request_id.isprintable()


@given(st.dictionaries(st.text(), scalars), st.randoms())
def test_the_digest_is_of_what_was_asked(inputs: dict[str, Any], random: Any) -> None:
    """The order of members does not count; a value does."""
    shuffled = list(inputs.items())
    random.shuffle(shuffled)
    assert digest_of("/a", {"inputs": inputs}) == digest_of("/a", {"inputs": dict(shuffled)})
    assert digest_of("/a", {"inputs": inputs}) != digest_of("/b", {"inputs": inputs})
    assert digest_of("/a", {"inputs": inputs}) != digest_of("/a", {"inputs": {**inputs, "another": 1}})


@given(st.text(min_size=1, max_size=REQUEST_ID_LENGTH_MAX).filter(str.isprintable))
def test_an_id_is_kept_as_it_came(text: str) -> None:
    """Any printable text of at most the bound's length is an id, unless it begins as rollouts' do."""
    assume(not text.startswith(ROLLOUT_ID_PREFIX))
    assert identify(record(None, (("request-id", text.encode()),))) == text
    assert identify(record(None, (("request-id", text.encode() + b"\n"),))) == positional_id(record(None))
