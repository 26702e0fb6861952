from __future__ import annotations

import shlex
import time
from pathlib import Path

import pytest
from cli_helpers import Bank, Ran, Run

from lazyreplica.cli import main
from support.bank import bank_writer, build_bank
from support.litestream import replicating


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, as a program would: no terminal, 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str | Path) -> Ran:
        words = shlex.split(arguments[0]) if len(arguments) == 1 else [str(word) for word in arguments]
        capsys.readouterr()
        try:
            status = main(words)
        except SystemExit as exc:  # argparse
            status = int(exc.code or 0)
        out, err = capsys.readouterr()
        return Ran(status, out, err)

    return run


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """With snapshots and every level up to 2. Do not change it: copy the replica."""
    directory = tmp_path_factory.mktemp("bank")
    database = build_bank(directory / "bank.db")
    replica = directory / "replica"
    options = {"levels": ["1s", "2s"], "snapshot_interval": "2s", "l0_retention": "1s"}
    with replicating(database, replica, **options) as litestream:
        with bank_writer(database, rate=300, delete_every=0.5, vacuum_every=1.5):
            time.sleep(4.5)
        litestream.wait_synced()
    return Bank(database, replica)
