"""What a shell sees: completion, a reader that leaves, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sysconfig
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Bank, Run

import lazyreplica
from lazyreplica import cli
from lazyreplica.cli.shell import ReplicaShell
from support.data import build_social

pytestmark = pytest.mark.slow

SCRIPTS = sysconfig.get_path("scripts")
PROGRAM = str(Path(SCRIPTS) / "lazyreplica")


def complete(line: str, out: Path) -> list[str]:
    """The words that a shell would offer behind `line`."""
    env = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run([PROGRAM], env=env, capture_output=True, timeout=60, check=False)
    return out.read_text().split()


def test_completion_offers_commands_and_options(tmp_path: Path) -> None:
    assert {"query", "timeline", "verify"} <= set(complete("lazyreplica ", tmp_path / "1"))
    assert complete("lazyreplica tim", tmp_path / "2") == ["timeline"]
    assert complete("lazyreplica timeline --b", tmp_path / "3") == ["--by"]
    assert set(complete("lazyreplica timeline --by ", tmp_path / "4")) == {"txid", "time"}


def test_an_sql_shell(bank: Bank, run: Run) -> None:
    done = run("shell", bank.url, ".mode json", "select count(*) as n from accounts")
    assert done.status == 0 and json.loads(done.out) == [{"n": 2000}]
    newest = run("info", "--json", bank.url).json["txid"]
    assert run("shell", "--txid", newest, bank.url, "pragma litestream_txid").out.strip() == newest
    arguments = [PROGRAM, "shell", "-o", "hydrate=no", bank.url]
    done = subprocess.run(
        arguments, input="select 1 +\n1;\nselect nonsense;\n.exit 3\n", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "2\n") and "nonsense" in done.stderr
    assert run("shell", "file:///nowhere", "select 1").status == 1


def test_a_failing_statement_fails_the_command(bank: Bank, run: Run) -> None:
    done = run("shell", bank.url, "select nonsense")
    assert done.status == 1 and "nonsense" in done.err


def test_the_shell_knows_our_pragmas_and_where_it_is(bank: Bank) -> None:
    with closing(lazyreplica.connect(bank.url)) as connection:
        shell: Any = ReplicaShell(stdin=io.StringIO("select 1;\n"), stdout=io.StringIO(), db=connection)
        line = "pragma litestream_t"
        offered = shell.complete_sql(line, "litestream_t", len("pragma "), len(line))
        assert offered == ["litestream_time", "litestream_time=", "litestream_txid", "litestream_txid="]
        assert shell._txid() == connection.pragma("litestream_txid").lstrip("0")


def test_bash_takes_the_script(run: Run, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash, "bash is needed"
    script = f'PATH={SCRIPTS}:$PATH; eval "$(lazyreplica completion bash)"; complete -p lazyreplica'
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "_python_argcomplete" in done.stdout, done.stderr
    assert "complete --command lazyreplica" in run("completion fish").out
    assert run("completion zsh").out.startswith("#compdef lazyreplica")
    assert run("completion tcsh").status == 2


@pytest.mark.parametrize("command", ["ltx", "timeline", "info", "verify --json", "ltx --json"])
def test_a_reader_that_has_left_is_no_error_message(bank: Bank, command: str) -> None:
    arguments = [PROGRAM, *command.split(), bank.url]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1


def test_ctrl_c_while_a_command_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build_parser", interrupted)
    assert cli.main(["info"]) == 130


def test_ctrl_c_while_a_replica_catches_up(bank: Bank, tmp_path: Path) -> None:
    other = build_social(tmp_path / "other.db", posts=100)
    before = set(tmp_path.iterdir())
    arguments = [PROGRAM, "verify", "--against", str(other), "--wait", "60", bank.url]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob("lazyreplica-compare-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert set(tmp_path.iterdir()) <= before | {tmp_path / "other.db-wal", tmp_path / "other.db-shm"}
