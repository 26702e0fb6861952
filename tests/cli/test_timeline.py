"""The drawing: what a user must be able to see in it, at any size, with and without colour."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
from cli_helpers import Bank, Run
from hypothesis import given
from hypothesis import strategies as st

from lazyreplica.cli.timeline import HEAVY, LIGHT, Clock, draw_level, make_axis
from lazyreplica.ltx import FLAG_NO_CHECKSUM, FileName, Header, encode_file
from lazyreplica.plan import plan
from lazyreplica.storage import StoredFile

BAR = 80 - 4 - 24


def stored(level: int, low: int, high: int, date: float | None = None) -> StoredFile:
    return StoredFile(level, FileName(low, high), 100, "", float(high) if date is None else date)


def rows(files: list[StoredFile], width: int, by: str = "txid") -> dict[int, str]:
    """What is drawn of each level that has files."""
    axis = make_axis(files, Clock({file: file.modified for file in files}), by, width)
    chain = frozenset(plan(files))
    drawn = {}
    for level in {file.level for file in files}:
        cells = draw_level([file for file in files if file.level == level], chain, axis, HEAVY, LIGHT)
        assert len(cells) == width
        assert all((sign in "━╸█◆") == used for sign, used in cells if sign != " ")
        drawn[level] = "".join(sign for sign, _ in cells)
    return drawn


def row(files: list[StoredFile], level: int, width: int, by: str = "txid") -> str:
    return rows(files, width, by)[level]


def write(replica: Path, *files: tuple[int, int, int]) -> str:
    for level, low, high in files:
        path = replica / "ltx" / str(level) / str(FileName(low, high))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_file(Header(FLAG_NO_CHECKSUM, 512, 1, low, high, 1000 * high), [(1, bytes(512))]))
        os.utime(path, (high, high))
    return f"file://{replica}"


def test_what_each_sign_means() -> None:
    files = [stored(9, 1, 4), stored(0, 1, 1), *(stored(0, n, n) for n in range(2, 9)), stored(1, 2, 4)]
    files += [stored(1, 5, 6)]
    assert row(files, 9, 8) == "   ◆    "
    assert row(files, 1, 16) == "  ─────╴━━━╸    "
    assert row(files, 0, 16) == "─◇─╴─╴─╴─╴─╴━╸━╸"
    assert row(files, 0, 8) == "◇╴╴╴╴╴╸╸"
    assert row(files, 0, 4) == "▒▒▒█"


def test_a_hole_is_a_blank_in_every_row() -> None:
    files = [stored(9, 1, 1), *(stored(0, n, n) for n in (2, 3, 4, 7, 8)), stored(9, 1, 6)]
    assert row(files, 0, 8) == " ╴╴╴  ╸╸"
    assert row(files, 9, 8) == "◇    ◆  "


def test_by_time_a_quiet_night_is_wide() -> None:
    files = [stored(9, 1, 1, 0.0), stored(0, 2, 2, 10.0), stored(0, 3, 3, 90.0), stored(0, 4, 4, 100.0)]
    assert row(files, 0, 10, "time") == "╸━━━━━━━╸╸"
    assert row(files, 9, 10, "time") == "◆         "


def test_of_one_file_and_of_one_moment() -> None:
    assert row([stored(0, 1, 1)], 0, 5) == "━━━━◆"
    assert row([stored(9, 1, 7)], 9, 5) == "    ◆"
    assert row([stored(9, 1, 7, 5.0), stored(0, 8, 8, 5.0)], 0, 3, "time") == "━━╸"
    assert row([stored(9, 1, 7, 0.0), stored(0, 8, 8, 5e-324)], 0, 3, "time") == "━━╸"


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    st.integers(2, 60),
    st.sampled_from(["txid", "time"]),
    st.data(),
)
def test_every_transaction_of_a_level_is_drawn(lengths: list[int], width: int, by: str, data: st.DataObject) -> None:
    """Files that follow one another leave no blank, the chain is heavy, and the newest state is at the right edge."""
    files, low = [], 1
    for length in lengths:
        files.append(stored(1, low, low + length - 1, data.draw(st.floats(0, 100))))
        low += length
    drawn = row(files, 1, width, by)
    assert " " not in drawn
    assert drawn[-1] in "╸█◆"


@pytest.mark.slow
def test_80_columns_no_colour_and_everything_in_it(bank: Bank, run: Run) -> None:
    done = run("timeline", bank.url)
    assert (done.status, done.err) == (0, "") and "\x1b" not in done.out
    drawing = done.out.splitlines()
    assert all(len(line) <= 80 for line in drawing[:-1])
    rows = {line[:3].strip(): line for line in drawing if re.match(r" \d ", line)}
    assert list(rows) == ["9", "2", "1", "0"]
    for level, line in rows.items():
        files = list((bank.replica / "ltx" / level).glob("*.ltx"))
        assert re.search(rf" {len(files)} +[\d.]+ [KM]?i?B$", line)
        assert set(line[4 : 4 + BAR]) <= set(" ━╸█◆─╴▒◇")
    chain = {str(file["level"]) for file in run("timeline", "--json", bank.url).json["chain"]}
    assert {level for level, line in rows.items() if set(line) & set("━╸█◆")} == chain
    report = run("info", "--json", bank.url).json
    assert f"TXID {report['txid']}: {report['newest_state']['files']} file" in done.out


@pytest.mark.slow
def test_the_chain_is_the_one_that_is_planned(bank: Bank, run: Run) -> None:
    newest = run("timeline", "--json", bank.url).json
    report = run("verify", "--json", "--no-integrity-check", bank.url).json
    assert [(f["level"], f"{f['min_txid']}-{f['max_txid']}.ltx") for f in newest["chain"]] == [
        (f["level"], f["name"]) for f in report["chain"]
    ]
    assert {level["level"]: len(level["files"]) for level in newest["levels"]} == {
        level: len(list((bank.replica / "ltx" / str(level)).glob("*.ltx"))) for level in (9, 2, 1, 0)
    }
    assert newest["holes"] == []


def test_a_txid_that_is_no_boundary(run: Run, tmp_path: Path) -> None:
    url = write(tmp_path / "replica", (9, 1, 1), (1, 2, 9), (0, 10, 10))
    assert run("timeline", "--txid", "9", "--json", url).json["txid"] == "0000000000000009"
    done = run("timeline", "--txid", "0000000000000005", url)
    assert done.status == 0 and "TXID 0000000000000005 cannot be had" in done.out
    assert "TXID 0000000000000001: 1 file," in done.out
    assert run("timeline", "--txid", "five", url).status == 2
    assert run("timeline", "--txid", "0", url).err.startswith("error: the replica has no LTX files at or below")


def test_missing_transactions_are_shown(run: Run, tmp_path: Path) -> None:
    url = write(tmp_path / "replica", (9, 1, 1), *((0, n, n) for n in (2, 3, 4, 8, 9, 10)))
    done = run("timeline", url)
    (line,) = [line for line in done.out.splitlines() if line.startswith(" !  ")]
    first, last = line.index("x"), line.rindex("x")
    assert 0.37 < (first - 4) / BAR < 0.45 and 0.65 < (last - 4) / BAR < 0.75 and line.endswith("missing")
    assert "0000000000000005 to 0000000000000007 are missing" in done.out
    assert "No state can be made of these files" in done.out and done.status == 0
    assert run("timeline", "--json", url).json["holes"] == [{"first": f"{5:016x}", "last": f"{7:016x}"}]


def test_times_come_from_the_store_or_from_the_headers(run: Run, tmp_path: Path) -> None:
    url = write(tmp_path / "replica", (9, 1, 86_400), (0, 86_401, 86_401))
    for path in (tmp_path / "replica").rglob("*.ltx"):
        os.utime(path, (0, 0))
    assert "1970-01-01 00:00:00" in run("timeline", url).out
    assert "1970-01-02 00:00:0" in run("timeline", "--by", "time", "--headers", url).out


@pytest.mark.slow
def test_100_000_files_are_drawn_in_buckets() -> None:
    files = [stored(9, 1, 1), stored(9, 1, 60_000), *(stored(0, n, n) for n in range(2, 100_001))]
    files += [stored(1, n, n + 29) for n in range(2, 99_000, 30)]
    started = time.monotonic()
    drawn = rows(files, BAR)
    assert time.monotonic() - started < 20
    assert drawn[0] == "▒" * (BAR - 1) + "█"
    assert re.fullmatch("▒{31}█{21}", drawn[1])
    assert drawn[9].count("◆") == 1


@pytest.mark.slow
def test_an_output_without_line_drawing_gets_plain_signs(bank: Bank, run: Run) -> None:
    """In a process of its own: the encoding of standard output is decided when it starts."""
    program = shutil.which("lazyreplica", path=sysconfig.get_path("scripts"))
    assert program
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    done = subprocess.run([program, "timeline", bank.url], capture_output=True, env=env, timeout=60, check=True)
    text = done.stdout.decode("ascii")
    assert "@" in text and "\\u" not in text


@pytest.mark.slow
def test_a_terminal_gets_colours(bank: Bank) -> None:
    program = shutil.which("lazyreplica", path=sysconfig.get_path("scripts"))
    assert program
    pid, master = pty.fork()
    if pid == 0:
        env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
        os.execve(program, [program, "timeline", bank.url], env)
    shown = b""
    while select.select([master], [], [], 20)[0]:
        try:
            data = os.read(master, 65536)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = shown.decode()
    assert re.search("\x1b\\[32m[━╸█]", text), "the chain is green"
    assert re.search("\x1b\\[2m[─╴▒]", text), "other files are dim"
