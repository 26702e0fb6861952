"""kill -9 at any moment: whoever opens what is left serves no wrong page, and completes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_processes_that_share_a_copy_are_killed_again_and_again(tmp_path: Path) -> None:
    program = Path(__file__).with_name("killing.py")
    command = [sys.executable, str(program), str(tmp_path), "300", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr[-6000:]
    done = json.loads(run.stdout)
    assert done["kills"] == 300
    assert done["transactions"] > 100
    assert done["pages"] > 1000, "something was local when it was looked at"
