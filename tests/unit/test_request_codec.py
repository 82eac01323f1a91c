"""Requests in JSON, Avro single-object encoding, and Confluent's wire format with a registry on a real socket."""

import io
from collections.abc import AsyncIterator
from typing import Any

import fastavro
import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from app.adapters.avro import AvroCodec
from app.adapters.request_codec import RequestDecoder, parse_writer_schema
from app.domain.errors import StoreUnavailable, Undecodable
from app.domain.requests import AVRO, JSON
from app.resources import resource_dir

REQUEST = {
    "request_id": "r-1",
    "path": "/credit/decision",
    "entities": {"applicant_id": 17, "branch": "A"},
    "inputs": {"amount": 5000, "rate": 0.5, "known": True, "history": [1, None, "x"], "nothing": None},
    "metadata": {"channel": "web"},
}
OWN_SCHEMA = (resource_dir("schemas") / "InferenceRequest.avsc").read_text()


def confluent(schema_id: int, schema: str, record: Any) -> bytes:
    """``record`` as a Confluent serializer writes it."""
    out = io.BytesIO()
    out.write(b"\x00" + schema_id.to_bytes(4, "big"))
    fastavro.schemaless_writer(out, fastavro.parse_schema(orjson.loads(schema)), record)
    return out.getvalue()


class Registry:
    """A schema registry's one route, with schemas that a test sets."""

    def __init__(self) -> None:
        self.answers: dict[int, tuple[int, bytes]] = {}
        self.asked = 0
        self.url = ""

    def register(self, schema_id: int, schema: str, **members: Any) -> None:
        self.answers[schema_id] = (200, orjson.dumps({"schema": schema, **members}))

    async def answer(self, request: web.Request) -> web.Response:
        self.asked += 1
        status, body = self.answers.get(int(request.match_info["id"]), (404, b'{"error_code":40403}'))
        return web.Response(status=status, body=body, content_type="application/vnd.schemaregistry.v1+json")


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    served = Registry()
    app = web.Application()
    app.router.add_get("/schemas/ids/{id}", served.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield served
    await runner.cleanup()


@pytest.fixture
async def decoder(registry: Registry) -> AsyncIterator[RequestDecoder]:
    decoder = RequestDecoder(registry.url + "/")
    yield decoder
    await decoder.close()


async def test_json() -> None:
    """JSON is read under each name that senders give it, or none, and the last of two members with one name counts."""
    decoder = RequestDecoder(None)
    assert await decoder.decode(JSON, orjson.dumps(REQUEST)) == REQUEST
    for content_type in ("", "text/plain", "application/octet-stream", "application/vnd.lender.request+json"):
        assert await decoder.decode(content_type, orjson.dumps(REQUEST)) == REQUEST
    assert await decoder.decode("text/plain", b'{"path": "/a", "path": "/b"}') == {"path": "/b"}


@pytest.mark.parametrize("content_type", [AVRO, JSON, "application/octet-stream"])
async def test_single_object(content_type: str) -> None:
    """Single-object encoding is known by its bytes, whatever the content type says."""
    value = AvroCodec("InferenceRequest").encode(REQUEST)
    assert await RequestDecoder(None).decode(content_type, value) == REQUEST


@pytest.mark.parametrize(
    ("content_type", "value"),
    [
        ("image/png", orjson.dumps(REQUEST)),
        ("application/xml", orjson.dumps(REQUEST)),
        (JSON, None),
        (JSON, b""),
        (JSON, b"{"),
        (JSON, b"[]"),
        (JSON, b'{"a": NaN}'),
        (JSON, b"[" * 100_000),
        (AVRO, b"{}"),
        (AVRO, b"\xc3\x01"),
        (AVRO, b"\xc3\x01" + b"\x00" * 20),
        (AVRO, AvroCodec("InferenceRequest").encode(REQUEST)[:-3]),
        (JSON, confluent(7, OWN_SCHEMA, REQUEST)),
    ],
)
async def test_undecodable(content_type: str, value: bytes | None) -> None:
    """Bytes that are no request are undecodable, Confluent's among them where no registry is configured."""
    with pytest.raises(Undecodable):
        await RequestDecoder(None).decode(content_type, value)


async def test_confluent(registry: Registry, decoder: RequestDecoder) -> None:
    """The writer's schema is fetched by the id in the bytes, once."""
    registry.register(7, OWN_SCHEMA)
    for _ in range(3):
        assert await decoder.decode(JSON, confluent(7, OWN_SCHEMA, REQUEST)) == REQUEST
    assert registry.asked == 1


async def test_confluent_typed_inputs(registry: Registry, decoder: RequestDecoder) -> None:
    """A caller may type its inputs as a record; logical types arrive as what they are stored as."""
    schema = orjson.dumps(
        {
            "type": "record",
            "name": "LoanRequest",
            "fields": [
                {"name": "path", "type": "string"},
                {
                    "name": "inputs",
                    "type": {
                        "type": "record",
                        "name": "Loan",
                        "fields": [
                            {"name": "amount", "type": "int"},
                            {"name": "asked", "type": {"type": "long", "logicalType": "timestamp-millis"}},
                        ],
                    },
                },
            ],
        }
    ).decode()
    registry.register(8, schema)
    plain = schema.replace(',"logicalType":"timestamp-millis"', "")
    value = confluent(8, plain, {"path": "/a", "inputs": {"amount": 5, "asked": 1_700_000_000_000}})
    assert await decoder.decode(AVRO, value) == {"path": "/a", "inputs": {"amount": 5, "asked": 1_700_000_000_000}}


async def test_confluent_damaged(registry: Registry, decoder: RequestDecoder) -> None:
    """An id that the registry does not have, and a body that its schema does not fit, are undecodable."""
    registry.register(7, OWN_SCHEMA)
    registry.register(9, '"string"')
    for value in (
        b"\x00\x00",
        confluent(99, OWN_SCHEMA, REQUEST),
        confluent(7, OWN_SCHEMA, REQUEST)[:-3],
        b"\x00\x00\x00\x00\x07\xff\xff\xff\xff\xff",
        confluent(9, '"string"', "text"),
    ):
        with pytest.raises(Undecodable):
            await decoder.decode(AVRO, value)


async def test_registry_away(registry: Registry, decoder: RequestDecoder) -> None:
    """A registry that fails or does not answer says nothing of the bytes; the next attempt asks again."""
    value = confluent(7, OWN_SCHEMA, REQUEST)
    registry.answers[7] = (500, b"")
    with pytest.raises(StoreUnavailable):
        await decoder.decode(AVRO, value)
    registry.register(7, OWN_SCHEMA)
    assert await decoder.decode(AVRO, value) == REQUEST
    nobody = RequestDecoder("http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable):
        await nobody.decode(AVRO, value)
    await nobody.close()


def record(name: str, *fields: Any) -> dict[str, Any]:
    """A record schema with fields of the given types."""
    return {
        "type": "record",
        "name": name,
        "namespace": "n",
        "fields": [{"name": f"f{number}", "type": each} for number, each in enumerate(fields)],
    }


@pytest.mark.parametrize(
    "schema",
    [
        record("Node", ["null", "Node"]),
        record("Outer", record("Inner", {"type": "map", "values": "n.Outer"})),
        record("Wide", {"type": "array", "items": "null"}),
        record("Wide", {"type": "array", "items": record("Empty")}),
        record("Wide", {"type": "array", "items": {"type": "fixed", "name": "F", "size": 0}}),
        record("Late", record("Empty"), {"type": "array", "items": "n.Empty"}),
        record("Unknown", "Nothing"),
        {"type": "record"},
        5,
    ],
)
def test_dangerous_schema(schema: Any) -> None:
    """A schema that contains itself, or makes values out of no bytes, reads nothing here."""
    with pytest.raises(Undecodable):
        parse_writer_schema(1, orjson.dumps({"schema": orjson.dumps(schema).decode()}))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b'{"schema": 5}',
        b'{"schema": "{"}',
        b'{"schema": "{}", "schemaType": "PROTOBUF"}',
        b'{"schema": "\\"string\\"", "references": [{"name": "x"}]}',
        orjson.dumps({"schema": '{"type":' * 900 + '"string"' + "}" * 900}),
    ],
)
def test_odd_answer(answer: bytes) -> None:
    """A registry's answer that is no Avro schema is told apart from one that is not there."""
    with pytest.raises(Undecodable):
        parse_writer_schema(1, answer)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\xc3\x01", AvroCodec("InferenceRequest").encode(REQUEST)[:10]]))
async def test_any_bytes(tail: bytes, head: bytes) -> None:
    """Any bytes are a request's members or are undecodable."""
    try:
        members = await RequestDecoder(None).decode(JSON, head + tail)
    except Undecodable:
        return
    assert isinstance(members, dict)
