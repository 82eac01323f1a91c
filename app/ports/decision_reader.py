"""Decisions that were made, by request id."""

from typing import Any, Protocol


class DecisionReader(Protocol):
    """Where recorded decisions are found."""

    async def find(self, request_id: str) -> dict[str, Any] | None:
        """The AuditRecord of the request's decision (``schemas/AuditRecord.avsc``), or None where none is written yet.

        Raises:
            StoreUnavailable: the stores do not answer; whether there is a decision is unknown.
            EvidenceDamaged: there is a decision, and its record is not what was written.
        """
        ...
