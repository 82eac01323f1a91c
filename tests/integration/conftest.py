"""A cluster of one test module: one decide and one pool worker, and whatever else the module starts."""

import uuid
from collections.abc import Iterator

import pytest

from tests.support.cluster import Cluster
from tests.support.stack import ServiceStack, set_aws


@pytest.fixture(scope="module")
def standing_cluster(stack: ServiceStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster, prepared, and nothing of it running yet."""
    with pytest.MonkeyPatch.context() as patch:
        set_aws(stack, patch)
        prefix = f"i{uuid.uuid4().hex[:10]}."
        with Cluster(stack, tmp_path_factory.mktemp("cluster"), prefix=prefix) as cluster:
            yield cluster


@pytest.fixture
def cluster(standing_cluster: Cluster) -> Cluster:
    """One decide worker and one pool worker, ready."""
    standing_cluster.heal("decide-0", "pool-0")
    return standing_cluster
