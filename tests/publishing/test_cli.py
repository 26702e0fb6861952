"""The `lazyreplica` command as a shell sees it: exit status, two streams, signals, a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import sqlite3
import subprocess
import sysconfig
import time
from contextlib import closing
from pathlib import Path

import pytest

import lazyreplica
from support.data import build_social

PROGRAM = str(Path(sysconfig.get_path("scripts")) / "lazyreplica")
MANY = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 90000) SELECT i FROM n"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1e15) SELECT count(*) FROM n"

pytestmark = pytest.mark.slow  # a process a test


def environment(**more: str) -> dict[str, str]:
    """Buffered output, as users have it, and a terminal of a fixed kind."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "TERM": "xterm-256color", "COLUMNS": "100", **more}


def run(*arguments: str | bytes, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env=env or environment(),
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def fails(*arguments: str | bytes, status: int = 1, env: dict[str, str] | None = None) -> str:
    """The error text, which is on standard error, alone."""
    done = run(*arguments, env=env)
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.strip()
    if status == 1:
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "source.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as con:
        con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, word TEXT, data BLOB, real REAL)")
        con.execute("INSERT INTO t VALUES (1, 'grüße', x'00ff', 1.5), (2, NULL, NULL, NULL), (3, '', x'', 2.25)")
    return path


@pytest.fixture(scope="module")
def url(database: Path) -> str:
    target = f"file://{database.parent}/replica"
    lazyreplica.publish(database, target)
    return target


# -- query --


def test_rows_are_separated_by_tabs_where_nobody_looks(url: str) -> None:
    done = run("query", url, "SELECT * FROM t")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "id\tword\tdata\treal\n1\tgrüße\tx'00ff'\t1.5\n2\t\t\t\n3\t\tx''\t2.25\n"


def test_json(url: str) -> None:
    done = run("query", "--json", url, "SELECT id, word, data, real FROM t ORDER BY id DESC")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [
        {"id": 3, "word": "", "data": "", "real": 2.25},
        {"id": 2, "word": None, "data": None, "real": None},
        {"id": 1, "word": "grüße", "data": "00ff", "real": 1.5},
    ]


def test_no_rows(url: str) -> None:
    assert run("query", url, "SELECT id FROM t WHERE 0").stdout in ("", "id\n")
    assert json.loads(run("query", "--json", url, "SELECT id FROM t WHERE 0").stdout) == []
    assert run("query", url, "").returncode == 0


def test_json_is_json(url: str) -> None:
    """Infinity is not JSON; and a column must not vanish because another has its name."""
    done = run("query", "--json", url, "SELECT 9e999 AS big, 1 AS a, 2 AS b")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (row,) = json.loads(done.stdout, parse_constant=refuse)
    assert (row["a"], row["b"]) == (1, 2)


def test_json_keeps_columns_of_equal_names(url: str) -> None:
    done = run("query", "--json", url, "SELECT 1 AS a, 2 AS a")
    if done.returncode == 0:
        (row,) = json.loads(done.stdout)
        assert sorted(row.values()) == [1, 2]


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_several_statements_are_shown_or_refused(url: str, arguments: list[str]) -> None:
    done = run("query", *arguments, url, "SELECT 1 AS a; SELECT 2 AS b, 3 AS c")
    assert done.returncode in (0, 1, 2)


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_text_that_is_not_utf8_is_shown_or_refused(url: str, arguments: list[str]) -> None:
    done = run("query", *arguments, url, "SELECT CAST(x'41ff42' AS TEXT) AS t")
    assert done.returncode in (0, 1)
    assert done.returncode == 0 or done.stderr.startswith("error: ")


def test_sql_that_is_not_utf8_is_an_error(url: str) -> None:
    fails("query", url, b"SELECT '\xff'")


def test_an_output_that_cannot_show_a_character_is_no_traceback(url: str) -> None:
    done = run("query", url, "SELECT word FROM t", env=environment(PYTHONIOENCODING="ascii"))
    assert done.returncode in (0, 1)


def test_options_reach_the_replica(url: str, tmp_path: Path) -> None:
    path = tmp_path / "copy.db"
    done = run(
        "query", "-o", f"hydration_path={path}", "--option", "hydrate=1", url, "PRAGMA litestream_hydration_file"
    )
    assert str(path) in done.stdout
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["copy.db", "copy.db.d"], "it is kept"
    done = run("query", "-o", "hydrate=false", url, "PRAGMA litestream_hydration_file")
    assert done.stdout.strip() in ("", "litestream_hydration_file")


def test_errors(url: str, tmp_path: Path) -> None:
    assert "no such table" in fails("query", url, "SELECT * FROM nowhere")
    assert "syntax error" in fails("query", url, "SELEC 1")
    assert "bindings" in fails("query", url, "SELECT ?")
    assert "readonly" in fails("query", url, "INSERT INTO t VALUES (9, 9, 9, 9)")
    assert "does not exist" in fails("query", f"file://{tmp_path}/nowhere", "SELECT 1")
    assert "not a replica's URL" in fails("query", "app.db", "SELECT 1")
    assert "cache_size" in fails("query", "-o", "cache_size=lots", url, "SELECT 1")


@pytest.mark.parametrize("option", ["colour=red", "url=x", "=x"])
def test_an_unknown_option_is_an_error(url: str, option: str) -> None:
    text = fails("query", "-o", option, url, "SELECT 1", status=2)
    assert repr(option) in text and "poll_interval" in text


def test_a_url_that_no_parser_takes_is_an_error() -> None:
    fails("query", "s3://[bucket/app", "SELECT 1")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["query"],
        ["query", "file:///x"],
        ["query", "file:///x", "select 1", "more"],
        ["query", "-o", "poll_interval", "file:///x", "select 1"],
        ["query", "--nonsense", "file:///x", "select 1"],
        ["publish"],
        ["publish", "app.db"],
        ["publish", "app.db", "file:///x", "more"],
    ],
)
def test_a_command_line_that_makes_no_sense_is_status_2(arguments: list[str]) -> None:
    fails(*arguments, status=2)


def test_version_and_help() -> None:
    assert run("--version").stdout == f"lazyreplica {lazyreplica.__version__}\n"
    assert all(word in run("--help").stdout for word in ("query", "publish"))


# -- streams and signals --


@pytest.mark.parametrize("sql", ["SELECT 1", MANY])
def test_a_reader_that_has_left_is_no_error_message(url: str, sql: str) -> None:
    with subprocess.Popen(
        [PROGRAM, "query", url, sql], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) in (0, 1, 141, -signal.SIGPIPE)


def test_head(url: str) -> None:
    line = f"{shlex.quote(PROGRAM)} query {shlex.quote(url)} {shlex.quote(MANY)} | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60, check=False, env=environment())
    assert (done.stdout, done.stderr) == ("i\n", "")


@pytest.mark.parametrize("hydrate", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_ctrl_c_ends_a_long_query(url: str, hydrate: str) -> None:
    with subprocess.Popen(
        [PROGRAM, "query", "-o", f"hydrate={hydrate}", url, ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        time.sleep(2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail("still running after Ctrl-C")
    assert process.returncode == 130
    assert time.monotonic() - started < 10
    assert "Traceback" not in err and out == ""


def on_a_terminal(*arguments: str, timeout: float = 30) -> tuple[int, str]:
    """Exit status, and all that a terminal was sent."""
    pid, master = pty.fork()
    if pid == 0:
        os.execve(PROGRAM, [PROGRAM, *arguments], environment())
    shown = b""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not select.select([master], [], [], 0.2)[0]:
            continue
        try:
            data = os.read(master, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not data:
            break
        shown += data
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(master)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, shown.decode()


def test_a_terminal_gets_a_table(url: str) -> None:
    status, shown = on_a_terminal("query", url, "SELECT id, word FROM t")
    assert status == 0
    assert "grüße" in shown and "┃" in shown and "\t" not in shown


def test_markup_in_rows_is_shown_as_it_is(url: str) -> None:
    status, shown = on_a_terminal("query", url, "SELECT '[bold]x[/bold] [/nonsense] :smile:' AS '[red]c[/red]'")
    assert status == 0
    assert "[bold]x[/bold] [/nonsense] :smile:" in shown and "[red]c[/red]" in shown


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("larger")
    source = build_social(directory / "source.db", posts=4000)
    url = f"file://{directory}/replica"
    lazyreplica.publish(source, url)
    return source, url


def test_a_terminal_shows_progress_and_a_pipe_does_not(larger: tuple[Path, str], tmp_path: Path) -> None:
    source, url = larger
    slow = "SELECT count(*) FROM posts a, posts b WHERE a.id < 1000"
    status, shown = on_a_terminal("query", url, slow)
    assert status == 0 and "hydrating" in shown and "%" in shown and "3996000" in shown
    done = run("query", url, slow)
    assert (done.stdout.split(), done.stderr) == (["count(*)", "3996000"], "")
    status, shown = on_a_terminal("publish", str(source), f"file://{tmp_path}/one")
    assert status == 0 and "publishing" in shown and "%" in shown and "published TXID" in shown
    done = run("publish", str(source), f"file://{tmp_path}/two")
    assert "publishing" not in done.stdout and done.stderr == ""


# -- publish --


def test_publish(database: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/replica"
    done = run("publish", str(database), url)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"published TXID 0000000000000001: \d+ pages, \d+ bytes\n", done.stdout)
    done = run("publish", str(database), url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("unchanged since TXID 0000000000000001")
    assert run("query", url, "SELECT count(*) AS n FROM t").stdout == "n\n3\n"


def test_errors_of_publish(database: Path, tmp_path: Path) -> None:
    target = f"file://{tmp_path}/replica"
    (tmp_path / "text").write_text("hello, I am no database")
    assert "not a file" in fails("publish", str(tmp_path / "nowhere.db"), target)
    assert "not a file" in fails("publish", str(tmp_path), target)
    assert "not a readable SQLite database" in fails("publish", str(tmp_path / "text"), target)
    assert "scheme" in fails("publish", str(database), "replica")
    (tmp_path / "taken" / "generations").mkdir(parents=True)
    assert "empty path" in fails("publish", str(database), f"file://{tmp_path}/taken")


@pytest.mark.parametrize("below", ["text", "text/below"])
def test_publish_to_what_cannot_be_a_directory_is_an_error(database: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "text").write_text("hello")
    assert below in fails("publish", str(database), f"file://{tmp_path}/{below}")


def test_without_rich_the_command_says_what_to_install(url: str, tmp_path: Path) -> None:
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ImportError('hidden')")
    text = fails("query", url, "SELECT 1", env=environment(PYTHONPATH=str(tmp_path)))
    assert "pip install 'lazyreplica[cli]'" in text


def test_verbose_shows_what_the_library_logs(url: str) -> None:
    done = run("-v", "query", url, "SELECT 1")
    assert done.returncode == 0 and "lazyreplica.replica" in done.stderr
