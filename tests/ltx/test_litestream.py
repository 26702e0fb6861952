"""Against the real thing: what `litestream` writes we read, and what we write it restores."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from lazyreplica.ltx import (
    FLAG_NO_CHECKSUM,
    Compression,
    FileName,
    Header,
    StreamDecoder,
    decode_file,
    encode_file,
)

CONFIG = """
snapshot: {{interval: 2s, retention: 24h}}
levels: [{{interval: 500ms}}, {{interval: 1s}}]
dbs:
  - path: {database}
    replica: {{type: file, path: {replica}, sync-interval: 100ms}}
"""


def environment() -> dict[str, str]:
    # A bundle set for other tools makes litestream fail at its start.
    return {name: value for name, value in os.environ.items() if name != "AWS_CA_BUNDLE"}


@contextmanager
def replicating(litestream: Path, database: Path, replica: Path) -> Iterator[None]:
    config = database.with_suffix(".yml")
    config.write_text(CONFIG.format(database=database, replica=replica))
    with database.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [litestream, "replicate", "-config", config], stdout=log, stderr=log, env=environment()
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(20)


def restore(litestream: Path, replica: Path, output: Path) -> bytes:
    done = subprocess.run(
        [litestream, "restore", "-o", output, f"file://{replica}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output.read_bytes()


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "litestream did not get there"
        time.sleep(0.05)


def apply(files: list[Path]) -> bytes:
    """The database that the files make, one after the other."""
    pages: dict[int, bytes] = {}
    for path in files:
        file = decode_file(path.read_bytes())
        pages.update((pgno, file.page(pgno)) for pgno in file.index.pgnos)
        header = file.header
    return b"".join(pages[pgno] for pgno in range(1, header.commit + 1))


def level(replica: Path, number: int) -> list[Path]:
    return sorted((replica / "ltx" / str(number)).glob("*.ltx"))


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_files_of_the_real_writer(litestream: Path, tmp_path: Path, page_size: int) -> None:
    database, replica = tmp_path / "app.db", tmp_path / "replica"
    chance = random.Random(page_size)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(f"PRAGMA page_size = {page_size}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, body)")
        with replicating(litestream, database, replica):
            wait_for(lambda: len(level(replica, 0)) >= 1)
            for _ in range(8):
                body = chance.randbytes(600) + b"compressible " * chance.randrange(300)
                connection.executemany("INSERT INTO t (body) VALUES (?)", [(body,)] * 30)
                connection.execute("DELETE FROM t WHERE id % 7 = ?", (chance.randrange(7),))
                connection.commit()
                time.sleep(0.4)
            wait_for(lambda: all(level(replica, number) for number in (0, 1, 2)) and len(level(replica, 9)) >= 2)
    restored = restore(litestream, replica, tmp_path / "out.db")
    files = sorted((replica / "ltx").glob("*/*.ltx"))
    assert len(files) > 8
    for path in files:
        data = path.read_bytes()
        file = decode_file(data)  # compares the file checksum
        assert file.header.name == FileName.parse(path.name)
        assert file.header.page_size == page_size
        decoder = StreamDecoder()
        assert list(decoder.feed(data)) == [(n, file.page(n)) for n in file.index.pgnos]
        assert decoder.close() == (file.header, file.index, file.trailer)
        # Another LZ4 encoder finds other matches: the compressed bytes, and so the index, may differ.
        again = decode_file(encode_file(file.header, ((n, file.page(n)) for n in file.index.pgnos)))
        assert again.header == file.header
        assert again.index.pgnos == file.index.pgnos
    assert apply(level(replica, 0)) == restored
    snapshot = level(replica, 9)[-1]
    assert apply([snapshot, *(f for f in level(replica, 0) if f.name[:16] > snapshot.name[17:33])]) == restored


def database_pages(page_size: int, rows: int) -> dict[int, bytes]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(f"PRAGMA page_size = {page_size}")
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, body)")
        body = random.Random(1).randbytes(400) + bytes(400)
        connection.executemany("INSERT INTO t (body) VALUES (?)", [(body,)] * rows)
        connection.commit()
        image = connection.serialize()
    return {start // page_size + 1: image[start : start + page_size] for start in range(0, len(image), page_size)}


def write(replica: Path, number: int, data: bytes) -> None:
    folder = replica / "ltx" / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(Header.parse(data).name)).write_bytes(data)


@pytest.mark.parametrize("page_size", [512, 1024, 4096, 32768, 65536])
@pytest.mark.parametrize("compression", Compression)
def test_snapshot_of_ours_restores(litestream: Path, tmp_path: Path, page_size: int, compression: Compression) -> None:
    pages = database_pages(page_size, 200)
    header = Header(FLAG_NO_CHECKSUM, page_size, len(pages), 1, 1, 0)
    write(tmp_path, 9, encode_file(header, pages.items(), compression))
    assert restore(litestream, tmp_path, tmp_path / "out.db") == b"".join(pages.values())


@pytest.mark.parametrize("first", Compression)
@pytest.mark.parametrize("page_size", [512, 4096])
def test_chain_of_ours_restores(litestream: Path, tmp_path: Path, page_size: int, first: Compression) -> None:
    """A snapshot, then increments that grow, change nothing, and shrink; compressions alternate."""
    second = next(other for other in Compression if other is not first)
    pages = database_pages(page_size, 100)
    write(
        tmp_path,
        9,
        encode_file(Header(FLAG_NO_CHECKSUM, page_size, len(pages), 1, 3, 1000), pages.items(), first),
    )
    grown = database_pages(page_size, 150)
    changed = {pgno: page for pgno, page in grown.items() if pages.get(pgno) != page}
    header = Header(FLAG_NO_CHECKSUM, page_size, len(grown), 4, 6, 2000)
    write(tmp_path, 1, encode_file(header, changed.items(), second))
    write(tmp_path, 0, encode_file(Header(FLAG_NO_CHECKSUM, page_size, len(grown), 7, 7, 3000), [], first))
    shrunk = database_pages(page_size, 50)
    changed = {pgno: page for pgno, page in shrunk.items() if grown[pgno] != page}
    header = Header(FLAG_NO_CHECKSUM, page_size, len(shrunk), 8, 8, 4000, wal_offset=32)
    write(tmp_path, 0, encode_file(header, changed.items(), second))
    assert restore(litestream, tmp_path, tmp_path / "out.db") == b"".join(shrunk.values())


def test_checksummed_snapshot_of_ours_restores(litestream: Path, tmp_path: Path) -> None:
    """The real decoder works out the database checksum itself. The last file must have 0x2."""
    pages = database_pages(4096, 100)
    write(tmp_path, 9, encode_file(Header(0, 4096, len(pages), 1, 1, 0), pages.items()))
    write(tmp_path, 0, encode_file(Header(FLAG_NO_CHECKSUM, 4096, len(pages), 2, 2, 0), [(1, pages[1])]))
    assert restore(litestream, tmp_path, tmp_path / "out.db") == b"".join(pages.values())
