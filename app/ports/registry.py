"""The registry as a worker sees it: the revision to decide by now, and those that pending joins began under."""

from typing import Protocol

from app.domain.registry import Revision


class Registry(Protocol):
    """Revisions, followed as they are published."""

    @property
    def current(self) -> Revision | None:
        """The last good revision that was published; None: none was yet."""
        ...

    @property
    def blank(self) -> bool:
        """Whether nothing was ever published, sound or not."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether a revision is loaded and the next one would be noticed."""
        ...

    def get(self, revision_id: str) -> Revision | None:
        """A revision published recently, or None where it is too long ago or never was."""
        ...
