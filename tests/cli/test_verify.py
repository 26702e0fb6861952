"""``verify``: nothing that is wrong with a replica stays unseen, and nothing that is right is called wrong."""

from __future__ import annotations

import io
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from cli_helpers import Bank, Run
from hypothesis import given
from hypothesis import strategies as st

import lazyreplica
from lazyreplica.errors import EmptyReplica, LazyReplicaError, LegacyLayout
from lazyreplica.ltx import FLAG_NO_CHECKSUM, Compression, DatabaseChecksum, FileName, Header, decode_file, encode_file
from lazyreplica.storage import StoredFile, open_store
from lazyreplica.verify import FileChecked, ReplicaChecked, find_holes, newest_chain, verify
from support.bank import bank_writer, build_bank
from support.data import build_social
from support.litestream import replicating, restore

SIZE = 512


def page(pgno: int, version: int) -> bytes:
    return random.Random(f"{pgno} {version}").randbytes(SIZE)


def write(replica: Path, level: int, low: int, high: int, pages: list[int], commit: int, **fields: int) -> Path:
    """A file of those pages, in the version of its last transaction."""
    size = fields.pop("page_size", SIZE)
    header = Header(FLAG_NO_CHECKSUM, size, commit, low, high, 1_700_000_000_000 + high, **fields)
    data = encode_file(header, [(pgno, (page(pgno, high) * (size // SIZE))) for pgno in pages])
    path = replica / "ltx" / str(level) / str(FileName(low, high))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def replica(tmp_path: Path) -> Path:
    """1 (8 pages), 2 and 3 at level 0; 4-5 at level 1; a snapshot at 3."""
    path = tmp_path / "replica"
    write(path, 0, 1, 1, [*range(1, 9)], 8)
    write(path, 0, 2, 2, [1, 3], 8)
    write(path, 0, 3, 3, [1, 9, 10], 10)
    write(path, 1, 4, 5, [2, 9], 9)
    write(path, 9, 1, 3, [*range(1, 11)], 10)
    return path


def check(replica: Path) -> tuple[list[FileChecked], ReplicaChecked, bytes]:
    store = open_store(f"file://{replica}")
    with (replica.parent / "state.db").open("w+b", buffering=0) as state:
        *files, last = verify(store, state)
        state.seek(0)
        data = state.read()
    assert isinstance(last, ReplicaChecked)
    checked = [report for report in files if isinstance(report, FileChecked)]
    assert len(checked) == len(files)
    return checked, last, data


def kinds(replica: Path) -> set[str]:
    return {problem.kind for problem in check(replica)[1].problems}


def test_a_sound_replica(replica: Path) -> None:
    files, last, data = check(replica)
    assert len(files) == 5 and all(report.problem is None for report in files)
    assert (last.problems, last.files, last.vanished, last.rebuilt) == ((), 5, 0, True)
    assert last.size == sum(path.stat().st_size for path in replica.rglob("*.ltx"))
    assert [str(file) for file in last.chain] == [
        f"level 9 file {FileName(1, 3)}",
        f"level 1 file {FileName(4, 5)}",
    ]
    changed = {2: 5, 9: 5}
    assert data == b"".join(page(pgno, changed.get(pgno, 3)) for pgno in range(1, 10))


def test_files_and_bytes_are_counted_as_they_are_read(replica: Path) -> None:
    seen: list[tuple[int, int]] = []
    list(verify(open_store(f"file://{replica}"), progress=lambda done, total: seen.append((done, total))))
    size = sum(path.stat().st_size for path in replica.rglob("*.ltx"))
    assert seen[-1] == (size, size) and seen == sorted(seen)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "gap": lambda r: write(r, 0, 8, 8, [1], 9),
    "missing pages": lambda r: write(r, 0, 6, 6, [1], 12),
    "page size": lambda r: write(r, 0, 6, 6, [1], 9, page_size=1024),
    "contradiction": lambda r: write(r, 0, 5, 5, [1], 8),
    "overlap": lambda r: write(r, 1, 5, 6, [1], 9),
    "name": lambda r: (r / "ltx" / "0" / str(FileName(3, 3))).rename(r / "ltx" / "0" / str(FileName(6, 6))),
    "damaged": lambda r: os.truncate(r / "ltx" / "1" / str(FileName(4, 5)), 300),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_problem_is_found(replica: Path, kind: str) -> None:
    assert kinds(replica) == set()
    DAMAGE[kind](replica)
    assert kind in kinds(replica)


def test_a_whole_database_of_zero_pages_is_a_problem(replica: Path) -> None:
    write(replica, 0, 6, 6, [], 0)
    assert kinds(replica) == {"missing pages"}


def test_checksums_of_the_database_must_continue(tmp_path: Path) -> None:
    """Files with database checksums: the second begins with another database than the first left."""
    for wrong in (0, 1):
        path = tmp_path / f"replica{wrong}"
        (path / "ltx" / "0").mkdir(parents=True)
        one, two = page(1, 1), page(1, 2)
        before, after = DatabaseChecksum(), DatabaseChecksum()
        before.add(1, one)
        after.add(1, two)
        first = encode_file(Header(0, SIZE, 1, 1, 1, 0), [(1, one)])
        header = Header(0, SIZE, 1, 2, 2, 0, pre_apply_checksum=before.value ^ wrong)
        second = encode_file(header, [(1, two)], Compression.FRAME, post_apply_checksum=after.value)
        for txid, data in enumerate((first, second), 1):
            (path / "ltx" / "0" / str(FileName(txid, txid))).write_bytes(data)
        assert kinds(path) == ({"contradiction"} if wrong else set())


def test_no_flipped_bit_is_overlooked(replica: Path) -> None:
    """Pages here cannot be compressed, so that no bit of a frame is without meaning."""
    rng = random.Random(1)
    for path in sorted(replica.rglob("*.ltx")):
        whole = path.read_bytes()
        for bit in rng.sample(range(len(whole) * 8), 25):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            files, last, _ = check(replica)
            (bad,) = [report for report in files if report.problem]
            assert str(bad.file.name) == path.name and last.problems, f"bit {bit} of {path}"
        path.write_bytes(whole)
    assert kinds(replica) == set()


def test_a_damaged_file_outside_the_chain_leaves_the_newest_state(replica: Path) -> None:
    os.truncate(replica / "ltx" / "0" / str(FileName(2, 2)), 0)
    _, last, _ = check(replica)
    assert [problem.kind for problem in last.problems] == ["damaged"] and last.rebuilt
    os.truncate(replica / "ltx" / "1" / str(FileName(4, 5)), 200)
    assert not check(replica)[1].rebuilt


def test_leftovers_of_retention_are_no_gaps(replica: Path) -> None:
    for path in (replica / "ltx" / "0").iterdir():
        path.unlink()
    write(replica, 2, 1, 1, [*range(1, 9)], 8)  # older than the snapshot at 3, and nothing leads from it
    assert kinds(replica) == set()
    write(replica, 0, 5, 5, [2, 9], 9)  # 4 is gone from level 0, and still in level 1
    assert kinds(replica) == set()


def test_published_snapshots_need_nothing_between_them(replica: Path) -> None:
    shutil.rmtree(replica / "ltx" / "0")
    shutil.rmtree(replica / "ltx" / "1")
    write(replica, 9, 1, 40, [*range(1, 11)], 10)
    assert kinds(replica) == set()


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptyReplica, match="no LTX files"):
        list(verify(open_store(f"file://{tmp_path}/empty")))
    (tmp_path / "old" / "generations").mkdir(parents=True)
    with pytest.raises(LegacyLayout):
        list(verify(open_store(f"file://{tmp_path}/old")))


class Compacting:
    """A store in which a file is compacted between the listing and its reading."""

    def __init__(self, replica: Path) -> None:
        self.inner = open_store(f"file://{replica}")
        self.replica = replica
        self.listings = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def list_all(self, timeout: float) -> object:
        listing = self.inner.list_all(timeout)
        self.listings += 1
        if self.listings == 1:
            (self.replica / "ltx" / "1" / str(FileName(4, 5))).unlink()
            write(self.replica, 2, 4, 5, [2, 9], 9)
        return listing


def test_a_file_that_is_compacted_meanwhile_is_no_problem(replica: Path) -> None:
    state = io.BytesIO()
    store = Compacting(replica)
    *_, last = verify(store, state)  # type: ignore[arg-type]
    assert isinstance(last, ReplicaChecked)
    assert (last.problems, last.vanished, last.rebuilt, store.listings) == ((), 1, True, 2)
    assert len(state.getvalue()) == 9 * SIZE
    assert state.getvalue()[SIZE : 2 * SIZE] == page(2, 5)


@st.composite
def listings(draw: st.DrawFn) -> list[StoredFile]:
    spans = st.tuples(st.integers(0, 9), st.integers(1, 20), st.integers(0, 6))
    files = []
    for level, low, length in draw(st.lists(spans, min_size=1, max_size=12)):
        low = 1 if level == 9 else low
        files.append(StoredFile(level, FileName(low, low + length), 100, "", 0.0))
    return files


@given(listings())
def test_holes_are_the_transactions_that_nothing_covers(files: list[StoredFile]) -> None:
    """Against the definition: from the oldest snapshot on, what no file holds and no snapshot passes over."""
    snapshots = [file.name.max_txid for file in files if file.level == 9]
    start = min(snapshots, default=0)
    others = [file.name for file in files if file.level != 9 and file.name.max_txid > start]
    expected = set()
    for name in others:
        below = [s for s in [*snapshots, *(o.max_txid for o in others), start] if s < name.max_txid]
        reached = max([b for b in below if b < name.min_txid], default=0)
        covered = any(o.min_txid < name.min_txid <= o.max_txid + 1 for o in others)
        joined = name.min_txid <= start + 1 or covered or any(name.min_txid - 1 <= s < name.max_txid for s in snapshots)
        if not joined:
            expected |= set(range(max(reached, start) + 1, name.min_txid))
    found = {txid for hole in find_holes(files) for txid in range(hole.first, hole.last + 1)}
    assert found == expected


# -- the command --


@pytest.mark.slow
def test_the_real_writers_replica_is_sound(bank: Bank, run: Run) -> None:
    assert {0, 1, 2, 9} <= {int(path.parent.name) for path in bank.replica.rglob("*.ltx")}
    done = run("verify", "--json", "--against", bank.database, bank.url)
    assert (done.status, done.err) == (0, "")
    report = done.json
    assert report["sound"] and report["problems"] == [] and report["integrity_check"] == ["ok"]
    assert report["against"]["same"] and report["against"]["every_byte"]
    assert report["against"]["pages_compared"] == report["pages"]


@pytest.mark.slow
def test_the_state_is_what_litestream_restores(bank: Bank, tmp_path: Path) -> None:
    expected = restore(bank.replica, tmp_path / "restored.db").read_bytes()
    with (tmp_path / "state.db").open("x+b", buffering=0) as state:
        *_, last = verify(open_store(bank.url), state)
        state.seek(0)
        assert isinstance(last, ReplicaChecked) and last.rebuilt
        assert state.read() == expected


@pytest.mark.slow
def test_problems_are_shown_and_status_1(bank: Bank, run: Run, tmp_path: Path) -> None:
    replica = shutil.copytree(bank.replica, tmp_path / "replica")
    stored = newest_chain(open_store(f"file://{replica}").list_all(1).files)[-1]
    last = replica / "ltx" / str(stored.level) / str(stored.name)
    with last.open("r+b") as file:
        file.seek(-30, os.SEEK_END)
        file.write(b"\xff")
    done = run("verify", f"file://{replica}")
    assert done.status == 1 and "damaged" in done.out and last.name in done.out and "1 problem" in done.out
    report = run("verify", "--json", f"file://{replica}").json
    assert not report["sound"] and report["integrity_check"] is None
    (problem,) = report["problems"]
    assert (problem["kind"], problem["file"]) == ("damaged", {"level": stored.level, "name": last.name})


def test_a_database_that_sqlite_finds_damaged_is_a_problem(run: Run, tmp_path: Path) -> None:
    """Every file is sound, and what they hold is not."""
    database = build_social(tmp_path / "app.db", posts=200)
    data = database.read_bytes()
    pages = [(at // 4096 + 1, data[at : at + 4096]) for at in range(0, len(data), 4096)]
    pages[4], pages[5] = (5, pages[5][1]), (6, pages[4][1])
    path = tmp_path / "replica" / "ltx" / "9" / str(FileName(1, 1))
    path.parent.mkdir(parents=True)
    path.write_bytes(encode_file(Header(FLAG_NO_CHECKSUM, 4096, len(pages), 1, 1, 0), pages))
    done = run("verify", f"file://{tmp_path}/replica")
    assert done.status == 1 and "integrity" in done.out
    assert run("verify", "--no-integrity-check", f"file://{tmp_path}/replica").status == 0


@pytest.mark.slow
def test_against_another_database(bank: Bank, run: Run, tmp_path: Path) -> None:
    other = Path(shutil.copy(bank.database, tmp_path / "other.db"))
    shutil.copy(f"{bank.database}-wal", f"{other}-wal")
    with closing(sqlite3.connect(other)) as con, con:
        con.execute("UPDATE accounts SET owner = 'somebody else' WHERE id = 1000")
    done = run("verify", "--wait", "0", "--against", other, bank.url)
    assert done.status == 1 and "differ from the primary" in done.out
    report = run("verify", "--json", "--wait", "0", "--against", other, bank.url).json["against"]
    assert not report["same"] and report["differing_pages"] >= 1 and report["first_differing"]


def test_a_published_replica_is_compared_with_a_copy(run: Run, tmp_path: Path) -> None:
    for mode in ("wal", "delete"):
        database = build_social(tmp_path / f"{mode}.db", posts=200, journal_mode=mode)
        url = f"file://{tmp_path}/{mode}"
        lazyreplica.publish(database, url)
        with closing(sqlite3.connect(database)) as con:  # in use, and written to, without a change
            con.execute("BEGIN")
            con.execute("SELECT count(*) FROM posts").fetchone()
            done = run("verify", "--json", "--against", database, url)
        assert done.status == 0 and done.json["against"]["same"] and not done.json["against"]["every_byte"], mode
        with closing(sqlite3.connect(database)) as con, con:
            con.execute("DELETE FROM posts WHERE id = 100")
        done = run("verify", "--json", "--wait", "0.3", "--against", database, url)
        assert done.status == 1 and done.json["against"]["differing_pages"] > 0


@pytest.mark.slow
def test_a_busy_primary_is_compared_exactly_and_its_writers_go_on(tmp_path: Path, run: Run) -> None:
    """Vacuums, checkpoints, compaction and retention all the while: equal, to the byte, each time."""
    database = build_bank(tmp_path / "bank.db")
    replica = tmp_path / "replica"
    options = {"levels": ["1s", "3s"], "snapshot_interval": "4s", "l0_retention": "2s"}
    with (
        replicating(database, replica, **options) as litestream,
        bank_writer(database, rate=None, delete_every=0.5, vacuum_every=1.0) as writer,
    ):
        litestream.wait_synced()
        seen: list[str] = []
        enough = time.monotonic() + 6
        while len(seen) < 6 or time.monotonic() < enough:
            done = run("verify", "--json", "--against", database, f"file://{replica}")
            assert (done.status, done.json["against"]["lag"]) == (0, None), done.out
            assert done.json["against"]["every_byte"] and done.json["problems"] == []
            seen.append(done.json["against"]["txid"])
        stats = writer.stop()
    assert seen == sorted(seen) and len(set(seen)) > 3
    assert stats.transactions > 1000 and stats.vacuums > 1


@pytest.mark.slow
def test_a_page_that_only_the_replica_has_wrong_is_found_on_a_busy_primary(tmp_path: Path, run: Run) -> None:
    """A file holds a page that nobody writes any more with one bit changed, and right checksums."""
    database = build_bank(tmp_path / "bank.db")
    with closing(sqlite3.connect(database)) as con, con:
        con.execute("CREATE TABLE still(id INTEGER PRIMARY KEY, word TEXT)")
        con.execute("INSERT INTO still VALUES (1, 'unchanged')")
        ((victim,),) = con.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'still'")
    replica = tmp_path / "replica"
    with replicating(database, replica) as litestream:
        litestream.wait_synced()
        (first,) = (replica / "ltx" / "0").glob("*.ltx")
        whole = decode_file(first.read_bytes())
        pages = {pgno: whole.page(pgno) for pgno, _, _ in whole.index.frames(0, len(whole.index))}
        pages[victim] = pages[victim][:-1] + bytes([pages[victim][-1] ^ 1])
        first.write_bytes(encode_file(whole.header, sorted(pages.items())))
        with bank_writer(database, rate=200):
            done = run("verify", "--json", "--against", database, f"file://{replica}")
    report = done.json
    assert (done.status, report["problems"], report["integrity_check"]) == (1, [], ["ok"])
    assert report["against"]["first_differing"] == [victim] and report["against"]["lag"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["--wait", "soon"], ["--wait", "-1"], ["--against", "/nowhere.db"], ["--level", "0"]],
)
def test_a_command_line_that_makes_no_sense_is_status_2(bank: Bank, run: Run, arguments: list[str]) -> None:
    done = run("verify", *arguments, bank.url)
    assert (done.status, done.out) == (2, "") and done.err


@pytest.mark.slow
def test_what_is_no_database_is_a_clear_error(bank: Bank, run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database " * 1000)
    done = run("verify", "--against", tmp_path / "text", bank.url)
    assert done.status == 1 and done.err.startswith("error: ") and "cannot be read as a SQLite database" in done.err
    assert done.err.count("\n") == 1
    other = build_social(tmp_path / "other.db", posts=50, page_size=1024)
    assert "pages of 1024 bytes" in run("verify", "--against", other, bank.url).err
    assert issubclass(EmptyReplica, LazyReplicaError)


@pytest.mark.slow
def test_a_path_that_looks_like_markup_is_shown_as_it_is(bank: Bank, run: Run, tmp_path: Path) -> None:
    replica = shutil.copytree(bank.replica, tmp_path / "[red] app")
    for command in ("verify", "info"):
        assert "%5Bred%5D%20app" in run(command, f"file://{str(replica).replace(' ', '%20')}").out
    done = run("verify", "--against", bank.database, f"file://{str(replica).replace(' ', '%20')}")
    assert done.status == 0 and "equal to the primary" in done.out
