"""A rollout's step on its way to the audit's log, as the rollouts worker and an operator's command send it."""

from typing import Final

from app.domain.decisions import Kind
from app.ports.log import OutboundRecord

JUDGING_PARTITION: Final = 0
"""Of the audit's topic: who owns it judges rollouts, and reads there which of their steps are told."""


def audit_record(topic: str, identity: str, request_id: str, encoded: bytes) -> OutboundRecord:
    """A rollout's step on its way to the audit, where the judging worker sees it."""
    headers = (
        ("request-id", request_id.encode()),
        ("execution-id", identity.encode()),
        ("kind", Kind.ROLLOUT.encode()),
        ("status", b"completed"),
    )
    return OutboundRecord(topic, encoded, request_id.encode(), JUDGING_PARTITION, headers)
