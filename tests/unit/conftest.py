"""Fixtures of the unit tests: the example's models, trained once a session."""

from pathlib import Path

import pytest

from examples.credit.train import train


@pytest.fixture(scope="session")
def credit_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the credit example's trained models and their manifest."""
    directory = tmp_path_factory.mktemp("credit-models")
    train(directory)
    return directory
