"""What the shapes of all registry documents share: names and types, and what is refused by name or told in words.

Shapes only: each field's type and bounds. What documents say of one another (references, weights, paths) is checked in
``registry``. Unknown fields are errors; those in ``NOT_SUPPORTED_YET`` are refused by that name, so that nobody
believes in a safeguard that is not there.
"""

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

from app.durations import WrittenDurationMs, within

API_VERSION: Final = "modelbroker.dev/v1alpha1"

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
"""A document's name: a DNS subdomain, as Kubernetes requires."""
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
"""A name that expressions use: tasks, features, outputs, entities."""
VersionLabel = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]

ValueType = Literal[
    "BYTES", "STRING", "INT32", "INT64", "DOUBLE", "FLOAT", "BOOL", "UNIX_TIMESTAMP",
    "BYTES_LIST", "STRING_LIST", "INT32_LIST", "INT64_LIST", "DOUBLE_LIST", "FLOAT_LIST", "BOOL_LIST",
    "UNIX_TIMESTAMP_LIST",
]  # fmt: skip
"""Feast's scalar value types, and lists of them."""
Datatype = Literal["BOOL", "INT8", "INT16", "INT32", "INT64", "FP32", "FP64", "BYTES"]
"""Open Inference Protocol v2's tensor datatypes that a feature can be sent as."""

CallDurationMs = Annotated[WrittenDurationMs, within("1ms", "1h")]
"""How long callers and models are waited for."""

CelText = Annotated[str, StringConstraints(min_length=1, max_length=4_096)]
Scalar = str | int | float | bool | None

NOT_SUPPORTED_YET: Final[Mapping[str, str]] = {
    "hedgeAfter": "a second call when the first is slow",
}
"""Fields of the design whose behaviour does not exist yet, and what they would do."""

VALUES_NOT_SUPPORTED_YET: Final = frozenset({"csv", "json", "kubernetes", "sagemaker"})
"""Values of ``backend.type`` and ``backend.protocol`` of which the same is true."""

IN_WORDS: Final[Mapping[str, str]] = {
    r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$": "lower-case letters, digits, - and ., the first and last no sign",
    r"^[A-Za-z_][A-Za-z0-9_]{0,127}$": "letters, digits and _, the first no digit, 128 at most",
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$": "letters, digits, ., _ and -, the first no sign, 63 at most",
    r"^[^\s:]{1,256}$": "the view's name at the server, without spaces and colons",
    r"^[A-Za-z_][A-Za-z0-9_.-]{0,127}$": "an entry point's name: letters, digits, _, . and -, the first no digit",
    r"^https?://[^\s/?#]+(/[^\s?#]*)?$": "http://HOST:PORT or https://HOST:PORT, with a path if need be",
    r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$": "lower-case letters, digits and -, the first and last no -, 63 at most",
    r"^[A-Za-z_][A-Za-z0-9_-]*\.[A-Za-z_][A-Za-z0-9_]*$": "VIEW.FEATURE, or inputs.NAME, entities.NAME, metadata.NAME",
    r"^\d{4}-\d{2}-\d{2}$": "a day as YYYY-MM-DD",
    r"^sha256:[0-9a-f]{64}$": "sha256: and 64 hexadecimal digits in lower case",
    r"^[A-Za-z0-9_]{1,128}$": "1 to 128 letters, digits and _",
    r"^((entities|inputs|metadata)\.)?[A-Za-z_][A-Za-z0-9_]*$": "an entity's name, or inputs.NAME or metadata.NAME",
    r"^[1-9][0-9]{0,5}(s|m|h|d)$": "a whole number and a unit, as 90s, 15m, 24h or 30d",
    r"^[A-Z][A-Z0-9_]{0,63}$": "upper-case letters, digits and _, the first a letter, 64 at most",
    r"^/[^\s?#]{0,255}$": "/ and up to 255 characters, none of them a space, ? or #",
}
"""What to write where a pattern is not met: for people, who need not read it."""


class DocumentPart(BaseModel):
    """Anything in a document: its fields are those that are named, of just the types that are said, and fixed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Metadata(DocumentPart):
    """A document's name; the names of a kind are unique."""

    name: Name
