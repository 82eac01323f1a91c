"""Where the audit ends: objects that are written once, and one pointer a decision into them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What an object store says of an object: its version id where it keeps versions, and its metadata."""

    version: str | None
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Pointer:
    """One decision's place: the object that holds its record, and the record's byte range and SHA-256 in it."""

    request_id: str
    sort_key: str
    execution_id: str
    status: str
    record_sha256: str
    bucket: str
    object_key: str
    object_version: str | None
    offset: int
    length: int
    decided_ms: int
    attributes: Mapping[str, str]


class ObjectStore(Protocol):
    """Objects written once."""

    async def put_if_absent(self, key: str, body: bytes, metadata: Mapping[str, str]) -> StoredObject | None:
        """Write the object; None when the key exists already. Raises StoreUnavailable."""
        ...

    async def head(self, key: str) -> StoredObject | None:
        """The object's version and metadata, or None. Raises StoreUnavailable."""
        ...

    async def read(self, key: str, version: str | None, offset: int, length: int) -> bytes:
        """A range of an object's bytes. Raises StoreUnavailable, LookupError."""
        ...

    async def ping(self) -> None:
        """Raises StoreUnavailable unless the bucket answers."""
        ...


class PointerTable(Protocol):
    """One item a decision, written once."""

    async def put_if_absent(self, pointers: Sequence[Pointer]) -> Sequence[Pointer | None]:
        """Write each; for each, None, or the different pointer that stood there first. Raises StoreUnavailable."""
        ...

    async def get(self, request_id: str) -> Sequence[Pointer]:
        """All pointers of a request id, the decision first. Raises StoreUnavailable."""
        ...

    async def ping(self) -> None:
        """Raises StoreUnavailable unless the table answers."""
        ...
