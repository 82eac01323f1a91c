"""An in-memory ModelBackend: a function instead of a server, under the same promises."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from app.domain.dispatch import Answer, Attempt, Row
from app.domain.errors import Code, Problem
from app.domain.version_documents import ModelVersionSpec
from app.ports.clock import Clock

Model = Callable[[Sequence[Row]], Awaitable[Sequence[Mapping[str, Any]]]]


class InMemoryBackend:
    """Answers with ``model``'s outputs; what it raises is a failure: OSError the connection's, ValueError its own.

    A ValueError's text that is an attempt's outcome (``http 503``) is one; any other stands for a refusal of the rows.
    """

    def __init__(self, clock: Clock, model: Model) -> None:
        self._clock = clock
        self._model = model
        self._slots: dict[tuple[str, str], asyncio.Semaphore] = {}
        self._closed = False

    async def infer(self, version: ModelVersionSpec, rows: Sequence[Row]) -> Sequence[Answer]:
        """See ``ModelBackend.infer``."""
        if not rows:
            return ()
        if self._closed:
            return _all(rows, Code.MODEL_UNAVAILABLE, "closed")
        remaining_ms = min(row.deadline_ms for row in rows) - self._clock.now_ms()
        if remaining_ms <= 0:
            return _all(rows, Code.DEADLINE_EXCEEDED, "the deadline had passed")
        slots = self._slots.setdefault((version.model, version.version), asyncio.Semaphore(version.policy.concurrency))
        waited = True
        try:
            async with asyncio.timeout(min(remaining_ms, version.policy.timeout) / 1000), slots:
                waited = False
                outputs = await self._model(rows)
        except TimeoutError:
            late = waited or remaining_ms < version.policy.timeout
            return _all(rows, Code.DEADLINE_EXCEEDED if late else Code.MODEL_TIMEOUT, "too late")
        except OSError as error:
            return _all(rows, Code.MODEL_UNAVAILABLE, str(error))
        except ValueError as error:
            return self._failed(rows, Code.MODEL_ERROR, str(error))
        if len(outputs) != len(rows):
            said = f"{len(outputs)} answers for {len(rows)} rows"
            return self._failed(rows, Code.MODEL_OUTPUT_INVALID, said)
        attempt = Attempt("memory", self._clock.now_ms(), 0.0, "ok", len(rows))
        return tuple(
            Answer(output, None, (attempt,), self.request_of(version, row))
            for output, row in zip(outputs, rows, strict=True)
        )

    def _failed(self, rows: Sequence[Row], code: Code, message: str) -> Sequence[Answer]:
        outcome = message if message.startswith("http ") else "http 422"
        attempt = Attempt("memory", self._clock.now_ms(), 0.0, outcome, len(rows))
        return (Answer(None, Problem(code, message), (attempt,), b"memory"),) * len(rows)

    async def infer_once(self, version: ModelVersionSpec, row: Row) -> Answer:
        """See ``RowBackend.infer_once``; nothing is ever retried here."""
        (answer,) = await self.infer(version, (row,))
        return answer

    def request_of(self, version: ModelVersionSpec, row: Row) -> bytes:
        """See ``RowBackend.request_of``."""
        return f"{version.model} {row.request_id} {dict(row.values)}".encode()

    def refusal(self, version: ModelVersionSpec) -> Answer | None:
        """See ``ModelBackend``."""
        return None

    async def close(self) -> None:
        """Answer nothing from now on."""
        self._closed = True


def _all(rows: Sequence[Row], code: Code, message: str) -> Sequence[Answer]:
    return (Answer(None, Problem(code, message), (), b""),) * len(rows)
