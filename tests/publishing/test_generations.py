"""Replicas of both writer generations: pages as LZ4 blocks (0.5.16 and later), as LZ4 frames (0.5.0-0.5.15), mixed."""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import lazyreplica
from lazyreplica import layers
from lazyreplica.ltx import Compression, Header, Trailer, crc64, decode_file, encode_file, encode_frame, encode_index
from support.data import build_social
from support.databases import assert_intact, assert_same_rows, file_digest
from support.litestream import Litestream, replicating, restore

Pages = list[tuple[int, bytes]]
Encode = Callable[[Header, Pages], bytes]


def changes(con: sqlite3.Connection, round_number: int) -> None:
    rng = random.Random(round_number)
    con.execute("UPDATE posts SET title = ? WHERE id % 17 = ?", (f"round {round_number}", round_number))
    con.execute("DELETE FROM likes WHERE id % 5 = ?", (round_number % 5,))
    con.execute(
        "INSERT INTO posts SELECT id + 100000 * ?, user_id, created, title, hex(randomblob(60)) FROM posts "
        "WHERE id < 200",
        (round_number + 1,),
    )
    con.execute("UPDATE users SET bio = ?", (rng.randbytes(3000),))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, litestream: Path) -> Path:
    """A replica of the real writer with files of several levels, and its database beside it."""
    directory = tmp_path_factory.mktemp("written")
    db = build_social(directory / "source.db", posts=1500, users=40, likes=500)
    with replicating(
        db, directory / "replica", levels=["1s", "2s"], snapshot_interval="3s", l0_retention="5m"
    ) as writer:
        with closing(sqlite3.connect(db, timeout=20)) as con:
            for round_number in range(6):
                with con:
                    changes(con, round_number)
                writer.wait_synced()
                if round_number == 3:
                    wait_for_levels(writer)
        with closing(sqlite3.connect(db, timeout=20, isolation_level=None)) as con:
            con.execute("VACUUM")
        writer.wait_synced()
    return directory


def wait_for_levels(writer: Litestream) -> None:
    deadline = time.monotonic() + 15
    while not {file.level for file in writer.ltx_files()} >= {0, 1, 9}:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def copy_of(written: Path, target: Path, encode: Callable[[int, Path], Encode | None]) -> str:
    """The replica with those of its files encoded anew that `encode` (file number, path) names an encoding for."""
    for number, path in enumerate(sorted((written / "replica").rglob("*.ltx"))):
        data = path.read_bytes()
        encoding = encode(number, path)
        if encoding is not None:
            decoded = decode_file(data)
            data = encoding(decoded.header, [(pgno, decoded.page(pgno)) for pgno in decoded.index.pgnos])
            again = decode_file(data)
            assert again.header == decoded.header and again.index.pgnos == decoded.index.pgnos
        copy = target / path.relative_to(written / "replica")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data)
    return f"file://{target}"


def frames(header: Header, pages: Pages) -> bytes:
    return encode_file(header, pages, Compression.FRAME)


def mixed_within(header: Header, pages: Pages) -> bytes:
    """A file whose frames take turns: each frame's flags say what it is."""
    out = bytearray(header.encode())
    checksum = crc64(bytes(out))
    entries = []
    for number, (pgno, page) in enumerate(pages):
        compression = Compression.FRAME if number % 3 == 1 else Compression.BLOCK
        frame = encode_frame(pgno, page, compression)
        checksum = crc64(page, crc64(frame[: 6 if compression is Compression.FRAME else 10], checksum))
        entries.append((pgno, len(out), len(frame)))
        out += frame
    end = bytes(6) + encode_index(entries)
    checksum = crc64(bytes(8), crc64(end, checksum)) | 1 << 63
    return bytes(out + end + Trailer(0, checksum).encode())


def assert_alike(url: str, source: Path, tmp_path: Path) -> None:
    """The real restore accepts it; what it gives is what we read and hydrate, and the source's rows."""
    out = restore(url, tmp_path / "out.db")
    with closing(sqlite3.connect(source)) as con:
        reader = lazyreplica.connect(url, hydrate=False, poll_interval=0)
        try:
            assert assert_same_rows(con, reader) > 1000
            assert_intact(reader)
        finally:
            reader.close()
        hydrating = lazyreplica.connect(url, hydrate=True, poll_interval=0)
        try:
            deadline = time.monotonic() + 20
            while float(hydrating.pragma("litestream_hydration_progress")) < 100:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            copy = Path(str(hydrating.pragma("litestream_hydration_file")))
            assert file_digest(copy) == file_digest(out)
            assert assert_same_rows(con, hydrating) > 1000
        finally:
            hydrating.close()


@pytest.fixture(params=["small files", "large files"])
def both_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are kept whole, or read by ranges."""
    if request.param == "large files":
        monkeypatch.setattr(layers, "KEEP_FILE", 1000)
        monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
        monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
        monkeypatch.setattr(layers, "_TAIL", 500)


@pytest.mark.slow
@pytest.mark.usefixtures("both_sizes")
def test_as_written(written: Path, tmp_path: Path) -> None:
    assert_alike(copy_of(written, tmp_path / "copy", lambda *_: None), written / "source.db", tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("both_sizes")
def test_all_files_of_the_old_generation(written: Path, tmp_path: Path) -> None:
    url = copy_of(written, tmp_path / "copy", lambda *_: frames)
    assert_alike(url, written / "source.db", tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("both_sizes")
@pytest.mark.parametrize("turn", [0, 1])
def test_files_of_both_generations_in_one_chain(written: Path, tmp_path: Path, turn: int) -> None:
    url = copy_of(written, tmp_path / "copy", lambda number, _: frames if number % 2 == turn else None)
    assert_alike(url, written / "source.db", tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("both_sizes")
def test_a_writer_that_was_upgraded(written: Path, tmp_path: Path) -> None:
    """The snapshot and the first files are old, the rest is new; and the other way round."""
    names = sorted(path.name for path in (written / "replica").rglob("*.ltx"))
    middle = names[len(names) // 2]
    for number, old in enumerate((lambda name: name < middle, lambda name: name >= middle)):
        url = copy_of(written, tmp_path / f"copy{number}", lambda _, path, old=old: frames if old(path.name) else None)
        directory = tmp_path / str(number)
        directory.mkdir()
        assert_alike(url, written / "source.db", directory)


@pytest.mark.slow
@pytest.mark.usefixtures("both_sizes")
def test_both_kinds_of_frames_in_one_file(written: Path, tmp_path: Path) -> None:
    url = copy_of(written, tmp_path / "copy", lambda *_: mixed_within)
    assert_alike(url, written / "source.db", tmp_path)


@pytest.mark.slow
def test_level_0_alone_of_the_old_generation(written: Path, tmp_path: Path) -> None:
    """As a replica looks before its first compaction."""
    target = tmp_path / "copy"
    copy_of(written, target, lambda *_: frames)
    for level in (target / "ltx").iterdir():
        if level.name != "0":
            for path in level.iterdir():
                path.unlink()
    assert_alike(f"file://{target}", written / "source.db", tmp_path)


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
@pytest.mark.parametrize("encoding", [frames, mixed_within])
def test_publications_of_every_kind(litestream: Path, tmp_path: Path, page_size: int, encoding: Encode) -> None:
    source = build_social(tmp_path / "source.db", posts=1000, page_size=page_size, users=20, likes=20)
    url = f"file://{tmp_path}/replica"
    lazyreplica.publish(source, url)
    (path,) = (tmp_path / "replica" / "ltx" / "9").iterdir()
    decoded = decode_file(path.read_bytes())
    path.write_bytes(encoding(decoded.header, [(pgno, decoded.page(pgno)) for pgno in decoded.index.pgnos]))
    assert_alike(url, source, tmp_path)


def test_following_from_one_generation_to_the_other(tmp_path: Path) -> None:
    """Under an open connection the writer is upgraded, and downgraded again."""
    source = tmp_path / "source.db"
    target = tmp_path / "replica" / "ltx" / "0"
    target.mkdir(parents=True)
    encodings: list[Encode] = [encode_file, frames, mixed_within, frames, encode_file]
    with closing(sqlite3.connect(source, isolation_level=None)) as con:
        con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, a TEXT)")
        con.executemany("INSERT INTO t(a) VALUES (?)", ((str(i) * 50,) for i in range(300)))
        before: dict[int, bytes] = {}
        connection = None
        try:
            for txid, encoding in enumerate(encodings, 1):
                con.execute("UPDATE t SET a = ? WHERE id % 100 = ?", (f"after {txid}", txid))
                data = source.read_bytes()
                pages = {at // 4096 + 1: data[at : at + 4096] for at in range(0, len(data), 4096)}
                changed = [(pgno, page) for pgno, page in pages.items() if before.get(pgno) != page]
                header = Header(2, 4096, len(pages), txid, txid, 0)
                (target / f"{txid:016x}-{txid:016x}.ltx").write_bytes(encoding(header, changed))
                before = pages
                if connection is None:
                    connection = lazyreplica.connect(f"file://{tmp_path}/replica", poll_interval=0)
                assert lazyreplica.refresh(connection) == f"{txid:016x}"
                assert_same_rows(con, connection)
        finally:
            if connection is not None:
                connection.close()
