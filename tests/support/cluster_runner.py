"""The models of a test cluster's pool workers: the arithmetic of ``cluster_documents``, behind a gate.

``TEST_POOL_CALLS`` names a file that gets a line for each row that was run; while the file ``TEST_POOL_GATE`` exists,
calls wait.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from app.domain.features import Value
from app.ports.model_backend import ModelRunner

GATE_WITHIN_S: Final = 50.0


class Arithmetic:
    """``y = 2 * x + score``."""

    def __init__(self, calls: Path, gate: Path) -> None:
        self._calls = calls
        self._gate = gate

    def predict(self, model: str, version: str, columns: Mapping[str, Sequence[Value]]) -> Mapping[str, Sequence[Any]]:
        """Answers by row; LookupError for another model."""
        if model not in ("pooled", "hasty"):
            raise LookupError(f"{model} {version} is not here")
        rows = [(_number(x), _number(score)) for x, score in zip(columns["x"], columns["score"], strict=True)]
        with self._calls.open("a") as calls:
            calls.write("".join(f"{x!r}\n" for x, _ in rows))
        end = time.monotonic() + GATE_WITHIN_S
        while self._gate.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return {"y": [2 * x + score for x, score in rows]}


def _number(value: Value) -> float:
    if not isinstance(value, float):
        raise ValueError(f"{value!r} is not a DOUBLE")
    return value


def load() -> ModelRunner:
    """The runner, as a pool worker's command line names it."""
    return Arithmetic(Path(os.environ["TEST_POOL_CALLS"]), Path(os.environ["TEST_POOL_GATE"]))
