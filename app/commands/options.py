"""Options that several processes share, and what each may be: a wrong one is a line at the start, and exit code 2."""

import re
from typing import Annotated, Final

import typer

_INSTANCE: Final = re.compile(r"[A-Za-z0-9._-]{1,200}")
_PORT_MAX: Final = 65_535


def _instance(value: str | None) -> str | None:
    # A client id, a group's member and a directory are named after it.
    if value is not None and not _INSTANCE.fullmatch(value):
        raise typer.BadParameter(f"{value[:80]!r}: write 1 to 200 letters, digits, dots, underscores and hyphens")
    return value


Instance = Annotated[
    str | None,
    typer.Option(
        "--instance",
        callback=_instance,
        help="Names this process: client id, static group membership; default: host name and role.",
    ),
]
MetricsPort = Annotated[
    int,
    typer.Option(
        "--http-port", min=0, max=_PORT_MAX, help="Port of /metrics, /livez and /readyz; 0 takes any and prints it."
    ),
]
ServicePort = Annotated[
    int,
    typer.Option("--http-port", min=0, max=_PORT_MAX, help="Port to listen on; 0 takes any and prints it."),
]
