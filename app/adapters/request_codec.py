"""A request's bytes in, its members out: JSON, Avro in single-object encoding, or Avro in Confluent's wire format.

The bytes themselves tell: no JSON text begins with either format's magic, so producers that set no content type are
read like those that do. A content type that is neither's is refused: its sender meant something else. In Confluent's
format the bytes carry the id of the schema that wrote them; the registry gives the schema, and what it says is there is
what the broker judges, so a member that no request has is refused in Avro as it is in JSON. Schemas come from outside,
hence what could make a small body explode (recursion, arrays of nothing) is refused before it reads anything.

JSON's open questions are settled so: of members with one name the last counts, NaN and infinities are malformed, whole
numbers beyond 64 bits become floating-point, and nesting has a bound of some hundreds.
"""

import asyncio
import io
from collections.abc import Mapping
from typing import Any, Final

import aiohttp
import fastavro
import orjson

from app.adapters.avro import AvroCodec
from app.domain.errors import Code, Problem, StoreUnavailable, Undecodable
from app.domain.requests import decode_json

_SINGLE_OBJECT: Final = b"\xc3\x01"
_CONFLUENT: Final = b"\x00"
_CONFLUENT_HEADER_BYTES: Final = 5
_AVRO_TYPES: Final = frozenset(
    {"application/avro", "application/x-avro", "application/vnd.apache.avro", "avro/binary", "application/avro-binary"}
)
_JSON_TYPES: Final = frozenset(
    {"", "application/json", "text/json", "application/octet-stream", "binary/octet-stream", "text/plain"}
)
"""What JSON comes as: producers that know nothing of their bytes say octet-stream or plain text, Spring says ``""``."""
_FETCH_WITHIN_S: Final = 2.0
_SCHEMA_BYTES_MAX: Final = 1_048_576
_SCHEMAS_MAX: Final = 256


class RequestDecoder:
    """Decodes request bodies; holds the schemas it has met and one HTTP session for those it has not."""

    def __init__(self, schema_registry_url: str | None = None) -> None:
        self._own = AvroCodec("InferenceRequest")
        self._registry = schema_registry_url.rstrip("/") if schema_registry_url else None
        self._session: aiohttp.ClientSession | None = None
        self._schemas: dict[int, Any] = {}
        self._fetches: dict[int, asyncio.Task[Any]] = {}

    async def decode(self, content_type: str, value: bytes | None) -> Mapping[str, Any]:
        """The request's members.

        Raises:
            Undecodable: the bytes are no request, whoever tries; the message says why.
            StoreUnavailable: the schema registry does not answer; the bytes may well be good.
        """
        if not value:
            raise _malformed("the body is empty: send a request as JSON or Avro")
        if value.startswith(_SINGLE_OBJECT):
            try:
                return self._own.decode(value)
            except ValueError as error:
                raise _malformed(f"the body is Avro that cannot be read: {error}") from error
        if value.startswith(_CONFLUENT):
            return await self._decode_confluent(value)
        if content_type in _AVRO_TYPES:
            raise _malformed(
                f"the content type is {content_type}, and the body is neither in single-object encoding nor in "
                f"Confluent's wire format: it begins with {value[:2].hex()}"
            )
        if content_type not in _JSON_TYPES and not content_type.endswith("+json"):
            raise _malformed(
                f"the content type is {content_type[:80]!r}: send application/json or application/avro, or none at all"
            )
        return decode_json(value)

    async def close(self) -> None:
        """Release connections."""
        for fetch in self._fetches.values():
            fetch.cancel()
        await asyncio.gather(*self._fetches.values(), return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _decode_confluent(self, value: bytes) -> Mapping[str, Any]:
        if self._registry is None:
            raise _malformed(
                "the body is in Confluent's wire format, and this broker knows no schema registry: set "
                "BROKER_SCHEMA_REGISTRY_URL, or send single-object encoding"
            )
        if len(value) < _CONFLUENT_HEADER_BYTES:
            raise _malformed("the body ends before the id of its schema does")
        schema_id = int.from_bytes(value[1:_CONFLUENT_HEADER_BYTES], "big")
        schema = self._schemas.get(schema_id)
        if schema is None:
            schema = await self._schema(schema_id)
        body = io.BytesIO(value)
        body.seek(_CONFLUENT_HEADER_BYTES)
        try:
            record = fastavro.schemaless_reader(body, schema, None)
        except (EOFError, LookupError, ValueError, TypeError, OverflowError, MemoryError) as error:
            raise _malformed(f"the body does not fit its schema {schema_id}: {error!r}") from error
        if not isinstance(record, dict):
            raise _malformed(f"schema {schema_id} is of no record: write with schemas/InferenceRequest.avsc")
        return record

    async def _schema(self, schema_id: int) -> Any:
        # All requests that wait for one schema share one fetch, which none of them can cancel for the others.
        fetch = self._fetches.get(schema_id)
        if fetch is None:
            fetch = asyncio.create_task(self._fetch(schema_id))
            self._fetches[schema_id] = fetch
            fetch.add_done_callback(lambda _: self._fetches.pop(schema_id, None))
        schema = await asyncio.shield(fetch)
        if len(self._schemas) >= _SCHEMAS_MAX:
            del self._schemas[next(iter(self._schemas))]
        self._schemas[schema_id] = schema
        return schema

    async def _fetch(self, schema_id: int) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_FETCH_WITHIN_S))
        try:
            async with self._session.get(f"{self._registry}/schemas/ids/{schema_id}") as response:
                status = response.status
                content = bytearray()
                async for chunk in response.content.iter_chunked(65_536):
                    content += chunk
                    if len(content) > _SCHEMA_BYTES_MAX:
                        raise _malformed(f"schema {schema_id} has more than {_SCHEMA_BYTES_MAX} bytes")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise StoreUnavailable(f"the schema registry at {self._registry} does not answer: {error!r}") from error
        if status == 404:
            raise _malformed(f"the body names schema {schema_id}, which the schema registry does not have")
        if status != 200:
            raise StoreUnavailable(f"the schema registry at {self._registry} answers {status} for schema {schema_id}")
        return parse_writer_schema(schema_id, bytes(content))


def parse_writer_schema(schema_id: int, content: bytes) -> Any:
    """The schema in a registry's answer, ready to read with.

    Raises:
        Undecodable: it is no Avro schema that stands alone, or one that could make a small body explode.
    """
    try:
        answer = orjson.loads(content)
        kind = answer.get("schemaType", "AVRO")
        if kind != "AVRO" or answer.get("references"):
            raise _malformed(f"schema {schema_id} is {kind} or refers to others: register an Avro schema that does not")
        schema = fastavro.parse_schema(_plain(orjson.loads(answer["schema"])))
        _check(schema, {}, frozenset())
    except (fastavro.schema.SchemaParseException, fastavro.schema.UnknownType, RecursionError) as error:
        raise _malformed(f"schema {schema_id} is no usable Avro schema: {error!r}") from error
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _malformed(f"what the registry says of schema {schema_id} cannot be read: {error!r}") from error
    return schema


def _plain(schema: Any) -> Any:
    """The schema without logical types: a request's values are JSON's, as the writer stored them."""
    if isinstance(schema, dict):
        return {name: _plain(member) for name, member in schema.items() if name != "logicalType"}
    return [_plain(each) for each in schema] if isinstance(schema, list) else schema


def _check(schema: Any, widths: dict[str, bool], enclosing: frozenset[str]) -> bool:
    """Whether every value of the schema takes at least a byte; ValueError where bodies could explode."""
    if isinstance(schema, list):
        for branch in schema:
            _check(branch, widths, enclosing)
        return True
    if isinstance(schema, str):
        if schema in enclosing:
            raise ValueError(f"{schema} contains itself")
        return widths.get(schema, schema != "null")
    kind = schema["type"]
    if kind in ("record", "error"):
        name = schema["name"]
        inside = enclosing | {name}
        wide = [_check(field["type"], widths, inside) for field in schema["fields"]]
        widths[name] = any(wide)
        return widths[name]
    if kind in ("enum", "fixed"):
        widths[schema["name"]] = kind == "enum" or schema["size"] > 0
        return widths[schema["name"]]
    if kind in ("array", "map"):
        takes_bytes = _check(schema["items" if kind == "array" else "values"], widths, enclosing)
        if kind == "array" and not takes_bytes:
            raise ValueError("it has an array of values that take no bytes")
        return True
    return _check(kind, widths, enclosing)


def _malformed(message: str) -> Undecodable:
    return Undecodable(Problem(Code.REQUEST_MALFORMED, message))
