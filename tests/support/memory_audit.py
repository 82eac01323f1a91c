"""The audit's stores in memory: the same promises as S3's and DynamoDB's adapters, and faults on demand."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from app.domain.audit import DECISION, Pointer
from app.domain.errors import StoreUnavailable
from app.ports.log import OutboundRecord
from app.ports.record_sink import StoredObject

Fault = Callable[[str, str], None]
"""Called with ``before`` or ``after`` and the operation's name; what it raises, the operation raises."""


def no_fault(_when: str, _operation: str) -> None:
    """The default: nothing goes wrong."""


class MemoryObjectStore:
    """``ports.record_sink.ObjectStore``, with versions."""

    def __init__(self, bucket: str = "bucket") -> None:
        self._bucket = bucket
        self.stored: dict[str, tuple[bytes, StoredObject]] = {}
        self.fault: Fault = no_fault

    @property
    def bucket(self) -> str:
        """See ObjectStore."""
        return self._bucket

    async def put_if_absent(self, key: str, body: bytes, metadata: Mapping[str, str]) -> StoredObject | None:
        """See ObjectStore."""
        self.fault("before", "put_object")
        if key in self.stored:
            return None
        made = StoredObject(f"v{len(self.stored)}", dict(metadata))
        self.stored[key] = (body, made)
        self.fault("after", "put_object")
        return made

    async def head(self, key: str) -> StoredObject | None:
        """See ObjectStore."""
        self.fault("before", "head")
        return self.stored[key][1] if key in self.stored else None

    async def read(self, key: str, version: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        """See ObjectStore."""
        self.fault("before", "read")
        body, made = self.stored[key]
        if version not in (None, made.version):
            raise LookupError(f"{key} has no version {version}")
        end = len(body) if length is None else start + length
        if end > len(body):
            raise LookupError(f"{key} ends before byte {end}")
        return body[start:end]

    async def keys(self, prefix: str) -> Sequence[str]:
        """See ObjectStore."""
        self.fault("before", "keys")
        return sorted(key for key in self.stored if key.startswith(prefix))

    async def ping(self) -> None:
        """See ObjectStore."""
        self.fault("before", "ping")


class MemoryPointerTable:
    """``ports.record_sink.PointerTable``; a fault after an item leaves those before it written."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, str], Pointer] = {}
        self.fault: Fault = no_fault

    async def put_if_absent(self, pointers: Sequence[Pointer]) -> Sequence[Pointer | None]:
        """See PointerTable."""
        answers: list[Pointer | None] = []
        for pointer in pointers:
            self.fault("before", "put_item")
            key = pointer.request_id, pointer.sort_key
            answers.append(self.items.get(key))
            self.items.setdefault(key, pointer)
        self.fault("after", "put_items")
        return answers

    async def get(self, request_id: str) -> Sequence[Pointer]:
        """See PointerTable."""
        self.fault("before", "get")
        found = [pointer for pointer in self.items.values() if pointer.request_id == request_id]
        return sorted(found, key=lambda pointer: (pointer.sort_key != DECISION, pointer.sort_key))

    async def decisions(self, request_ids: Sequence[str]) -> Mapping[str, Pointer]:
        """See PointerTable."""
        self.fault("before", "decisions")
        keys = ((request_id, DECISION) for request_id in request_ids)
        return {key[0]: self.items[key] for key in keys if key in self.items}

    async def all(self) -> AsyncIterator[Pointer]:
        """See PointerTable."""
        self.fault("before", "all")
        for pointer in list(self.items.values()):
            yield pointer

    async def ping(self) -> None:
        """See PointerTable."""
        self.fault("before", "ping")


class MemoryPublisher:
    """``ports.log.Publisher``: keeps what it is given."""

    def __init__(self) -> None:
        self.published: list[OutboundRecord] = []

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """See Publisher."""
        self.published.extend(records)
        return range(len(self.published) - len(records), len(self.published))


class Crash(BaseException):
    """The process is gone: nothing of ours may handle it."""


def fails_at(turn: int, error: BaseException) -> Fault:
    """A fault that raises ``error`` once, at the ``turn``-th point (0 is the first)."""
    turns = iter(range(turn + 1))

    def fault(when: str, operation: str) -> None:
        if next(turns, None) == turn:
            raise error

    return fault


def away_for(turns: int) -> Fault:
    """A store that does not answer the first ``turns`` times."""
    left = iter(range(turns))

    def fault(when: str, operation: str) -> None:
        if when == "before" and next(left, None) is not None:
            raise StoreUnavailable(f"{operation} does not answer")

    return fault
