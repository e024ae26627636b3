"""The demo model, opened once for each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ram_tiers import EXPERTS, LAYERS

from offmoe.checkpoint.find_model import DEMO
from offmoe.models.model import Model, open_model


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    model = open_model(DEMO)
    assert (model.config.layers, model.config.experts) == (LAYERS, EXPERTS)
    yield model
    model.checkpoint.close()
