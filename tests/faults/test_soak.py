"""The soak runner at work: it finds nothing where nothing is wrong, and what is wrong it finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.process import clean_env

PROJECT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def soak(out: Path, *arguments: str, timeout: float = 220) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "soaking", "--json", str(out), *arguments],
        env=clean_env({"PYTHONPATH": f"{PROJECT / 'scripts'}:{PROJECT / 'tests'}"}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert out.exists(), done.stdout + done.stderr
    summary: dict[str, Any] = json.loads(out.read_text())
    return done.returncode, summary


def test_a_short_soak_under_faults_finds_nothing(litestream: Path, tmp_path: Path) -> None:
    status, summary = soak(
        tmp_path / "out.json", "--minutes", "0.35", "--faults", "all", "--server", "rclone", "--seed=3"
    )
    assert (status, summary["anomalies"]) == (0, 0), summary["readers"]
    assert sum(summary["strikes"].values()) > 20
    assert summary["transactions"] > 50 and summary["distinct"] > 20
    assert all(group["transactions"] for group in summary["readers"].values()), "every kind of reader got somewhere"


@pytest.mark.minutes
@pytest.mark.timeout(600)
def test_five_minutes_of_soak_find_nothing(litestream: Path, tmp_path: Path) -> None:
    """Each run with another seed, which a failure tells, beside the other tests: so the machine is busy, too."""
    status, summary = soak(tmp_path / "out.json", "--minutes", "5", "--faults", "some", "--rate", "10", timeout=580)
    assert (status, summary["anomalies"]) == (0, 0), summary
    assert summary["transactions"] > 1000 and summary["distinct"] > 300 and sum(summary["strikes"].values()) > 1000
    assert all(group["transactions"] for group in summary["readers"].values()), "every kind of reader got somewhere"


@pytest.mark.parametrize("kind", ["page", "txid"])
def test_a_reader_that_lies_is_caught(litestream: Path, tmp_path: Path, kind: str) -> None:
    arguments = ["--minutes", "0.2", "--faults", "none", "--server", "rclone", "--readers", "plain", "--seed", "1"]
    status, summary = soak(tmp_path / "out.json", *arguments, "--sabotage", kind)
    assert status == 1 and summary["anomalies"] > 0


def test_following_at_machine_speed_leaks_nothing(tmp_path: Path) -> None:
    status, summary = soak(tmp_path / "out.json", "--follow", "1000")
    assert status == 0, summary
    assert all(each["states"] > 5 for each in summary["runs"])
