"""The toy run that tests share."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def toy():
    """The module tests/helpers/toy.py, loaded from its path."""
    path = Path(__file__).parents[1] / "helpers" / "toy.py"
    spec = importlib.util.spec_from_file_location("toy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
