"""One cluster for all faults; before each test it is made whole again."""

import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.support.cluster import Cluster
from tests.support.load import Verdict
from tests.support.stack import ServiceStack, set_aws

FEATURE_TIMEOUT = "3s"
"""Longer than the default: what is shown here is what faults do, and not what a starved machine does."""
DRAIN_TIMEOUT_S = 6
"""Shorter than the default: it is what a worker waits that stops while Kafka is away."""


@pytest.fixture(scope="package")
def standing_cluster(stack: ServiceStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster, prepared, and nothing of it running yet."""
    with pytest.MonkeyPatch.context() as patch:
        set_aws(stack, patch)
        prefix = f"f{uuid.uuid4().hex[:10]}."
        directory = tmp_path_factory.mktemp("faults")
        settings = {"BROKER_FEATURE_TIMEOUT": FEATURE_TIMEOUT, "BROKER_DRAIN_TIMEOUT": f"{DRAIN_TIMEOUT_S}s"}
        with Cluster(stack, directory, prefix=prefix, **settings) as cluster:
            yield cluster


@pytest.fixture
def cluster(standing_cluster: Cluster) -> Cluster:
    """Two decide workers, a pool worker and an audit worker, ready."""
    standing_cluster.heal("decide-0", "decide-1", "pool-0", "audit-0")
    return standing_cluster


@pytest.fixture
def tell(
    record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> Callable[[Verdict], None]:
    """Prints a verdict and puts it into the test report."""

    def told(verdict: Verdict) -> None:
        record_property("verdict", str(verdict))
        with capsys.disabled():
            print(f"\n  {verdict}")

    return told
