"""Avro in single-object encoding: two magic bytes, the writer schema's CRC-64-AVRO fingerprint, the body.

The fingerprint says which schema wrote the bytes, so a reader never guesses. Source: Apache Avro specification,
"Single-object encoding".
"""

import io
from collections.abc import Sequence
from typing import Any, Final

import fastavro
import orjson

from app.resources import resource_dir

_MAGIC: Final = b"\xc3\x01"


def _read_schema(name: str) -> tuple[bytes, Any]:
    """The header of a schema's records, and the schema."""
    definition = orjson.loads((resource_dir("schemas") / f"{name}.avsc").read_bytes())
    canonical = fastavro.schema.to_parsing_canonical_form(definition)
    # The specification's fingerprint is little endian; fastavro prints it so, as hexadecimal text.
    header = _MAGIC + bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))
    return header, fastavro.parse_schema(definition)


class AvroCodec:
    """One record type of ``schemas/``: Python dicts to bytes and back.

    ``earlier`` are the names of schemas that producers may still write with; their records are a subset of today's.
    """

    def __init__(self, name: str, *, earlier: Sequence[str] = ()) -> None:
        self.name = name
        self._header, self._schema = _read_schema(name)
        self._readable = dict(_read_schema(each) for each in earlier) | {self._header: self._schema}

    def encode(self, record: dict[str, Any]) -> bytes:
        """``record`` in single-object encoding; ValueError or TypeError where it does not fit the schema."""
        out = io.BytesIO()
        out.write(self._header)
        fastavro.schemaless_writer(out, self._schema, record)
        return out.getvalue()

    def decode(self, data: bytes) -> dict[str, Any]:
        """The record in ``data``.

        Raises:
            ValueError: not single-object encoding, another schema's fingerprint, or a damaged body.
        """
        header = data[: len(self._header)]
        if header[:2] != _MAGIC:
            raise ValueError(f"not Avro in single-object encoding: it starts with {header[:2].hex() or 'nothing'}")
        schema = self._readable.get(header)
        if schema is None:
            raise ValueError(
                f"written with schema fingerprint {header[2:].hex()}, and {self.name} here has {self._header[2:].hex()}"
            )
        body = io.BytesIO(data)
        body.seek(len(self._header))
        try:
            record = fastavro.schemaless_reader(body, schema, None)
        except (EOFError, IndexError, ValueError, TypeError, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise ValueError(f"damaged {self.name}: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"damaged {self.name}: not a record")
        return record


def feature_updates() -> AvroCodec:
    """What everyone who reads ``features.updates`` decodes with: producers may still write as before tombstones."""
    return AvroCodec("FeatureUpdate", earlier=["FeatureUpdate-1"])
