from __future__ import annotations

from pathlib import Path

import pytest
from handmade import History, make_history


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    """Pages of 4 KiB; each file is small enough to be fetched whole."""
    return make_history(tmp_path_factory.mktemp("history"))


@pytest.fixture(scope="session")
def fine_history(tmp_path_factory: pytest.TempPathFactory) -> History:
    """Pages of 512 bytes: many frames and large indexes in small files."""
    return make_history(tmp_path_factory.mktemp("history"), page_size=512)


@pytest.fixture
def replica(tmp_path: Path) -> Path:
    return tmp_path / "replica"
