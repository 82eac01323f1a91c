"""What a changelog holds: entries, and what somebody else put there, which is told of and passed by."""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import structlog

log = structlog.get_logger()

ReadEntry = Callable[[str, bytes], object]
"""Raises ValueError for a key and value that no worker of ours writes."""
EPOCH_HEADER: Final = "epoch"
"""Which of a partition's owners wrote an entry: of two of one key, that of the earlier owner never stands."""
_SHOWN_MAX: Final = 200


def entry_key(
    topic: str, partition: int, offset: int, key: bytes | None, value: bytes | None, read: ReadEntry
) -> str | None:
    """The key of a changelog's record; None, and a line in the log, where the record is not one of ours."""
    try:
        if key is None:
            raise ValueError("it has no key")
        text = key.decode()
        if value is not None:
            read(text, value)
    except ValueError as error:
        log.warning(
            "changelog_record_foreign",
            topic=topic,
            partition=partition,
            offset=offset,
            key=repr((key or b"")[:_SHOWN_MAX]),
            reason=str(error)[:_SHOWN_MAX],
            hint="only workers write there: take the right to from everybody else; an earlier entry of the key stands",
        )
        return None
    return text


def entry_epoch(headers: Mapping[str, bytes] | Iterable[tuple[str, bytes]] | None) -> int:
    """The epoch among a changelog record's headers; 0, the first, where there is none."""
    found = dict(headers or ()).get(EPOCH_HEADER) or b""
    return int(found) if found.isdigit() else 0
