"""An AWS endpoint by moto, in a Python process of its own (see ``moto_server``)."""

import importlib.util
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import ClassVar

from app.devstack.process import HOST, Service, StackError, accepts_connections


def answers_http(address: str) -> bool:
    """Whether an HTTP server answers on HOST:PORT, be it with an error; answers within two seconds."""
    if not accepts_connections(address):
        return False
    try:
        with urllib.request.urlopen(f"http://{address}/", timeout=1.5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


class MotoService(Service):
    """One moto server."""

    endpoint_variable: ClassVar[str]

    def prepare(self) -> None:
        """Check that moto is installed: its process would only say it in a log."""
        if importlib.util.find_spec("moto") is None:
            raise StackError(
                f"The embedded {self.name} is moto's server, which is not installed: pip install 'model-broker[demo]'"
            )

    def command(self) -> Sequence[str]:
        """See Service."""
        journal = str((self.data / "journal").resolve())
        module = "app.devstack.moto_server"
        return [sys.executable, "-m", module, "--port", str(self.ports["port"]), "--journal", journal]

    def serves(self) -> bool:
        """See Service."""
        return answers_http(f"{HOST}:{self.ports['port']}")

    @property
    def env(self) -> dict[str, str]:
        """See Service."""
        return {self.endpoint_variable: f"http://{HOST}:{self.ports['port']}"}
