"""What `model-broker get` shows of documents."""

import pytest
from rich.console import Console

from app.commands.registry import _documents_table
from app.domain.documents import Document
from tests.support.registry_documents import changed, document, revision, sound

COMPUTED = document(
    "FeatureView",
    "ratio",
    {
        "features": [{"name": "double", "type": "DOUBLE"}],
        "onDemand": {"double": "inputs.amount * 2.0"},
    },
)


@pytest.mark.parametrize(
    ("view", "features"),
    [
        ("applicant", "age, history, age_mean_30d, age_mean_7d, count_1h"),
        ("ratio", "double"),
    ],
)
def test_a_view_is_shown_with_all_that_it_serves(view: str, features: str) -> None:
    """The features that updates carry, those that are aggregated from them, and those computed on demand."""
    aggregate = [{"of": "age", "op": "mean", "windows": ["30d", "7d"]}, {"op": "count", "windows": ["1h"]}]
    made = revision([*changed(sound(), "applicant", "spec.aggregate", aggregate), COMPUTED])
    console = Console(width=200)
    with console.capture() as capture:
        documents: list[Document] = [each for each in made.documents if each.kind == "FeatureView"]
        console.print(_documents_table("FeatureView", documents, made))
    (line,) = [line for line in capture.get().splitlines() if line.split()[:1] == [view]]
    assert features in line
