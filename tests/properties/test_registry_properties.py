"""Properties of the registry and of routing, whatever the documents and requests."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.paths import PathTree, placeholders_of
from app.domain.registry import canonical, compile_revision, load_revision, parse
from app.domain.registry_diff import differences
from tests.support.registry_documents import changed, revision, route, sound, sources


def shuffled(value: Any, random: Any) -> Any:
    """The same JSON object with its members in another order."""
    if isinstance(value, dict):
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key], random) for key in keys}
    if isinstance(value, list):
        return [shuffled(item, random) for item in value]
    return value


@given(st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_canonical_form_does_not_depend_on_order(random: Any) -> None:
    """Documents and members in any order are one revision; lists keep theirs, for rules have one."""
    documents = [*sound(), route("other", "/other/{a}/{b}")]
    mixed = [shuffled(each, random) for each in documents]
    random.shuffle(mixed)
    assert revision(mixed).id == revision(documents).id


@given(st.integers(1, 3_600_000), st.integers(0, 1_000_000), st.floats(0, 1, allow_nan=False), st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_a_revision_survives_publication(deadline: int, weight: int, maximum: float, owner: str) -> None:
    """What is loaded from canonical JSON is what was published, to the bit, and does not differ in any field."""
    documents = changed(sound(), "credit", "spec.deadline", f"{deadline}ms")
    documents = changed(documents, "credit", "spec.rules.0.tasks.0.select.split.0.weight", weight)
    documents = changed(documents, "credit-pd-1", "spec.outputs.0.max", maximum)
    documents = changed(documents, "credit-pd", "spec.owner", owner or "risk")
    published = compile_revision(parse(sources(documents)))
    loaded = load_revision(published.id, canonical(published.documents))
    assert loaded.id == published.id
    assert differences(published.documents, loaded.documents) == ()
    assert loaded.versions == published.versions


segments = st.sampled_from(["a", "b", "{x}", "{y}", "c.d", ""])
shapes = st.builds(
    lambda parts, last: "/" + "/".join([*parts, *last]),
    st.lists(segments, min_size=1, max_size=4),
    st.sampled_from([[], [], ["*"]]),
)


def specificity(shape: str) -> list[int]:
    """A rank a segment: a literal before a placeholder before a prefix."""
    return [2 if segment == "*" else 1 if segment.startswith("{") else 0 for segment in shape.split("/")]


def matches(shape: str, path: str) -> bool:
    ours, theirs = shape.split("/"), path.split("/")
    if ours[-1] == "*":
        ours, rest = ours[:-1], theirs[len(ours) - 1 :]
        if not any(rest):
            return False
        theirs = theirs[: len(ours)]
    return len(ours) == len(theirs) and all(
        bool(given) if segment.startswith("{") else segment == given
        for segment, given in zip(ours, theirs, strict=True)
    )


@given(st.lists(shapes, max_size=12), st.lists(st.sampled_from(["a", "b", "c.d", "zz", ""]), max_size=5))
@settings(max_examples=500)
def test_the_tree_finds_what_trying_every_route_finds(routes: list[str], parts: list[str]) -> None:
    """The most specific of all matching paths is found, and none where none matches."""
    path = "/" + "/".join(parts)
    found = PathTree((shape, shape) for shape in routes).match(path)
    candidates = [shape for shape in routes if matches(shape, path)]
    if not candidates:
        assert found is None
        return
    assert found is not None
    shape, values = found
    assert specificity(shape) == min(map(specificity, candidates))
    stands_for = zip(shape.split("/"), path.split("/"), strict=False)
    assert values == tuple(given for segment, given in stands_for if segment.startswith("{"))


@given(shapes)
def test_placeholders_are_found_or_refused(shape: str) -> None:
    """A path's placeholders are named once each, in order."""
    expected = [segment[1:-1] for segment in shape.split("/") if segment.startswith("{")]
    try:
        assert list(placeholders_of(shape)) == expected
    except ValueError:
        assert len(set(expected)) < len(expected)
