"""Model backends: rows of inputs in, answers out; and the runner that a pool worker hosts."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from app.domain.dispatch import Answer, Row
from app.domain.features import Value
from app.domain.version_documents import ModelVersionSpec


class ModelBackend(Protocol):
    """An inline backend: it answers while the caller waits."""

    async def infer(self, version: ModelVersionSpec, rows: Sequence[Row]) -> Sequence[Answer]:
        """One call for all of ``rows``, which are of one version; an answer for each, in order.

        Every failure is an Answer with a problem; nothing is raised. It returns by the earliest row's deadline, and
        calls nothing when that has passed.
        """
        ...

    def refusal(self, version: ModelVersionSpec) -> Answer | None:
        """What to take for the version's answer where calling it would most likely fail; None where it would not.

        Whoever has something better than a failure looks here first; ``infer`` calls all the same.
        """
        ...

    async def close(self) -> None:
        """Release connections."""
        ...


class RowBackend(ModelBackend, Protocol):
    """An inline backend whose calls rows may share (``adapters.row_sharing``)."""

    def request_of(self, version: ModelVersionSpec, row: Row) -> bytes:
        """What would be sent for ``row`` alone; empty where it cannot be sent."""
        ...

    async def infer_once(self, version: ModelVersionSpec, row: Row) -> Answer:
        """As ``infer`` for one row, in one attempt, whatever the policy's ``retries`` says."""
        ...


class ModelRunner(Protocol):
    """Models that run inside a pool worker's own process, named on its command line as ``module:factory``.

    The factory takes no arguments and returns a runner; it runs once, at start. ``predict`` runs in a thread, one call
    at a time.
    """

    def predict(self, model: str, version: str, columns: Mapping[str, Sequence[Value]]) -> Mapping[str, Sequence[Any]]:
        """Outputs by name, one element a row, for inputs by name, one element a row.

        Raises:
            LookupError: the model or version is not here.
            ValueError: the inputs cannot be used; the message says why.
        """
        ...
