"""What the adapters of AWS services share: bounded clients, and the one place where botocore's errors end."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, Literal

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import BotoCoreError, ClientError, PartialCredentialsError

from app.domain.errors import ConfigurationError, StoreUnavailable

CONNECTIONS_MAX: Final = 64
CONNECT_TIMEOUT_S: Final = 2.0
READ_TIMEOUT_S: Final = 10.0
OPERATION_TIMEOUT_S: Final = 30.0
"""Everything about one call, botocore's own retries and the wait for a connection included."""


_CREDENTIALS: Final = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


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


async def open_client(service: Literal["dynamodb", "s3"], resources: AsyncExitStack) -> Any:
    """A client of ``service`` that lives as long as ``resources``.

    Raises:
        ConfigurationError: no region or no credentials are configured; the message names the variables.
        StoreUnavailable: the client cannot be made for another reason.
    """
    session = get_session()
    async with translated(service):
        # botocore itself reads AWS_DEFAULT_REGION and the profile's, but not the variable of the other SDKs.
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
        if region is None:
            raise ConfigurationError(f"{service}: no region is configured: set AWS_REGION")
        try:
            # Asked for here, so that it is said at the start; what goes away later comes back, like any service.
            credentials = await session.get_credentials()
        except PartialCredentialsError as error:
            raise ConfigurationError(f"{service}: {error}: set {_CREDENTIALS}") from error
        if credentials is None:
            raise ConfigurationError(f"{service}: no credentials are found: set {_CREDENTIALS}")
        return await resources.enter_async_context(
            session.create_client(service, region_name=region, config=client_config(service))
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
