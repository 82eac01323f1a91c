"""Where the audit ends: objects that are written once, and one pointer a record into them."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from app.domain.audit import Pointer


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What an object store says of an object: its version id where it keeps versions, and its metadata."""

    version: str | None
    metadata: Mapping[str, str]


class ObjectStore(Protocol):
    """Objects written once, in one bucket."""

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        ...

    async def put_if_absent(self, key: str, body: bytes, metadata: Mapping[str, str]) -> StoredObject | None:
        """Write the object; None when the key exists already. Raises StoreUnavailable: it may be written or not."""
        ...

    async def head(self, key: str) -> StoredObject | None:
        """The object's version and metadata, or None. Raises StoreUnavailable."""
        ...

    async def read(self, key: str, version: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        """An object's bytes from ``start``, ``length`` of them, or all.

        Raises:
            StoreUnavailable: no answer.
            LookupError: no such object, version or range.
        """
        ...

    async def keys(self, prefix: str) -> Sequence[str]:
        """The keys that begin with ``prefix``, sorted. Raises StoreUnavailable."""
        ...

    async def ping(self) -> None:
        """Raises StoreUnavailable unless the bucket answers."""
        ...


class PointerTable(Protocol):
    """One item a record, written once."""

    async def put_if_absent(self, pointers: Sequence[Pointer]) -> Sequence[Pointer | None]:
        """Write each whose request id and sort key are free; for each, None, or the pointer that stands there.

        Raises:
            StoreUnavailable: some may be written and some not; writing all again is safe.
        """
        ...

    async def get(self, request_id: str) -> Sequence[Pointer]:
        """All pointers of a request id, the decision first. Raises StoreUnavailable."""
        ...

    async def decisions(self, request_ids: Sequence[str]) -> Mapping[str, Pointer]:
        """The decisions' pointers of those request ids that have one. Raises StoreUnavailable."""
        ...

    def all(self) -> AsyncIterator[Pointer]:
        """Every pointer, in no order. Raises StoreUnavailable."""
        ...

    async def ping(self) -> None:
        """Raises StoreUnavailable unless the table answers."""
        ...
