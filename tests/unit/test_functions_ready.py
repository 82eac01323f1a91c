"""The readiness check of feature functions: of all that versions need, and of nothing else."""

from types import SimpleNamespace
from typing import Any

import pytest

from app.domain.errors import StoreUnavailable
from app.domain.on_demand import FeatureFunction
from app.domain.registry import Revision
from app.main import _functions_ready
from tests.support.registry_documents import document, model_version, revision, sound


def made(*features: dict[str, Any]) -> Revision:
    """Two views that call functions, the second by way of the first, and a version that needs ``features``."""
    how: dict[str, Any] = {"function": "first", "inputs": ["inputs.amount"]}
    then: dict[str, Any] = {"function": "second", "inputs": ["loan.a"]}
    return revision(
        [
            *sound(),
            document("FeatureView", "loan", {"features": [{"name": "a", "type": "DOUBLE"}], "onDemand": {"a": how}}),
            document("FeatureView", "more", {"features": [{"name": "b", "type": "DOUBLE"}], "onDemand": {"b": then}}),
            model_version("3", features=list(features)),
        ]
    )


@pytest.mark.parametrize(
    ("ref", "absent"),
    [("inputs.amount", ""), ("loan.a", "first"), ("more.b", "first, second")],
)
async def test_functions_that_no_version_needs_do_not_count(ref: str, absent: str) -> None:
    """A view nobody uses stops no rollout; what a version needs does, ingredients of ingredients too."""
    contract = {"ref": ref, "type": "DOUBLE"} if ref.startswith("inputs") else {"ref": ref}
    registry: Any = SimpleNamespace(current=made(contract))
    if absent:
        with pytest.raises(StoreUnavailable, match=f"functions {absent} are not registered"):
            await _functions_ready(registry, {})()
    else:
        await _functions_ready(registry, {})()
    known: dict[str, FeatureFunction] = {"first": lambda _: 1.0, "second": lambda _: 1.0}
    await _functions_ready(registry, known)()
    nothing: Any = SimpleNamespace(current=None)
    await _functions_ready(nothing, {})()
