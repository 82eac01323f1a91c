"""Model versions and rows for tests of backends, and a clock that can be moved."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.domain.dispatch import Row
from app.domain.features import Value, inferred_type
from app.domain.requests import RequestId
from app.domain.version_documents import ModelVersionSpec

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@dataclass(slots=True)
class MovableClock:
    """The machine's clocks, ahead by ``offset_ms``."""

    offset_ms: int = 0

    def now_ms(self) -> int:
        """Epoch milliseconds."""
        return time.time_ns() // 1_000_000 + self.offset_ms

    def steady_ms(self) -> float:
        """Milliseconds from an arbitrary point."""
        return time.perf_counter() * 1000 + self.offset_ms


def version_of(*endpoints: str, outputs: tuple[Mapping[str, Any], ...] = (), **changes: Any) -> ModelVersionSpec:
    """Version 3 of model ``m``, whose output is ``y``; ``policy`` and members of ``backend`` may be changed."""
    backend = {"type": "http", "endpoints": endpoints or ("http://127.0.0.1:1",), **changes.pop("backend", {})}
    return ModelVersionSpec.model_validate(
        {
            "model": "m",
            "version": "3",
            "digest": "sha256:" + "0" * 64,
            "backend": backend,
            "features": (),
            "governance": {"approvedBy": "model-risk"},
            "outputs": outputs or ({"name": "y", "datatype": "FP64"},),
            **changes,
        }
    )


def row_of(
    values: Mapping[str, Value] | None = None,
    *,
    now_ms: int | None = None,
    within_ms: int = 10_000,
    types: Mapping[str, str] | None = None,
    request_id: str = "r-1",
    task: str = "t",
) -> Row:
    """A row with a deadline ``within_ms`` from now."""
    values = {"x": 21} if values is None else values
    return Row(
        RequestId(request_id),
        task,
        values,
        types or {name: inferred_type(value) for name, value in values.items()},
        (time.time_ns() // 1_000_000 if now_ms is None else now_ms) + within_ms,
        TRACEPARENT,
    )
