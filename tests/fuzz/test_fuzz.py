"""Each target for a moment; `scripts/fuzz` goes on for longer. And the mutators find what is there to be found."""

from __future__ import annotations

import logging

import pytest

from lazyreplica.ltx import decode_file
from support import fuzz
from support.memory import forget_peak, peak_resident

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as the test runs: others look at what is logged."""
    monkeypatch.setattr(logging.getLogger("lazyreplica"), "disabled", True)
    monkeypatch.setattr(logging.getLogger("lazyreplica.litestream_yml.document"), "disabled", True)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_only_errors_of_ours_come_out(name: str) -> None:
    forget_peak()
    before = peak_resident()
    assert fuzz.fuzz(name, 1.5, seed=1) > 100  # always the same inputs: a test is no lottery
    assert (peak_resident() - before) / 1e6 < 150, "MB"


def test_the_seeds_hold_real_files_of_both_kinds_of_frames() -> None:
    kinds = {decode_file(data).data[104:106] for name, data in fuzz.seeds("ltx").items() if "litestream" in name}
    assert kinds == {b"\0\0", b"\0\1"}


def test_a_target_that_does_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(data: bytes) -> None:
        if int.from_bytes(data[12:16], "big") > 1 << 30:  # the commit of a header
            raise MemoryError

    monkeypatch.setitem(fuzz.TARGETS, "ltx", careless)  # type: ignore[arg-type]
    with pytest.raises(fuzz.Finding, match="MemoryError"):
        fuzz.fuzz("ltx", 20, seed=1)
