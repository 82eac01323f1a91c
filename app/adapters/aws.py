"""What the adapters of AWS services share: bounded clients, and the one place where botocore's errors end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from aiobotocore.config import AioConfig
from botocore.exceptions import BotoCoreError, ClientError

from app.domain.errors import StoreUnavailable

CONNECTIONS_MAX: Final = 64
CONNECT_TIMEOUT_S: Final = 2.0
READ_TIMEOUT_S: Final = 10.0
OPERATION_TIMEOUT_S: Final = 30.0
"""Everything about one call, botocore's own retries and the wait for a connection included."""


def client_config(service: str) -> AioConfig:
    """Bounded waits and few retries: the callers know better than botocore how long to go on."""
    style = {"addressing_style": "path"} if service == "s3" else None
    return AioConfig(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=CONNECTIONS_MAX,
        retries={"mode": "standard", "total_max_attempts": 2},
        s3=style,
    )


def error_code(error: ClientError) -> str:
    """The service's own code, as ``PreconditionFailed``; a HEAD, which has no body, gives the HTTP status."""
    return str(error.response.get("Error", {}).get("Code", ""))


def http_status(error: ClientError) -> int:
    """The HTTP status that the service answered with."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@asynccontextmanager
async def translated(where: str) -> AsyncIterator[None]:
    """Bound a call, and turn what it raises into StoreUnavailable, with ``where`` in the message."""
    try:
        async with asyncio.timeout(OPERATION_TIMEOUT_S):
            yield
    except TimeoutError as error:
        raise StoreUnavailable(f"{where} did not answer within {OPERATION_TIMEOUT_S:.0f} s") from error
    except ClientError as error:
        said: Any = error.response.get("Error", {}).get("Message") or error
        raise StoreUnavailable(f"{where} refused: {error_code(error)}: {said}") from error
    except (BotoCoreError, OSError) as error:
        raise StoreUnavailable(f"{where} does not answer: {error}") from error
