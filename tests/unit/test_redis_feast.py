"""How the feature store's commands look on the wire."""

from hypothesis import given
from hypothesis import strategies as st

from app.adapters.feast_codec import feature_field, time_field
from app.adapters.redis_feast import _read_command, _reading
from app.adapters.redis_nodes import pack

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=80)


@given(st.binary(min_size=1), st.lists(st.tuples(NAMES, st.lists(NAMES, max_size=12)), min_size=1, max_size=4))
def test_a_read_put_together_is_a_read_packed_whole(row: bytes, views: list[tuple[str, list[str]]]) -> None:
    """Whatever the key and the names: what is kept packed for each view makes the command that hiredis would make."""
    words = [b"HMGET", row]
    for view, features in views:
        words += [feature_field(view, feature) for feature in features]
        words += [time_field(view), b"_at:" + view.encode()]
    command = _read_command(row, [_reading(view, tuple(features)) for view, features in views])
    assert (command.key, command.packed) == (row, pack(tuple(words)))
