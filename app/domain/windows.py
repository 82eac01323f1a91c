"""Windows: what the rollouts workers keep of the audit's log, and how an entry of it is written.

An entry holds an account and the log offset up to which it counts, so that a record that is delivered again counts
once. There are three kinds of keys:

- ``step|ROLLOUT|OF|SINCE``: a rollout's step, in each partition its own; the account is a ``StepStats``.
- ``shadow|ROUTE|TASK|VERSION|START``: a shadow's comparison, of ``WINDOW_MS`` from ``START``; a ``Comparison``.
- ``intent|ID`` and ``told|ID``, in partition 0: a rollout's step that is about to be published with the record that is
  to tell of it; and that the record lies in the log.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
import zstandard

from app.domain.comparison_stats import Comparison, merged
from app.domain.rollout_stats import StepStats

WINDOW_MS: Final = 600_000
WINDOWS_KEPT: Final = 6
"""The gauges tell of about the last hour."""
_REVISION: Final = re.compile(r"sha256:[0-9a-f]{64}")
_ENTRY_BYTES_MAX: Final = 32 * 1024 * 1024
_COMPRESS: Final = zstandard.ZstdCompressor(level=1)
_DECOMPRESS: Final = zstandard.ZstdDecompressor()


@dataclass(frozen=True, slots=True, order=True)
class ShadowName:
    """Whose comparison: a shadow version of a route's task."""

    route: str
    task: str
    version: str


def step_key(step_id: str) -> str:
    """The key of a step's entries."""
    return f"step|{step_id}"


def shadow_key(name: ShadowName, start_ms: int) -> str:
    """The key of a comparison's entries."""
    return f"shadow|{name.route}|{name.task}|{name.version}|{start_ms}"


def read_shadow_key(key: str) -> tuple[ShadowName, int] | None:
    """Whose comparison, from when on; None for another kind of key.

    >>> read_shadow_key(shadow_key(ShadowName("credit", "pd", "4"), 600000))
    (ShadowName(route='credit', task='pd', version='4'), 600000)
    """
    kind, *parts = key.split("|")
    return (ShadowName(*parts[:3]), int(parts[3])) if kind == "shadow" and len(parts) == 4 else None


def window_start(timestamp_ms: int) -> int:
    """The window that a moment lies in."""
    return timestamp_ms - timestamp_ms % WINDOW_MS


def oldest_kept(now_ms: int) -> int:
    """The start of the oldest window that still is told of."""
    return window_start(now_ms) - (WINDOWS_KEPT - 1) * WINDOW_MS


def write_entry(offset: int, account: Mapping[str, Any]) -> bytes:
    """An entry: the offset up to which it counts, and an account's JSON."""
    return _COMPRESS.compress(orjson.dumps({"offset": offset, "account": account}))


def read_entry(entry: bytes) -> tuple[int, Any]:
    """Offset and account of an entry; ValueError where it is damaged."""
    try:
        content = orjson.loads(_DECOMPRESS.decompress(entry, max_output_size=_ENTRY_BYTES_MAX))
        return content["offset"], content["account"]
    except (zstandard.ZstdError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"damaged windows entry: {error!r}") from error


def write_intent(revision: str, record: bytes) -> bytes:
    """An intent's entry: which revision, and the record that tells of it."""
    return revision.encode() + b"\n" + record


def read_intent(entry: bytes) -> tuple[str, bytes]:
    """Revision and record of an intent."""
    revision, _, record = entry.partition(b"\n")
    return revision.decode(), record


def check_window(key: str, entry: bytes) -> None:
    """That these are a key and an entry of the table; ValueError where they are not."""
    kind, _, identity = key.partition("|")
    try:
        if kind == "step":
            StepStats.from_json(_counted(entry))
        elif read_shadow_key(key) is not None:
            Comparison.from_json(_counted(entry))
        elif kind == "intent" and identity:
            if not _REVISION.fullmatch(read_intent(entry)[0]):
                raise ValueError("it names no revision")
        elif kind == "told" and identity:
            int(entry)
        else:
            raise ValueError("no key of this table")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged windows entry: {error!r}") from error


def _counted(entry: bytes) -> Any:
    offset, account = read_entry(entry)
    if not isinstance(offset, int):
        raise ValueError("its offset is no number")
    return account


def step_stats(partitions: Iterable[Mapping[str, bytes]], step_id: str) -> StepStats:
    """A step's statistics over all partitions."""
    whole = StepStats()
    for entries in partitions:
        entry = entries.get(step_key(step_id))
        if entry is not None:
            whole.merge(StepStats.from_json(read_entry(entry)[1]))
    return whole


def comparisons(partitions: Iterable[Mapping[str, bytes]], since_ms: int) -> dict[ShadowName, Comparison]:
    """Each shadow's comparison over all partitions, of windows that began at ``since_ms`` or later."""
    found: dict[ShadowName, list[Comparison]] = {}
    for entries in partitions:
        for key, entry in entries.items():
            named = read_shadow_key(key)
            if named is not None and named[1] >= since_ms:
                found.setdefault(named[0], []).append(Comparison.from_json(read_entry(entry)[1]))
    return {name: merged(parts) for name, parts in sorted(found.items())}
