"""A registry of any size, of the kinds and shapes that a large lender's has: for tests of what size costs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.registry_documents import document, model_version

_FEATURES = 12


def many_documents(total: int) -> Iterator[dict[str, Any]]:
    """``total`` sound documents: of ten, one is a route, two are models, one is a view, the rest versions."""
    routes, models, views = total // 10, total // 5, total // 10
    versions = total - routes - models - views
    for number in range(views):
        yield document("FeatureView", f"view-{number}", _view())
    for number in range(models):
        yield document("Model", f"model-{number}", {"owner": f"team {number % 20}", "aliases": {"champion": "1"}})
    for number in range(versions):
        yield _version(number % models, 1 + number // models, number % views)
    for number in range(routes):
        yield document("Route", f"route-{number}", _route(number, models))


def write_documents(directory: Path, total: int) -> None:
    """The same in files of a hundred documents, as ``apply -f`` reads them."""
    documents = list(many_documents(total))
    for number in range(0, total, 100):
        text = yaml.dump_all(documents[number : number + 100], Dumper=yaml.CSafeDumper, sort_keys=False)
        (directory / f"{number:06}.yaml").write_text(text)


def _view() -> dict[str, Any]:
    return {
        "entities": [{"name": "applicant_id", "type": "INT64"}],
        "features": [{"name": f"feature_{number}", "type": "DOUBLE"} for number in range(_FEATURES)],
        "source": {"type": "redis", "project": "credit"},
    }


def _version(model: int, version: int, view: int) -> dict[str, Any]:
    features: list[dict[str, Any]] = [{"ref": "inputs.amount", "type": "DOUBLE", "required": True}]
    features += [
        {"ref": f"view-{view}.feature_{number}", "default": 0.5, "maxAge": "30d"} for number in range(_FEATURES)
    ]
    return model_version(str(version), f"model-{model}", features=features)


def _split() -> list[dict[str, Any]]:
    # One list a task: what stands twice would be written as a YAML alias, which is not read.
    return [{"version": "1", "weight": 90}, {"version": "2", "weight": 10}]


def _route(number: int, models: int) -> dict[str, Any]:
    rules = [
        {
            "name": f"rule-{rule}",
            "when": f'metadata.channel == "channel-{rule}" && inputs.amount > {1_000.5 * rule}',
            "tasks": [
                {
                    "name": "pd",
                    "model": f"model-{(3 * number) % models}",
                    "select": {"split": _split(), "stickyBy": "applicant_id"},
                },
                {
                    "name": "fraud",
                    "model": f"model-{(3 * number + 1) % models}",
                    "select": {"alias": "champion"},
                    "need": "optional",
                },
            ],
            "result": {"decision": 'outputs.pd.probability < 0.3 ? "approve" : "refer"'},
        }
        for rule in range(3)
    ]
    return {"path": f"/lender-{number % 50}/{{product}}/{number}", "deadline": "250ms", "rules": rules}
