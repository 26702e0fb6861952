"""Files that are good one by one, and do not add up to a database; and files that announce the absurd."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import apsw
import pytest
from handmade import (
    AT_OPEN,
    AT_OPEN_OR_QUERY,
    SECONDS,
    STILL,
    History,
    failure,
    ltx,
    opened,
    pages_of,
    put,
    read,
    right_or_failure,
)

import lazyreplica
from lazyreplica import layers
from lazyreplica.errors import (
    BucketNotFound,
    EmptyReplica,
    LegacyLayout,
    LTXError,
    ReplicaDamaged,
    ReplicaGap,
    StoreError,
)
from lazyreplica.ltx import decode_file, encode_index
from support.servers import S3Server


def test_a_path_without_files_is_an_error_that_names_it(replica: Path) -> None:
    replica.mkdir()
    message = failure(f"file://{replica}", EmptyReplica)
    assert str(replica) in message and "no LTX files" in message and "check the path" in message


def test_a_path_with_other_things_says_what_is_there(replica: Path) -> None:
    (replica / "0000").mkdir(parents=True)
    (replica / "letters").mkdir()
    (replica / "readme.txt").write_text("hello")
    (replica / "ltx" / "0").mkdir(parents=True)
    (replica / "ltx" / "0" / "notes.ltx").write_text("not a name of ours")
    (replica / "ltx" / "0" / f"{2:016X}-{10:016X}.ltx").write_text("upper case")
    message = failure(f"file://{replica}", EmptyReplica)
    assert "readme.txt" in message and "letters" in message


def test_files_with_other_names_do_not_disturb(replica: Path, history: History) -> None:
    url = history.write(replica)
    (replica / "ltx" / "0" / "notes.ltx").write_text("hello")
    (replica / "ltx" / "0" / f"{10:016X}-{10:016X}.ltx").write_text("upper case")
    (replica / "ltx" / "0" / f".{4:016x}-{4:016x}.ltx.tmp").write_bytes(history.files[0])
    (replica / "ltx" / "0" / f"{4:016x}-{4:016x}.ltx").mkdir()
    (replica / "ltx" / "12").mkdir()
    (replica / "readme.txt").write_text("hello")
    assert read(url) == history.rows[2]


def test_a_directory_that_does_not_exist_is_an_error_that_names_it(replica: Path) -> None:
    message = failure(f"file://{replica}", BucketNotFound)
    assert str(replica) in message and "does not exist" in message


def test_a_file_in_place_of_the_directory_is_an_error(replica: Path) -> None:
    replica.write_text("hello")
    assert str(replica) in failure(f"file://{replica}", StoreError)


def test_a_litestream_03_backup_is_an_error_that_says_so(replica: Path) -> None:
    (replica / "generations" / "0123456789abcdef" / "snapshots").mkdir(parents=True)
    (replica / "generations" / "0123456789abcdef" / "snapshots" / "00000000.snapshot.lz4").write_bytes(b"x")
    message = failure(f"file://{replica}", LegacyLayout)
    assert "0.3" in message and "generations" in message and "litestream restore" in message


def test_a_litestream_03_backup_on_s3_is_an_error_that_says_so(
    rclone: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)
    bucket = rclone.new_bucket()
    key = "app/generations/0123456789abcdef/snapshots/00000000.snapshot.lz4"
    rclone.client().put_object(Bucket=bucket, Key=key, Body=b"x")
    assert "0.3" in failure(rclone.url(bucket, "app"), LegacyLayout)
    assert "found there: app" in failure(rclone.url(bucket), EmptyReplica)


def test_a_leftover_03_backup_beside_new_files_does_not_disturb(replica: Path, history: History) -> None:
    (replica / "generations").mkdir(parents=True)
    assert read(history.write(replica)) == history.rows[2]


@pytest.mark.parametrize("missing", [2, 3])
def test_a_missing_transaction_is_an_error_that_names_it(replica: Path, history: History, missing: int) -> None:
    url = history.write(replica)
    put(replica, 0, 4, 4, ltx({1: bytes(4096)}, 16, 4, 4))
    (replica / "ltx" / "0" / f"{missing:016x}-{missing:016x}.ltx").unlink()
    message = failure(url, ReplicaGap)
    assert f"{missing:016x}" in message and f"{missing + 1:016x}" in message and str(replica) in message


def test_a_chain_without_its_snapshot_is_an_error_that_says_where_it_starts(replica: Path, history: History) -> None:
    url = history.write(replica, 2, 3)
    message = failure(url, ReplicaGap)
    assert "snapshot" in message and f"{2:016x}" in message


def test_a_gap_that_another_level_covers_is_none(replica: Path, history: History, tmp_path: Path) -> None:
    url = history.write(replica, 1, 3)
    put(replica, 1, 2, 2, history.files[1])
    assert read(url) == history.rows[2]


def test_a_gap_ahead_of_an_open_connection_leaves_it_where_it_is(replica: Path, history: History) -> None:
    url = history.write(replica, 1)
    with opened(url, **STILL) as connection:
        history.write(replica, 3)
        with pytest.raises(ReplicaGap, match=f"{2:016x}"):
            lazyreplica.refresh(connection)
        assert connection.execute("SELECT * FROM t ORDER BY id").fetchall() == history.rows[0]
        history.write(replica, 2)
        assert lazyreplica.refresh(connection) == f"{3:016x}"
        assert connection.execute("SELECT * FROM t ORDER BY id").fetchall() == history.rows[2]


def test_mixed_page_sizes_are_an_error_that_names_both(replica: Path, history: History, fine_history: History) -> None:
    url = history.write(replica, 1, 3)
    put(replica, 0, 2, 2, fine_history.files[1])
    message = failure(url, ReplicaDamaged)
    assert "4096" in message and "512" in message and f"{2:016x}-{2:016x}.ltx" in message


def test_another_page_size_under_an_open_connection_changes_no_row(
    replica: Path, history: History, fine_history: History
) -> None:
    url = history.write(replica, 1)
    with opened(url, **STILL) as connection:
        put(replica, 0, 2, 2, fine_history.files[1])
        with pytest.raises(ReplicaDamaged, match="page size"):
            lazyreplica.refresh(connection)
        assert connection.execute("SELECT * FROM t ORDER BY id").fetchall() == history.rows[0]


@pytest.mark.parametrize("hydrate", [False, True])
def test_a_page_that_no_file_holds_is_an_error_that_names_it(
    replica: Path, history: History, hydrate: bool, caplog: pytest.LogCaptureFixture
) -> None:
    url = history.write(replica)
    first, last = decode_file(history.files[0]), decode_file(history.files[2]).header.commit
    put(replica, 0, 4, 4, ltx({1: first.page(1)}, last + 1, 4, 4))
    with opened(url, poll_interval=0, hydrate=hydrate) as connection:
        with pytest.raises(ReplicaDamaged) as caught:
            connection.execute("PRAGMA integrity_check").fetchall()
            # SQLite never looks at pages that it thinks are unused: a backup does
            connection_copy(connection)
        assert isinstance(caught.value, apsw.IOError)
        assert caught.value.extendedresult == apsw.SQLITE_IOERR_CORRUPTFS
        assert f"page {last + 1} of {last + 1}" in str(caught.value) and "in no file" in str(caught.value)
        if hydrate:
            deadline = time.monotonic() + SECONDS
            while not [record for record in caplog.records if record.levelno == logging.ERROR]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert float(connection.pragma("litestream_hydration_progress")) < 100


def connection_copy(connection: apsw.Connection) -> None:
    with apsw.Connection("file::memory:?vfs=unix", flags=apsw.SQLITE_OPEN_URI | 6) as target:
        with target.backup("main", connection, "main") as backup:
            backup.step(-1)
        target.close()


def test_pages_beyond_the_end_of_the_database_do_not_come_back(replica: Path, tmp_path: Path) -> None:
    """A file shrinks the database; older files still hold the pages beyond."""
    path = tmp_path / "shrinks.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as con:
        con.execute("PRAGMA page_size = 4096")
        con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, data BLOB)")
        con.execute("BEGIN")
        con.executemany("INSERT INTO t VALUES (?, zeroblob(3000))", ((i,) for i in range(50)))
        con.execute("COMMIT")
        before = pages_of(path)
        con.execute("DELETE FROM t WHERE id > 3")
        con.execute("VACUUM")
        after = pages_of(path)
    put(replica, 0, 1, 1, ltx(before, len(before), 1, 1))
    put(replica, 0, 2, 2, ltx({n: p for n, p in after.items() if p != before[n]}, len(after), 2, 2))
    with opened(f"file://{replica}", **STILL) as connection:
        assert connection.execute("PRAGMA page_count").get == len(after) < len(before)
        assert connection.execute("PRAGMA integrity_check").get == "ok"


@pytest.mark.parametrize("level", [0, 9])
def test_a_database_of_no_pages_is_an_error(replica: Path, level: int) -> None:
    """`litestream restore` refuses a commit of 0 too; an empty database in its place would be a wrong answer."""
    put(replica, level, 1, 1, ltx({}, 0, 1, 1))
    message = failure(f"file://{replica}", ReplicaDamaged)
    assert f"{1:016x}-{1:016x}.ltx" in message


def test_a_chain_that_ends_without_pages_is_an_error(replica: Path, history: History) -> None:
    url = history.write(replica)
    put(replica, 0, 4, 4, ltx({}, 0, 4, 4))
    message = failure(url, ReplicaDamaged)
    assert f"{4:016x}-{4:016x}.ltx" in message


# -- the absurd --


def with_index(data: bytes, entries: list[tuple[int, int, int]]) -> bytes:
    """The file with another index; its checksum is no longer right, which readers of ranges cannot see."""
    end = decode_file(data).index.offsets[-1] + 6
    return data[:end] + encode_index(entries) + data[-16:]


def entries_of(data: bytes) -> list[tuple[int, int, int]]:
    index = decode_file(data).index
    return list(index.frames(0, len(index)))


@pytest.fixture(params=["small", "large"])
def any_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether files are treated as large ones are: an index is read when a page is needed."""
    if request.param == "large":
        monkeypatch.setattr(layers, "KEEP_FILE", 100)
        monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
        monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
        monkeypatch.setattr(layers, "_TAIL", 200)
    return bool(request.param == "large")


def refused_snapshot(replica: Path, history: History, damaged: bytes, large: bool) -> None:
    """The snapshot 1-1 with a damaged index is an error that names it, as soon as a page of it is needed."""
    url = history.write(replica, 1)
    path = put(replica, 0, 1, 1, damaged)
    message = failure(url, LTXError, AT_OPEN_OR_QUERY if large else AT_OPEN)
    assert path.name in message and str(replica) in message
    # ... and of a chain, in which newer files hold some of the pages, or all that are asked for
    history.write(replica, 2, 3)
    message = right_or_failure(url, history.rows[2], LTXError)
    assert path.name in message or (large and not message)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("length", [0, 1, 7, 1 << 20, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_an_index_of_absurd_length_is_an_error(replica: Path, history: History, length: int) -> None:
    url = history.write(replica)
    data = history.files[0]
    path = put(replica, 0, 1, 1, data[:-24] + length.to_bytes(8, "big") + data[-16:])
    assert path.name in failure(url, LTXError)


@pytest.mark.parametrize("offset", [0, 1, 99, 101, 1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
@pytest.mark.parametrize("place", [0, 3, -1])
def test_an_index_that_points_outside_is_an_error(
    replica: Path, history: History, any_size: bool, offset: int, place: int
) -> None:
    def damaged(data: bytes) -> bytes:
        entries = entries_of(data)
        pgno, _, size = entries[place]
        entries[place] = (pgno, offset, size)
        return with_index(data, entries)

    refused_snapshot(replica, history, damaged(history.files[0]), any_size)
    url = history.write(replica)
    path = put(replica, 0, 3, 3, damaged(history.files[2]))
    assert path.name in failure(url, LTXError)


@pytest.mark.parametrize("size", [0, 1, 6, 9, 100_000, 1 << 31, 1 << 62])
def test_a_frame_of_absurd_size_is_an_error(replica: Path, history: History, any_size: bool, size: int) -> None:
    entries = entries_of(history.files[0])
    entries[-1] = (*entries[-1][:2], size)
    refused_snapshot(replica, history, with_index(history.files[0], entries), any_size)


@pytest.mark.parametrize("pgno", [0, 1, 17, 262145, (1 << 32) - 1, 1 << 32, 1 << 62])
def test_an_index_of_absurd_page_numbers_is_an_error(
    replica: Path, history: History, any_size: bool, pgno: int
) -> None:
    entries = entries_of(history.files[0])
    entries[-1] = (pgno, *entries[-1][1:])
    refused_snapshot(replica, history, with_index(history.files[0], entries), any_size)


@pytest.mark.parametrize("hydrate", [False, True, None])
def test_a_snapshot_that_announces_a_huge_database_is_an_error(
    replica: Path, history: History, monkeypatch: pytest.MonkeyPatch, hydrate: bool | None
) -> None:
    url = history.write(replica, 1)
    data = history.files[0]
    for commit in (17, 1 << 20, (1 << 32) - 1):
        path = put(replica, 0, 1, 1, data[:12] + commit.to_bytes(4, "big") + data[16:])
        for keep in (100, 256 << 10):
            monkeypatch.setattr(layers, "KEEP_FILE", keep)
            monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
            monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
            theirs = AT_OPEN_OR_QUERY if keep == 100 else AT_OPEN
            assert path.name in failure(url, LTXError, theirs, hydrate=hydrate)


_CHILD = """
import json, logging, resource, sys, time
import lazyreplica
from support.memory import peak_resident
from lazyreplica.errors import LazyReplicaError

logging.basicConfig(level=logging.WARNING)
limit = 3 << 29  # so that a mistake does not take the machine with it
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

url, late, target = sys.argv[1:]
before = peak_resident()
started = time.monotonic()
outcome = "ok"
connection = None
try:
    connection = lazyreplica.connect(url, hydrate=True, poll_interval=0)
    deadline = time.monotonic() + 1
    while float(connection.pragma("litestream_hydration_progress")) < 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    if late:
        with open(target, "wb") as file, open(late, "rb") as source:
            file.write(source.read())
        lazyreplica.refresh(connection)
        time.sleep(0.5)
    connection.execute("SELECT count(*) FROM t").fetchall()
except LazyReplicaError as exc:
    outcome = type(exc).__name__
if connection is not None:
    connection.close()
print(json.dumps({"outcome": outcome, "grown": peak_resident() - before, "seconds": time.monotonic() - started}))
"""


def huge(history: History, pgno: int, txid: int = 4) -> bytes:
    """An increment of one page of a database that has grown to `pgno` pages, the others being in no file."""
    page = decode_file(history.files[0]).page(1)
    return ltx({1: page, pgno: bytes(len(page))}, pgno, txid, txid)


def run_child(url: str, late: Path | str = "", target: Path | str = "") -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, url, str(late), str(target)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
@pytest.mark.parametrize("pgno", [1 << 27, 0xFFFFFFFE])
def test_a_file_that_arrives_and_announces_a_huge_database_takes_no_memory(
    replica: Path, tmp_path: Path, fine_history: History, pgno: int
) -> None:
    url = fine_history.write(replica)
    late = tmp_path / "late"
    late.write_bytes(huge(fine_history, pgno))
    answer = run_child(url, late, replica / "ltx" / "0" / f"{4:016x}-{4:016x}.ltx")
    assert isinstance(answer["grown"], int) and answer["grown"] < 200 << 20
    assert isinstance(answer["seconds"], float) and answer["seconds"] < SECONDS


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
def test_a_chain_that_announces_a_huge_database_takes_no_memory(
    replica: Path, tmp_path: Path, fine_history: History
) -> None:
    url = fine_history.write(replica)
    # 2**26 pages of 512 bytes: 32 GiB, which may be less than the free space, so it is hydrated when asked for
    put(replica, 0, 4, 4, huge(fine_history, 1 << 26))
    answer = run_child(url)
    assert isinstance(answer["grown"], int) and answer["grown"] < 200 << 20


def test_headers_of_absurd_values_are_errors(replica: Path, history: History) -> None:
    url = history.write(replica)
    data = history.files[1]
    for start, size, value in [
        (8, 4, 0),
        (8, 4, 513),
        (8, 4, 1 << 31),
        (8, 4, 131072),
        (16, 8, 0),
        (24, 8, 1),
        (24, 8, (1 << 64) - 1),
        (48, 8, 1 << 63),
        (56, 8, 5),
        (4, 4, 0xFFFFFFFF),
    ]:
        path = put(replica, 0, 2, 2, data[:start] + value.to_bytes(size, "big") + data[start + size :])
        assert path.name in failure(url, LTXError)
