"""A features worker as an operator starts it, with registry, topics and store of its own; commands run against it."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
from typer.testing import CliRunner, Result

from app.adapters.registry_topic import publish_revision, read_head
from app.adapters.topics import TopicAdmin, read_documents, wanted_topics
from app.cli import app
from app.domain.registry import Source, compile_revision, read_revision
from app.settings import Settings
from tests.support.cluster import ROOT, Member
from tests.support.stack import ServiceStack

PARTITIONS: Final = 2


class FeaturesWorld:
    """What is there: settings, the environment of processes, and the worker, which a test starts."""

    def __init__(self, stack: ServiceStack, directory: Path, prefix: str) -> None:
        self.directory = directory
        self.project = prefix.rstrip(".")
        variables = {
            "BROKER_KAFKA_BOOTSTRAP": stack.env["BROKER_KAFKA_BOOTSTRAP"],
            "BROKER_REDIS_URL": stack.env["BROKER_REDIS_URL"],
            "BROKER_TOPIC_PREFIX": prefix,
            "BROKER_PARTITIONS": str(PARTITIONS),
            "BROKER_DATA_DIR": str(directory / "data"),
            "BROKER_LOG_FORMAT": "json",
        }
        self.settings = Settings.model_validate(
            {name.removeprefix("BROKER_").lower(): value for name, value in variables.items()}
        )
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
        self.env = {**inherited, **variables, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
        self._variables = {**variables, "COLUMNS": "80"}
        self.worker = Member("features-0", self.env, directory)
        TopicAdmin(self.settings).apply(wanted_topics(read_documents(), self.settings, []))

    def publish(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Make ``documents`` the registry."""
        written = read_revision(Source(f"test:{at}", document) for at, document in enumerate(documents))
        revision = compile_revision(written.documents)
        head = read_head(self.settings)
        if head.id != revision.id:
            publish_revision(self.settings, revision, expected=head.id, now_ms=time.time_ns() // 1_000_000)

    def redirect(self, patch: pytest.MonkeyPatch, name: str, value: str) -> None:
        """Commands find this variable otherwise, for as long as the patch lasts."""
        patch.setitem(self._variables, name, value)

    def run(self, *arguments: object, code: int = 0) -> Result:
        """``model-broker`` with these arguments; it must end with ``code``."""
        result = CliRunner().invoke(app, [str(each) for each in arguments], env=self._variables)
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}\n{self.worker.tail()}"
        return result

    def run_json(self, *arguments: object, code: int = 0) -> Any:
        """The JSON document that it prints."""
        return orjson.loads(self.run(*arguments, "--json", code=code).stdout)

    def features(self, view: str, entity: str, code: int = 0) -> dict[str, Any]:
        """What ``features get`` says of an entity: (status, value) by feature."""
        shown = self.run_json("features", "get", view, entity, code=code)
        return {each["feature"]: (each["status"], each["value"]) for each in shown["features"]}


@contextmanager
def features_world(stack: ServiceStack, directory: Path, prefix: str) -> Iterator[FeaturesWorld]:
    """A world; its worker ends with it."""
    world = FeaturesWorld(stack, directory, prefix)
    try:
        yield world
    finally:
        if world.worker.runs:
            world.worker.kill()


def feature_view(name: str, project: str, features: Mapping[str, str], **spec: Any) -> dict[str, Any]:
    """A FeatureView of applicants."""
    return {
        "apiVersion": "modelbroker.dev/v1alpha1",
        "kind": "FeatureView",
        "metadata": {"name": name},
        "spec": {
            "entities": [{"name": "applicant_id", "type": "INT64"}],
            "features": [{"name": each, "type": type_} for each, type_ in features.items()],
            "source": {"type": "redis", "project": project},
            **spec,
        },
    }


def model(name: str, features: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A Model and its version 1, which needs ``features``."""
    head = {"apiVersion": "modelbroker.dev/v1alpha1"}
    spec = {
        "model": name,
        "version": "1",
        "digest": f"sha256:{'0' * 64}",
        "backend": {"type": "http", "endpoints": ["http://127.0.0.1:1"]},
        "features": list(features),
        "outputs": [{"name": "y", "datatype": "FP64"}],
        "governance": {"approvedBy": "model-risk"},
    }
    return [
        {**head, "kind": "Model", "metadata": {"name": name}, "spec": {"owner": "risk"}},
        {**head, "kind": "ModelVersion", "metadata": {"name": f"{name}-1"}, "spec": spec},
    ]
