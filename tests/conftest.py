"""Fixtures that every test may ask for: the real services, and names that no other test uses.

The services start once a session, when the first test asks. Tests share them and keep apart by their own topic
prefix, bucket and table; a test that stops a service starts it again.
"""

import signal
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.stack import CHOICE_VARIABLE, ServiceStack, chosen_stack, set_aws, start_stack

# How fast a machine makes up examples says nothing about the code that is given them.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

# What a shell runs in the background ignores Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Say which services the run uses."""
    return f"services: {chosen_stack()} ({CHOICE_VARIABLE}=auto|containers|embedded)"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceStack]:
    """Kafka, Redis, S3 and DynamoDB, up and serving, with handles that stop and start each."""
    services = start_stack(tmp_path_factory.mktemp("stack"))
    try:
        yield services
    finally:
        services.down()


@pytest.fixture
def kafka_bootstrap(stack: ServiceStack) -> str:
    """HOST:PORT of the Kafka broker."""
    return stack.env["BROKER_KAFKA_BOOTSTRAP"]


@pytest.fixture
def redis_url(stack: ServiceStack) -> str:
    """The URL of the Redis server."""
    return stack.env["BROKER_REDIS_URL"]


@pytest.fixture
def aws_env(stack: ServiceStack, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The AWS variables of the stack, set in this process too for the length of the test."""
    return set_aws(stack, monkeypatch)


@pytest.fixture
def topic_prefix() -> str:
    """A prefix for this test's topics and consumer groups."""
    return f"t{uuid.uuid4().hex[:10]}."


@pytest.fixture
def bucket_name() -> str:
    """A bucket name that is not used; the bucket is the test's to make."""
    return f"bucket-{uuid.uuid4().hex[:16]}"


@pytest.fixture
def table_name() -> str:
    """A table name that is not used; the table is the test's to make."""
    return f"table-{uuid.uuid4().hex[:16]}"
