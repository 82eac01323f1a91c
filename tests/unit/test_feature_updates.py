"""Feature updates: what is stored of them, and what refuses them."""

from itertools import islice, permutations
from typing import Any

import orjson
import pytest
import yaml

from app.adapters.avro import AvroCodec, feature_updates
from app.domain.feature_updates import FeatureRow, UpdateRefused, read_update
from app.domain.features import EntityKey
from app.domain.view_documents import PARTS_MAX, FeatureViewSpec
from tests.support.markdown import ROOT, blocks_of

NOW_MS = 1_795_392_000_000
VIEWS = {
    "applicant": FeatureViewSpec.model_validate_json(
        """{"entities": [{"name": "applicant_id", "type": "INT64"}],
            "features": [{"name": "age", "type": "INT64"}, {"name": "history", "type": "STRING"},
                         {"name": "share", "type": "FLOAT"}, {"name": "scan", "type": "BYTES"},
                         {"name": "since", "type": "UNIX_TIMESTAMP"}, {"name": "owner", "type": "BOOL"}],
            "source": {"type": "redis", "project": "credit"}}"""
    ),
    "account": FeatureViewSpec.model_validate_json(
        """{"entities": [{"name": "iban", "type": "STRING"}, {"name": "branch", "type": "INT32"}],
            "features": [{"name": "balance", "type": "DOUBLE"}],
            "source": {"type": "redis", "project": "credit"}}"""
    ),
}


def update(**changes: Any) -> dict[str, Any]:
    """A sound update with ``changes``; a change to ... removes the member."""
    body = {
        "project": "credit",
        "view": "applicant",
        "entities": {"applicant_id": 17},
        "values": {"age": 41},
        "event_time": "2026-11-23T00:00:00Z",
    } | changes
    return {name: value for name, value in body.items() if value is not ...}


def test_an_update_becomes_a_typed_row() -> None:
    """Values get their declared types; what is left out is kept."""
    values = {"age": 41.0, "history": None, "share": 1, "scan": "AP8=", "since": "2026-11-23T00:00:00Z", "owner": True}
    assert read_update(update(values=values), VIEWS, NOW_MS) == FeatureRow(
        "applicant",
        EntityKey("credit", ("applicant_id",), (17,), ("INT64",)),
        ("age", "history", "share", "scan", "since", "owner"),
        (41, None, 1.0, b"\x00\xff", 1_795_392_000, True),
        ("INT64", "STRING", "FLOAT", "BYTES", "UNIX_TIMESTAMP", "BOOL"),
        1_795_392_000_000,
    )
    assert read_update(update(), VIEWS, NOW_MS).kept == ("history", "share", "scan", "since", "owner")


def test_updates_of_one_shape_are_told_apart_by_their_names_and_order() -> None:
    """What is remembered of a view's updates serves those of the same names only, and is bounded."""
    first = read_update(update(values={"age": 1, "history": "x"}), VIEWS, NOW_MS)
    other = read_update(update(values={"history": "y", "age": 2}), VIEWS, NOW_MS)
    assert (first.names, first.values, first.types) == (("age", "history"), (1, "x"), ("INT64", "STRING"))
    assert (other.names, other.values, other.types) == (("history", "age"), ("y", 2), ("STRING", "INT64"))
    view = VIEWS["applicant"]
    for names in islice(permutations(view.types), PARTS_MAX + 10):
        assert view.part(names) == (names, tuple(view.types[name] for name in names), ())
    assert read_update(update(values={"age": 3}), VIEWS, NOW_MS).kept == ("history", "share", "scan", "since", "owner")


@pytest.mark.parametrize(("given", "kept"), [(2**63 - 1, True), (-(2**63), True), (2**63, False), (True, False)])
def test_whole_numbers_have_64_bits(given: int, kept: bool) -> None:
    """The largest and the smallest are taken, the next are refused; a truth value is no number."""
    for body in (update(values={"age": given}), update(entities={"applicant_id": given})):
        if kept:
            assert given in {*read_update(body, VIEWS, NOW_MS).values, *read_update(body, VIEWS, NOW_MS).key.values}
        else:
            with pytest.raises(UpdateRefused, match="is not INT64"):
                read_update(body, VIEWS, NOW_MS)


@pytest.mark.parametrize("given", [float("nan"), float("inf")])
def test_a_double_is_finite(given: float) -> None:
    """Avro can say what JSON cannot, and it is refused."""
    body = update(view="account", entities={"iban": "x", "branch": 3}, values={"balance": given})
    with pytest.raises(UpdateRefused, match=r"values\.balance"):
        read_update(body, VIEWS, NOW_MS)


LISTS = {
    "series": FeatureViewSpec.model_validate_json(
        """{"entities": [{"name": "applicant_id", "type": "INT64"}],
            "features": [{"name": "scans", "type": "BYTES_LIST"}, {"name": "shares", "type": "FLOAT_LIST"},
                         {"name": "times", "type": "UNIX_TIMESTAMP_LIST"}, {"name": "names", "type": "STRING_LIST"}],
            "source": {"type": "redis", "project": "credit"}}"""
    ),
    "loan": FeatureViewSpec.model_validate_json(
        """{"features": [{"name": "x", "type": "DOUBLE"}], "onDemand": {"x": "1.0"}}"""
    ),
    "bureau": FeatureViewSpec.model_validate_json(
        """{"entities": [{"name": "applicant_id", "type": "INT64"}],
            "features": [{"name": "x", "type": "DOUBLE"}],
            "source": {"type": "http", "endpoints": ["http://127.0.0.1:1"]}}"""
    ),
}


def test_lists_are_typed_element_by_element() -> None:
    """Bytes are base64, times ISO 8601 text or seconds, here too; what cannot be is refused at its place."""
    values = {"scans": ["AP8="], "shares": [1, None], "times": ["2026-11-23T00:00:00Z", 5], "names": []}
    row = read_update(update(view="series", values=values), LISTS, NOW_MS)
    assert row.values == ((b"\x00\xff",), (1.0, None), (1_795_392_000, 5), ())
    for bad, said in (
        ({"shares": [0.5, 1e39]}, r"values.shares\[1\]: "),
        ({"scans": ["?"]}, r"values.scans\[0\]: not base64"),
        ({"names": ["a", None]}, "values.names: null within a list"),
        ({"names": "a"}, "values.names: 'a' .* is not STRING_LIST"),
    ):
        with pytest.raises(UpdateRefused, match=said):
            read_update(update(view="series", values=bad), LISTS, NOW_MS)


@pytest.mark.parametrize(("view", "said"), [("loan", "computed on demand"), ("bureau", "asked of a feature server")])
def test_only_views_in_redis_take_updates(view: str, said: str) -> None:
    """The registry may change its mind, so it is waited for like a view that is not there yet."""
    with pytest.raises(UpdateRefused, match=said) as caught:
        read_update(update(view=view), LISTS, NOW_MS)
    assert caught.value.unknown


def test_join_keys_are_sorted_by_name() -> None:
    """A compound key has Feast's order, whatever the document's and the update's."""
    body = update(view="account", entities={"iban": "DE1", "branch": 3}, values={"balance": 1})
    expected = EntityKey("credit", ("branch", "iban"), (3, "DE1"), ("INT32", "STRING"))
    assert read_update(body, VIEWS, NOW_MS).key == expected


@pytest.mark.parametrize(
    ("given", "epoch_ms"),
    [
        (1_795_392_000_123, 1_795_392_000_123),
        ("2026-11-23T00:00:00.123Z", 1_795_392_000_123),
        ("2026-11-23T01:00:00+01:00", 1_795_392_000_000),
        ("2026-11-23T00:00:00", 1_795_392_000_000),
        (0, 0),
        (9_999_999, 9_999_999),
        (10_000_000_000, 10_000_000_000),
        ("1970-02-01T00:00:00Z", 2_678_400_000),
        # Clocks differ.
        (NOW_MS + 300_000, NOW_MS + 300_000),
    ],
)
def test_event_times(given: object, epoch_ms: int) -> None:
    """Epoch milliseconds, or ISO 8601 text, UTC where it names no offset."""
    assert read_update(update(event_time=given), VIEWS, NOW_MS).event_time_ms == epoch_ms


@pytest.mark.parametrize(
    ("changes", "said", "unknown"),
    [
        ({"project": ...}, "project is missing", False),
        ({"values": ..., "value": {}}, "values is missing; value is unknown", False),
        ({"view": "loan"}, "'loan' is not in the registry", True),
        ({"view": ["applicant"]}, "is not in the registry", True),
        ({"project": "other"}, "belongs to credit", True),
        ({"values": {"colour": 1}}, "values.colour", True),
        ({"values": {}}, "values is empty", False),
        ({"values": [1]}, "values is list", False),
        ({"values": {"age": "old"}}, "values.age", False),
        ({"values": {"age": 1.5}}, "values.age", False),
        ({"values": {"owner": 1}}, "values.owner", False),
        ({"values": {"share": 1e39}}, "values.share", False),
        ({"values": {"share": float("nan")}}, "values.share", False),
        ({"values": {"scan": "%%"}}, "values.scan: not base64", False),
        ({"values": {"history": "\ud800"}}, "values.history", False),
        ({"values": {"since": b"x"}}, "values.since", False),
        ({"values": {"age": [1]}}, "values.age", False),
        ({"entities": {}}, "entities has nothing", False),
        ({"entities": {"applicant_id": 1, "x": 2}}, "entities has applicant_id, x", False),
        ({"entities": {"applicant_id": "17"}}, "entities.applicant_id", False),
        ({"entities": {"applicant_id": 17.0}}, "entities.applicant_id", False),
        ({"entities": {"applicant_id": None}}, "entities.applicant_id", False),
        ({"entities": {"applicant_id": True}}, "entities.applicant_id", False),
        ({"entities": None}, "entities is NoneType", False),
        ({"event_time": "yesterday"}, "event_time 'yesterday'", False),
        ({"event_time": True}, "event_time 'True'", False),
        ({"event_time": 1_795_392_000_000_000}, "milliseconds", False),
        ({"event_time": -1}, "1970", False),
        ({"event_time": NOW_MS // 1_000}, "event_time 1795392000 would be in early 1970, as epoch milliseconds", False),
        ({"event_time": 20_261_123}, "a date as ISO 8601 text", False),
        ({"event_time": NOW_MS + 300_001}, "is 300 s in the future, and 300 s are allowed", False),
        ({"event_time": "2027-11-23T00:00:00Z"}, "in the future", False),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], said: str, unknown: bool) -> None:
    """A refusal says which member and why, and whether the registry could still make it right."""
    with pytest.raises(UpdateRefused) as refused:
        read_update(update(**changes), VIEWS, NOW_MS)
    assert said in str(refused.value)
    assert refused.value.unknown is unknown


def test_null_values_are_a_tombstone() -> None:
    """It names everything that the view holds, computed features too, and has its event time."""
    row = read_update(update(values=None), VIEWS, NOW_MS)
    assert (row.tombstone, row.guards, row.names, row.values) == (True, True, (), ())
    assert row.kept == ("age", "history", "share", "scan", "since", "owner")
    assert row.event_time_ms == 1_795_392_000_000
    with pytest.raises(UpdateRefused, match="event_time"):
        read_update(update(values=None, event_time="yesterday"), VIEWS, NOW_MS)


def test_views_with_aggregates_and_ttl() -> None:
    """A row knows the view's ttl and keeps the computed features; updates may not carry those."""
    document = VIEWS["account"].model_dump(by_alias=True, mode="json")
    document |= {"ttl": "30d", "aggregate": {"of": "balance", "op": "max", "windows": ["24h"]}}
    views = {"account": FeatureViewSpec.model_validate_json(orjson.dumps(document))}
    body = update(view="account", entities={"iban": "DE1", "branch": 3}, values={"balance": 1})
    row = read_update(body, views, NOW_MS)
    assert (row.ttl_ms, row.kept) == (30 * 86_400_000, ("balance_max_24h",))
    with pytest.raises(UpdateRefused, match="balance_max_24h: is computed") as refused:
        read_update({**body, "values": {"balance_max_24h": 1}}, views, NOW_MS)
    assert not refused.value.unknown


def test_both_generations_of_avro_are_read() -> None:
    """Producers that write with the schema before tombstones need not change; the two differ in nothing else."""
    codec = feature_updates()
    body = update(event_time=NOW_MS)
    assert codec.decode(AvroCodec("FeatureUpdate-1").encode(body)) == body
    assert codec.decode(codec.encode(body)) == body
    assert codec.decode(codec.encode({**body, "values": None}))["values"] is None


def test_the_page_s_updates_are_read() -> None:
    """docs/features-writing.md: its document makes a view under which its update and its tombstone are sound."""
    blocks = {block.mark: block.text for block in blocks_of(ROOT / "docs" / "features-writing.md")}
    document = next(iter(yaml.safe_load_all(blocks["registry"])))
    views = {"payments": FeatureViewSpec.model_validate_json(orjson.dumps(document["spec"]))}
    row = read_update(orjson.loads(blocks["update"]), views, NOW_MS)
    assert (row.names, row.values) == (("amount", "merchant"), (12.5, "kiosk"))
    assert read_update(orjson.loads(blocks["tombstone"]), views, NOW_MS).tombstone
