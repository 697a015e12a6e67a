"""What tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder that nobody trained; do not change it in place."""
    from tests.nlu.training.bert import make_bert  # needs the train extra

    return make_bert(tmp_path_factory.mktemp("base") / "bert")
