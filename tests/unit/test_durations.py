"""Durations: as people write them in, whole milliseconds inside, and back."""

from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from app.durations import DurationMs, WrittenDurationMs, format_duration, parse_duration_ms, within


@given(st.integers(0, 10**30))
def test_what_is_written_is_read_back(milliseconds: int) -> None:
    """Exactly, whatever the unit."""
    assert parse_duration_ms(format_duration(milliseconds)) == milliseconds


@pytest.mark.parametrize("text", ["", "5", "s", "-1s", "1 s", "1w", "1e3s", "1.s", ".5s", "1s ", 5, None, True])
def test_anything_else_is_refused(text: object) -> None:
    """The message shows how it is written."""
    with pytest.raises(ValueError, match="as 80ms, 2s, 15m, 1h or 30d"):
        parse_duration_ms(text)


def test_as_a_setting() -> None:
    """Text from the environment, whole milliseconds from code; no fractions, no truths."""

    class Holder(BaseModel):
        wait: DurationMs

    assert Holder.model_validate({"wait": "2s"}).wait == 2_000
    assert Holder.model_validate({"wait": 80}).wait == 80
    for wrong in (True, 1.5, "soon"):
        with pytest.raises(ValidationError):
            Holder.model_validate({"wait": wrong})


def test_as_a_document_s_field() -> None:
    """Text only, in and out: a number does not say of what."""

    class Holder(BaseModel):
        wait: Annotated[WrittenDurationMs, within("10ms", "1m")]

    held = Holder.model_validate({"wait": "2000ms"})
    assert held.wait == 2_000
    assert held.model_dump(mode="json") == {"wait": "2s"}
    for wrong, said in ((80, "a number and a unit"), ("9ms", "from 10ms to 1m"), ("61s", "from 10ms to 1m")):
        with pytest.raises(ValidationError, match=said):
            Holder.model_validate({"wait": wrong})
