"""Data and a training that the tests of the loop share."""

from __future__ import annotations

import pytest

from distill.training.data import TrainingData
from tests.support.training import Result, make_data, run_with


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="package")
def whole(data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run that nothing interrupts."""
    return run_with(data, tmp_path_factory.mktemp("whole"))
