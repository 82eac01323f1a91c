"""How a command ends that could not do what it was asked: one line on standard error, and an exit code that tells why.

1: it was done, and the answer is no, or something that it needs failed meanwhile. 2: it could not be asked this way:
options, settings, topics or a dependency are wrong.
"""

import orjson
import typer

from app.domain.errors import BrokerError, ConfigurationError


def failed(error: BrokerError, *, as_json: bool = False) -> typer.Exit:
    """The exit of a command that ``error`` ends, once its line is written; ``as_json``: and its document."""
    if as_json:
        typer.echo(orjson.dumps({"error": str(error)}))
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(exit_code(error))


def exit_code(error: BrokerError) -> int:
    """2 where the configuration is wrong, else 1.

    >>> exit_code(ConfigurationError("no topic")), exit_code(BrokerError("no answer"))
    (2, 1)
    """
    return 2 if isinstance(error, ConfigurationError) else 1
