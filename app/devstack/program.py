"""A program on the stack: a process of the broker, or of an example, that says over HTTP when it is ready.

It starts after the services, on a port of its own, and stops before them. A stack that was found again by its record
knows a program by name, port and process only: it can say how it does and stop it, not start it.
"""

import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.devstack.process import HOST, Service, StackError, accepts_connections

READY_PATH = "/readyz"


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """What to run: ``command`` of the HTTP port, with ``variables`` over the stack's; ``ready_path`` answers 200."""

    name: str
    command: Callable[[int], Sequence[str]]
    variables: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = READY_PATH


class Program(Service):
    """One program; without ``spec`` one that runs already."""

    port_names = ("http",)

    def __init__(
        self, directory: Path, *, name: str, ready_path: str, spec: ProgramSpec | None = None, **handle: Any
    ) -> None:
        super().__init__(directory, **handle)
        self.name = name
        self.ready_path = ready_path
        self._spec = spec

    def prepare(self) -> None:
        """Nothing: the command line says it all."""

    def command(self) -> Sequence[str]:
        """See Service."""
        if self._spec is None:
            raise StackError(f"{self.name} was started by another process, which alone knows how to start it again")
        return self._spec.command(self.ports["http"])

    def process_env(self) -> dict[str, str]:
        """See Service."""
        return dict(self._spec.variables) if self._spec is not None else {}

    def serves(self) -> bool:
        """See Service."""
        address = f"{HOST}:{self.ports['http']}"
        if not accepts_connections(address):
            return False
        try:
            with urllib.request.urlopen(f"http://{address}{self.ready_path}", timeout=2):
                return True
        except OSError:  # 503 among them: it runs and is not ready
            return False

    @property
    def env(self) -> dict[str, str]:
        """Nothing: nobody finds a program by the environment."""
        return {}

    @property
    def address(self) -> str:
        """See Service."""
        return f"http://{HOST}:{self.ports['http']}"
