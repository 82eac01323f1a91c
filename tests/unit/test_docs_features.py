"""docs/features.md: what is stored and asked there does in the decide engine what the page says."""

import datetime
import typing

import pytest

from app.domain.document_parts import ValueType
from app.domain.features import FeatureStatus
from app.domain.registry import Revision, Source, read_revision
from app.domain.version_documents import FeatureContract
from app.domain.view_documents import FeatureViewSpec, HttpSource, WriteBack
from tests.support.feature_examples import PAGE, Asked, Example, read_page
from tests.support.routing_examples import is_part
from tests.support.virtual_time import in_virtual_time

MODELS, *EXAMPLES = read_page(PAGE.read_text())
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.heading)


def revision_of(*examples: Example, today: datetime.date | None = None) -> Revision:
    """The examples' documents together."""
    sources = [
        Source(f"{each.heading}:{number}", document)
        for each in examples
        for number, document in enumerate(each.documents)
    ]
    return read_revision(sources, today=today)


@each_example
@in_virtual_time
async def test_callers_and_auditors_see_what_the_page_shows(example: Example) -> None:
    """Step by step: the reply has every member shown, and so has the record."""
    asked = Asked(revision_of(MODELS, example))
    reply: object = None
    record: object = None
    shown = 0
    for kind, body in example.steps:
        if kind == "Stored":
            await asked.store(body)
        elif kind == "Callers ask":
            reply, record = await asked.ask(body)
        else:
            whole = reply if kind == "Callers get" else record
            assert is_part(body, whole), whole
            shown += 1
    await asked.close()
    assert shown


def test_all_examples_live_in_one_registry() -> None:
    """They can be applied together."""
    assert len(revision_of(MODELS, *EXAMPLES).routes) == len(EXAMPLES)


@each_example
def test_apply_takes_the_page_s_documents(example: Example) -> None:
    """As they stand, with the models: governance included, which `apply` asks of versions that serve."""
    assert revision_of(MODELS, example, today=datetime.date(2026, 1, 31)).routes


def test_the_pages_name_every_status_type_and_field() -> None:
    """What documents can say of features is on these pages, and so is what can be known of a value."""
    text = "".join(page.read_text() for page in sorted(PAGE.parent.glob("features*.md")))
    types = [name for name in typing.get_args(ValueType) if not name.endswith("_LIST")]
    shapes = (FeatureContract, FeatureViewSpec, HttpSource, WriteBack)
    fields = [field.alias or name for shape in shapes for name, field in shape.model_fields.items()]
    for name in (*FeatureStatus, *types):
        assert f"`{name}`" in text, name
    for name in fields:
        assert name in text, name
