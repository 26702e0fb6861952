"""What a hostile store may say: sizes of terabytes, counts of billions, XML without end. It costs it bytes, not us."""

# ruff: noqa: E501 (documents on one line each)
from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import lz4.block
import pytest

from lazyreplica.errors import LTXError, StoreError
from lazyreplica.ltx import FLAG_NO_CHECKSUM, HEADER_SIZE, FileName, Header, decode_frame, encode_frame, encode_index
from lazyreplica.ltx.frame import BLOCK_HEADER, Compression
from lazyreplica.storage.s3_xml import parse_failure, parse_page
from support.manyfiles import ManyFiles

pytestmark = pytest.mark.slow

PAGES = (1 << 32) - 1
PAGE_SIZE = 64 << 10
PETABYTE = 10**15 - 1

OPEN = textwrap.dedent("""
    import json, logging, sys, apsw, lazyreplica
    from support.memory import peak_resident
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING)
    before = peak_resident()
    said = ""
    try:
        db = lazyreplica.connect(sys.argv[1], hydrate=True, poll_interval=0, **json.loads(sys.argv[2]))
        db.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        db.pragma("integrity_check")
    except apsw.Error as exc:
        said = f"{type(exc).__mro__}: {exc}"
    print(said)
    print((peak_resident() - before) / 1e6)
""")


def open_hostile(replica: Path, tmp: Path, **options: object) -> tuple[str, float]:
    """What reading it prints and raises, and how many MB it took, in a process that may have 4 GB."""
    tmp.mkdir(exist_ok=True)
    done = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -v 4000000; exec "$@"', "-", sys.executable, "-c", OPEN, f"file://{replica}",
         json.dumps(options)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "TMPDIR": str(tmp), "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    *said, memory = done.stdout.splitlines()
    return "\n".join(said), float(memory)


def enormous_snapshot(path: Path) -> None:
    """A sparse file that is in order where an open looks: the head with page 1, and the end of the page index.

    2**32 - 1 pages of 64 KiB: 280 TB. The index would take 50 GB.
    """
    header = Header(FLAG_NO_CHECKSUM, PAGE_SIZE, PAGES, 1, 1, 1_700_000_000_000)
    database = bytearray(PAGE_SIZE)
    database[:100] = b"SQLite format 3\0\0\1\1\1\0\x40\x20\x20".ljust(100, b"\0")
    database[100] = 13  # an empty table: the schema
    first = encode_frame(1, bytes(database), Compression.BLOCK)
    count = PAGES - 1  # without the lock page
    frame = 11
    frames = len(first) + (count - 1) * frame
    tail = encode_index(
        (pgno, HEADER_SIZE + frames - (PAGES + 1 - pgno) * frame, frame) for pgno in range(PAGES - 99_999, PAGES + 1)
    )
    entry = (len(tail) - 9) // 100_000
    length = entry * count + 1
    end = HEADER_SIZE + frames + 6 + length
    with path.open("wb") as file:
        file.write(header.encode() + first)
        file.seek(end - (len(tail) - 8))
        file.write(tail[:-8] + length.to_bytes(8, "big") + bytes(8) + (1 << 63).to_bytes(8, "big"))


@pytest.mark.parametrize("options", [{}, {"hydration_path": "copy.db"}])
def test_a_snapshot_of_terabytes_takes_neither_memory_nor_disk(tmp_path: Path, options: dict[str, str]) -> None:
    level = tmp_path / "replica" / "ltx" / "9"
    level.mkdir(parents=True)
    enormous_snapshot(level / str(FileName(1, 1)))
    if options:
        options = {"hydration_path": str(tmp_path / options["hydration_path"])}
    said, memory = open_hostile(tmp_path / "replica", tmp_path / "tmp", **options)
    assert "is not hydrated: it has 281474976645120 bytes" in said
    assert "LTXError" in said, "the rest of it is zeros"
    assert memory < 150
    assert sum(path.stat().st_blocks for path in tmp_path.rglob("*") if "replica" not in path.parts) < 1000


@pytest.mark.parametrize("size", [1 << 40, 1 << 20])
@pytest.mark.parametrize("level", [0, 9])
def test_a_file_of_zeros_of_any_size_is_an_error(tmp_path: Path, size: int, level: int) -> None:
    path = tmp_path / "replica" / "ltx" / str(level) / str(FileName(1, 1))
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(size)
    said, memory = open_hostile(tmp_path / "replica", tmp_path / "tmp")
    assert "LTXError" in said
    assert memory < 150


@pytest.mark.parametrize("index", [(1 << 39) - (1 << 20), 1 << 33, 1 << 20, (1 << 64) - 1])
def test_an_increment_that_announces_an_enormous_page_index_is_refused_unread(tmp_path: Path, index: int) -> None:
    files = ManyFiles(tmp_path / "replica" / "ltx" / "0")
    header = Header(FLAG_NO_CHECKSUM, 512, PAGES, 2, 2, 1)
    if index == 1 << 20:
        header = Header(FLAG_NO_CHECKSUM, 512, 50, 2, 2, 1)  # twenty thousand bytes an entry
    path = tmp_path / "replica" / "ltx" / "0" / str(FileName(2, 2))
    with path.open("wb") as file:
        file.write(header.encode())
        file.truncate(1 << 39)
        file.seek((1 << 39) - 24)
        file.write(index.to_bytes(8, "big") + bytes(8) + (1 << 63).to_bytes(8, "big"))
    assert files.txid == 1
    said, memory = open_hostile(tmp_path / "replica", tmp_path / "tmp")
    assert "LTXError" in said and "page index" in said, said
    assert memory < 150


def test_a_frame_that_decompresses_to_gigabytes_costs_a_page() -> None:
    bomb = lz4.block.compress(bytes(64 << 20), store_size=False)
    with pytest.raises(LTXError):
        decode_frame(BLOCK_HEADER.pack(7, 1, len(bomb)) + bomb, 7, 4096)


ENTRY = b"<Contents><Key>p/%d</Key><Size>1</Size><ETag>e</ETag></Contents>"
BODIES = {
    "entities": b"<!DOCTYPE l [<!ENTITY a 'aaaaaaaa'><!ENTITY b '&a;&a;&a;&a;'>]><ListBucketResult>&b;</ListBucketResult>",
    "UTF-16 entities": "<!DOCTYPE l [<!ENTITY a 'aaaaaaaa'>]><ListBucketResult>&a;</ListBucketResult>".encode("utf-16"),
    "another encoding": b"<?xml version='1.0' encoding='utf-7'?><ListBucketResult>+ADwAIQ-DOCTYPE</ListBucketResult",
    "deep": b"<a>" * 2_700_000,
    "wide": b"<ListBucketResult>" + b"<a/>" * 2_000_000 + b"</ListBucketResult>",
    "attributes": b"<ListBucketResult " + b" ".join(b"a%d=''" % n for n in range(500_000)) + b"/>",
    "escapes the prefix": b"<ListBucketResult>" + b"<Contents><Key>../../etc/passwd</Key><Size>1</Size></Contents></ListBucketResult>",
    "absurd size": b"<ListBucketResult><Contents><Key>p/a</Key><Size>1" + b"0" * 5000 + b"</Size></Contents></ListBucketResult>",
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_hostile_xml_is_refused_at_once(body: bytes) -> None:
    start = time.monotonic()
    with pytest.raises(StoreError) as caught:
        parse_page(body, "p/")
    parse_failure(body)
    assert time.monotonic() - start < 5
    assert len(str(caught.value)) < 600


def test_the_longest_honest_page_is_read() -> None:
    entry = (
        b"<Contents><Key>p/0000/%016x-%016x.ltx</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"
        b"&quot;e&quot;</ETag><ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>"
        b"<Size>1</Size><StorageClass>STANDARD</StorageClass><Owner><ID>i</ID><DisplayName>n</DisplayName></Owner>"
        b"<RestoreStatus><IsRestoreInProgress>false</IsRestoreInProgress></RestoreStatus></Contents>"
    )
    body = b"<ListBucketResult>" + b"".join(entry % (n, n) for n in range(1, 5001)) + b"</ListBucketResult>"
    assert len(parse_page(body, "p/").entries) == 5000


@pytest.mark.parametrize(
    "name", ["../../x.ltx", "/etc/passwd", "..", "0000000000000001-0000000000000001.ltx/../x", "a\0b"]
)
def test_no_name_but_that_of_an_ltx_file_is_taken(name: str) -> None:
    """What is on the disk is named by numbers of ours; of a store's names only two TXIDs are ever used."""
    assert FileName.parse(name) is None
