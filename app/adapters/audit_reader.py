"""Reading the audit: a decision by its request id, its bytes proven by their SHA-256; and the proof of many at once."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from app.adapters.avro import AvroCodec
from app.domain.audit import DECISION, Pointer, cut
from app.domain.errors import EvidenceDamaged
from app.ports.record_sink import ObjectStore, PointerTable

OBJECTS_READ_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What ``verify`` found: objects read, pointers proven, ids without a decision, and one line a fault."""

    objects: int
    items: int
    missing: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is missing and everything is as it was written."""
        return not self.missing and not self.faults


class AuditReader:
    """``ports.decision_reader.DecisionReader`` over the audit's stores."""

    def __init__(self, objects: ObjectStore, pointers: PointerTable) -> None:
        self._objects = objects
        self._pointers = pointers
        self._codec = AvroCodec("AuditRecord")

    async def find(self, request_id: str) -> dict[str, Any] | None:
        """See DecisionReader.

        Raises:
            StoreUnavailable: the stores do not answer.
            EvidenceDamaged: there is a decision, and its record is not what was written.
        """
        pointer = (await self._pointers.decisions((request_id,))).get(request_id)
        return None if pointer is None else await self.read(pointer)

    async def pointers(self, request_id: str) -> Sequence[Pointer]:
        """All that is recorded of a request id: its decision first, then refusals and conflicts."""
        return await self._pointers.get(request_id)

    async def read(self, pointer: Pointer) -> dict[str, Any]:
        """The AuditRecord that a pointer leads to. Raises as ``find``."""
        try:
            stored = await self._objects.read(pointer.object_key, pointer.object_version, pointer.start, pointer.length)
            return self._codec.decode(cut(stored, pointer.sha256))
        except (LookupError, ValueError) as error:
            raise EvidenceDamaged(_fault(pointer, error)) from error

    async def ping(self) -> None:
        """Raises StoreUnavailable unless both stores answer."""
        await asyncio.gather(self._objects.ping(), self._pointers.ping())

    async def verify(self, request_ids: Iterable[str] | None = None) -> AuditReport:
        """Prove the decisions of ``request_ids``, or every pointer there is; each object is read once.

        ``objects`` counts the objects that the pointers lead to. Raises StoreUnavailable.
        """
        missing: tuple[str, ...] = ()
        if request_ids is None:
            pointers = [pointer async for pointer in self._pointers.all()]
        else:
            wanted = list(dict.fromkeys(request_ids))
            found = await self._pointers.decisions(wanted)
            pointers = list(found.values())
            missing = tuple(name for name in wanted if name not in found)
        by_object: defaultdict[tuple[str, str | None], list[Pointer]] = defaultdict(list)
        for pointer in pointers:
            by_object[pointer.object_key, pointer.object_version].append(pointer)
        slots = asyncio.Semaphore(OBJECTS_READ_AT_ONCE)

        async def prove(key: str, version: str | None, into: Sequence[Pointer]) -> list[str]:
            async with slots:
                try:
                    body = await self._objects.read(key, version)
                except LookupError as error:
                    return [_fault(pointer, error) for pointer in into]
            return [fault for pointer in into if (fault := self._prove(body, pointer)) is not None]

        proofs = (prove(key, version, into) for (key, version), into in by_object.items())
        faults = [fault for found_faults in await asyncio.gather(*proofs) for fault in found_faults]
        return AuditReport(len(by_object), len(pointers), missing, tuple(sorted(faults)))

    def _prove(self, body: bytes, pointer: Pointer) -> str | None:
        try:
            record = self._codec.decode(cut(body[pointer.start : pointer.start + pointer.length], pointer.sha256))
            said = (record["request_id"], record["execution_id"], record["kind"])
            if said != (pointer.request_id, pointer.execution_id, pointer.kind):
                raise ValueError(f"the record tells of request, execution and kind {said}")
        except ValueError as error:
            return _fault(pointer, error)
        return None


def _fault(pointer: Pointer, error: Exception) -> str:
    place = f"{pointer.bucket}/{pointer.object_key} bytes {pointer.start}+{pointer.length}"
    name = pointer.request_id if pointer.sort_key == DECISION else f"{pointer.request_id} {pointer.sort_key}"
    return f"{name}: {place}: {error}"
