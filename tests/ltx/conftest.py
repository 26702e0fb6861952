from __future__ import annotations

import random

import pytest


@pytest.fixture(scope="session")
def noise() -> bytes:
    """128 KiB that no compression shortens, the same in every run."""
    return random.Random(1).randbytes(1 << 17)
