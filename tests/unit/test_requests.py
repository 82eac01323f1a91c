"""Requests: headers and bodies in, what is understood of them out, and what is said of the rest."""

import pytest

from app.domain.errors import Code, RequestRefused, Undecodable
from app.domain.requests import (
    Headers,
    InboundRecord,
    ReplyAddress,
    address_headers,
    decode_json,
    digest_of,
    digest_of_bytes,
    identify,
    positional_id,
    read_address,
    read_envelope,
    read_request,
)


def record(headers: Headers = (), offset: int = 17) -> InboundRecord:
    """A record with these headers."""
    return InboundRecord("inference.requests", 3, offset, 0, None, b"", headers)


def test_an_envelope_of_all_headers() -> None:
    """Each header that is understood has its place; names that clients of Spring use count too."""
    envelope = read_envelope(
        record(
            (
                ("request-id", b"r-1"),
                ("deadline-ms", b"1750000000000"),
                ("priority", b"high"),
                ("traceparent", b"00-1-2-01"),
                ("contentType", b'"application/JSON; charset=utf-8"'),
                ("kafka_correlationId", b"\x00\x01"),
                ("kafka_replyTopic", b"replies"),
                ("kafka_replyPartition", b"\0\0\0\2"),
            )
        )
    )
    assert envelope.request_id == "r-1"
    assert envelope.deadline_ms == 1_750_000_000_000
    assert (envelope.priority, envelope.traceparent) == ("high", "00-1-2-01")
    assert envelope.content_type == "application/json"
    assert envelope.address == ReplyAddress("replies", 2, (("kafka_correlationId", b"\x00\x01"),))


def test_two_reply_topics_are_one_too_many() -> None:
    """Which of them is meant nobody knows; one that is said twice is one."""
    twice = (("kafka_replyTopic", b"a"), ("reply_to", b"a"))
    assert read_envelope(record(twice)).address == ReplyAddress("a", None, ())
    with pytest.raises(RequestRefused, match=r"name 2 reply topics \(a, b\)"):
        read_envelope(record((*twice, ("kafka_replyTopic", b"b"))))


def test_an_envelope_without_headers() -> None:
    """Nothing is needed."""
    envelope = read_envelope(record())
    assert (envelope.request_id, envelope.address, envelope.deadline_ms) == (None, None, None)
    assert (envelope.priority, envelope.content_type) == ("normal", "application/json")


def test_headers_without_a_value_are_absent() -> None:
    """All of them alike: a client that sends null or an empty text for what it does not know means nothing by it."""
    own = ("request-id", "deadline-ms", "priority", "traceparent", "content-type")
    empty = tuple((name, b"") for name in (*own, "kafka_replyTopic", "kafka_correlationId", "kafka_replyPartition"))
    assert read_envelope(record(empty)) == read_envelope(record())
    assert identify(record(empty)) == identify(record())
    assert identify(record(empty), {"request_id": "own"}) == "own"
    assert read_envelope(record((("request-id", b""), ("request-id", b"r-1")))).request_id == "r-1"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("deadline-ms", b"soon", "epoch milliseconds"),
        ("deadline-ms", b"-5", "epoch milliseconds"),
        ("deadline-ms", "٣".encode(), "epoch milliseconds"),
        ("deadline-ms", b"1" * 17, "epoch milliseconds"),
        ("priority", b"urgent", "send high, normal or low"),
        ("kafka_replyPartition", b"0", "has 1 bytes: send 4, big-endian"),
        ("kafka_replyPartition", bytes(8), "has 8 bytes: send 4, big-endian"),
        ("request-id", b"\xff", "not UTF-8"),
        ("traceparent", b"\xff", "not UTF-8"),
        ("request-id", b"a\tb", "1 to 128 printable"),
        ("request-id", b"x" * 129, "1 to 128 printable"),
        ("request-id", b"rollout/credit/consumer/pd", "begin with rollout/ are those of rollouts' own records"),
    ],
)
def test_headers_that_cannot_mean_what_they_hold(name: str, value: bytes, said: str) -> None:
    """Refused, with the header and what to send in the message."""
    with pytest.raises(RequestRefused, match=said) as caught:
        read_envelope(record(((name, value),)))
    assert caught.value.problem.code is Code.REQUEST_INVALID


@pytest.mark.parametrize(
    ("headers", "address"),
    [
        ((), None),
        ((("kafka_replyTopic", b""),), None),
        ((("kafka_replyTopic", "répliques".encode()),), None),
        ((("reply_to", b"r"), ("correlation_id", b"7")), ReplyAddress("r", None, (("correlation_id", b"7"),))),
        ((("reply_to", b"r"), ("kafka_replyPartition", b"\1")), ReplyAddress("r", None, ())),
        (
            (("reply_to", b""), ("kafka_replyTopic", b"r"), ("kafka_replyPartition", b""), ("correlation_id", b"")),
            ReplyAddress("r", None, ()),
        ),
        ((("other", b"x"), ("reply_to", b"first"), ("reply_to", b"second")), ReplyAddress("first", None, ())),
    ],
)
def test_addresses(headers: Headers, address: ReplyAddress | None) -> None:
    """Either convention is read; what cannot be read is none."""
    assert read_address(headers) == address


def test_which_reply_topics_are_allowed() -> None:
    """A glob is matched with and without this broker's own prefix."""
    address = ReplyAddress("team.replies", None, ())
    assert address.allowed_by(["*replies"])
    assert address.allowed_by(["replies"], "team.")
    assert not address.allowed_by(["replies"])
    assert not address.allowed_by([])


def test_the_headers_of_an_address_are_kept_within_a_bound() -> None:
    """What a reply needs is kept; a correlation id of any size is not."""
    headers = (("reply_to", b"r"), ("correlation_id", b"7"), ("kafka_replyPartition", b"\0\0\0\1"), ("other", b"x"))
    assert address_headers(headers) == headers[:3]
    assert address_headers((*headers, ("correlation_id", b"x" * 5_000))) == ()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ((("request-id", b"r-1"),), "r-1"),
        ((("request-id", b"\xff"),), None),
        ((("request-id", b"\n"),), None),
        ((), None),
    ],
)
def test_what_cannot_be_read_has_an_id_too(headers: Headers, expected: str | None) -> None:
    """The header's where it can be, else one made of the position, the same at every delivery."""
    assert identify(record(headers)) == (expected or positional_id(record()))
    assert positional_id(record()) != positional_id(record(offset=18))


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ((), {"request_id": "body", "path": 5}, "body"),
        ((("request-id", b"header"),), {"request_id": "body"}, "header"),
        ((("request-id", b"\xff"),), {"request_id": "body"}, None),
        ((), {"request_id": 7}, None),
        ((), {"request_id": ""}, None),
        ((), {}, None),
    ],
)
def test_a_refused_body_is_answered_under_its_id(
    headers: Headers, body: dict[str, object], expected: str | None
) -> None:
    """A caller finds the refusal by the id that it sent, if that can serve as one."""
    assert identify(record(headers), body) == (expected or positional_id(record()))


def test_the_headers_id_wins() -> None:
    """The header's id, then the body's, then the position's."""
    body = {"path": "/a", "request_id": "body"}
    named = record((("request-id", b"header"),))
    assert read_request(read_envelope(named), body, named).request_id == "header"
    assert read_request(read_envelope(record()), body, record()).request_id == "body"
    assert read_request(read_envelope(record()), {"path": "/a"}, record()).request_id == positional_id(record())


@pytest.mark.parametrize("value", [b"", b"{", b"\xff", b"NaN", b"[" * 2_000])
def test_bytes_that_are_no_json(value: bytes) -> None:
    """Undecodable: they also go to the dead-letter topic."""
    with pytest.raises(Undecodable, match="not JSON"):
        decode_json(value)


@pytest.mark.parametrize("value", [b"[]", b"1", b"null", b'"x"'])
def test_json_that_is_no_object(value: bytes) -> None:
    """Undecodable as well, and the message says what it is."""
    with pytest.raises(Undecodable, match="send an object"):
        decode_json(value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "path is missing"),
        ({"path": "a"}, "starts with /"),
        ({"path": "/" + "a" * 512}, "path"),
        ({"path": 1}, "path"),
        ({"path": "/a", "colour": 1}, "unknown member colour"),
        ({"path": "/a", "inputs": []}, "inputs is list"),
        ({"path": "/a", "entities": "x"}, "entities is str"),
        ({"path": "/a", "request_id": 7}, "request_id is not text"),
        ({"path": "/a", "request_id": ""}, "printable"),
        ({"path": "/a", "request_id": "rollout/credit/consumer/pd"}, "begin with rollout/"),
        ({"path": "/a", "inputs": {"x": object()}}, "no JSON form"),
    ],
)
def test_bodies_that_are_no_request(body: dict[str, object], said: str) -> None:
    """Refused, each with what is wrong."""
    with pytest.raises(RequestRefused, match=said):
        read_request(read_envelope(record()), body, record())


def test_a_refused_id_of_a_rollout_is_not_answered_under() -> None:
    """Its refusal stands under the record's place, not among the rollout's steps; what only looks alike is an id."""
    named = record((("request-id", b"rollout/a/b/c"),))
    assert identify(named) == positional_id(named)
    assert identify(record(), {"request_id": "rollout/a/b/c"}) == positional_id(record())
    assert identify(record(), {"request_id": "rollouts/1"}) == "rollouts/1"


def test_absent_sections_are_empty() -> None:
    """A section that is absent or null is empty."""
    request = read_request(read_envelope(record()), {"path": "/a", "inputs": None}, record())
    assert (request.entities, request.inputs, request.metadata) == ({}, {}, {})


def test_bytes_count_in_a_digest() -> None:
    """Avro bodies may carry bytes."""
    assert digest_of("/a", {"inputs": {"x": b"1"}}) != digest_of("/a", {"inputs": {"x": b"2"}})
    assert digest_of_bytes(None) == digest_of_bytes(b"")
