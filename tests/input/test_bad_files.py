"""Files that are damaged: every row is right, or the error says which file it is; never a wrong row."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import apsw
import pytest
from handmade import SECONDS, STILL, History, failure, flipped, make_history, opened, put, read

from lazyreplica import layers, opening
from lazyreplica.config import Options
from lazyreplica.errors import LazyReplicaError, LTXError, ReplicaDamaged
from lazyreplica.ltx import Compression, decode_file, decode_frame, encode_file, encode_index
from lazyreplica.ltx.lazyindex import BLOCK_SIZE
from lazyreplica.registry import acquire, release
from lazyreplica.storage.local import LocalStore

HEADER = range(100 * 8)

pytestmark = pytest.mark.slow  # hundreds of damaged files


def treat_as_large(monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    """Small files are treated as large ones are: header, index and pages are fetched on their own.

    Of a remote store increments too, and they are verified right after that ("near"), or a moment later ("far").
    """
    if store != "local":
        monkeypatch.setattr(LocalStore, "parallel", 4)
        monkeypatch.setattr(layers, "QUICK_FILE", 100)
        monkeypatch.setattr(opening, "FAR", -1.0 if store == "far" else SECONDS)
    monkeypatch.setattr(layers, "KEEP_FILE", 100)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
    monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
    monkeypatch.setattr(layers, "_TAIL", 200)


@pytest.fixture(params=["local", "near", "far"])
def by_ranges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    treat_as_large(monkeypatch, request.param)


@contextlib.contextmanager
def verified(url: str) -> Iterator[None]:
    """The replica at `url` is open, and all its increments have been verified."""
    try:
        replica = acquire(url, Options(**STILL))  # type: ignore[arg-type]
    except LazyReplicaError:
        yield  # who opens it next gets that error as well
        return
    try:
        deadline = time.monotonic() + SECONDS
        while replica.layers._unverified:
            assert time.monotonic() < deadline, "not verified"
            time.sleep(0.001)
        yield
    finally:
        release(replica)


def sample(bits: Iterable[int], count: int) -> list[int]:
    everything = list(bits)
    return everything if len(everything) <= count else random.Random(7).sample(everything, count)


def index_bits(data: bytes) -> range:
    """From the zero page header to the index length."""
    return range(decode_file(data).index.offsets[-1] * 8, (len(data) - 24) * 8)


def frame_header_bits(data: bytes) -> list[int]:
    return [bit for offset in decode_file(data).index.offsets[:-1] for bit in range(offset * 8, offset * 8 + 80)]


def payload_bits(data: bytes) -> list[int]:
    index = decode_file(data).index
    return [
        bit for _, offset, size in index.frames(0, len(index)) for bit in range((offset + 10) * 8, (offset + size) * 8)
    ]


def length_bits(data: bytes) -> range:
    return range((len(data) - 24) * 8, (len(data) - 16) * 8)


def trailer_bits(data: bytes) -> range:
    return range((len(data) - 16) * 8, len(data) * 8)


REGIONS: dict[str, Callable[[bytes], Iterable[int]]] = {
    "header": lambda data: HEADER,
    "frame headers": frame_header_bits,
    "payload": payload_bits,
    "index": index_bits,
    "index length": length_bits,
    "trailer": trailer_bits,
}


def outcome(url: str, right: list[tuple[object, ...]]) -> str:
    started = time.monotonic()
    try:
        rows = read(url)
    except apsw.Error as exc:
        assert isinstance(exc, LazyReplicaError | apsw.CorruptError), f"{type(exc).__mro__}: {exc}"
        if isinstance(exc, LTXError):
            assert ".ltx" in str(exc) and url in str(exc), f"which file of which replica? {exc}"
        # SQLite's own "malformed" is an honest answer, if not a good one
        return type(exc).__name__
    finally:
        assert time.monotonic() - started < SECONDS
    return "right" if rows == right else "WRONG"


def outcomes(
    replica: Path,
    history: History,
    txid: int,
    bits: Iterable[int],
    files: tuple[int, ...] = (1, 2, 3),
    once: Callable[[str], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Counter[str]:
    """What reading all rows came to, for each bit of `txid`'s file; `files` (of those TXIDs) make up the replica.

    `once`: what to wait for before.
    """
    url = history.write(replica, *files)
    found: Counter[str] = Counter()
    for bit in bits:
        put(replica, 0, txid, txid, flipped(history.files[txid - 1], bit))
        with once(url):
            kind = outcome(url, history.rows[files[-1] - 1])
        assert kind != "WRONG", f"bit {bit} of TXID {txid} flipped: other rows came out"
        found[kind] += 1
    return found


@pytest.mark.parametrize("txid", [1, 2, 3])
@pytest.mark.parametrize("region", REGIONS)
def test_no_flipped_bit_of_a_small_file_goes_unnoticed(replica: Path, history: History, region: str, txid: int) -> None:
    bits = sample(REGIONS[region](history.files[txid - 1]), 40)
    found = outcomes(replica, history, txid, bits)
    # In a payload LZ4 may read the same page from other bytes, which does no harm.
    assert set(found) <= {"LTXError", *({"right"} if region == "payload" else ())}
    assert found["LTXError"] > len(bits) * 0.9


@pytest.mark.usefixtures("by_ranges")
@pytest.mark.parametrize("txid", [1, 2, 3])
@pytest.mark.parametrize("region", ["header", "frame headers", "index length", "trailer"])
def test_no_flipped_bit_of_a_large_file_gives_wrong_rows(
    replica: Path, fine_history: History, region: str, txid: int
) -> None:
    bits = sample(REGIONS[region](fine_history.files[txid - 1]), 25)
    outcomes(replica, fine_history, txid, bits)


@pytest.mark.slow
@pytest.mark.usefixtures("by_ranges")
@pytest.mark.parametrize("size", [512, 4096])
@pytest.mark.parametrize("txid", [1, 2, 3])
@pytest.mark.parametrize("region", ["header", "frame headers", "index length", "trailer"])
def test_no_flipped_bit_of_a_large_file_gives_wrong_rows_thoroughly(
    replica: Path, history: History, fine_history: History, region: str, txid: int, size: int
) -> None:
    chosen = history if size == 4096 else fine_history
    outcomes(replica, chosen, txid, sample(REGIONS[region](chosen.files[txid - 1]), 150))


@pytest.mark.usefixtures("by_ranges")
def test_flipped_bits_in_a_large_snapshots_index_are_refused(replica: Path, history: History) -> None:
    """It is read when a page is needed: here all are."""
    found = outcomes(replica, history, 1, sample(index_bits(history.files[0]), 120), files=(1,))
    assert found["LTXError"] > 100


@pytest.mark.usefixtures("by_ranges")
def test_flipped_bits_in_a_large_snapshots_index_give_no_wrong_rows_under_newer_files(
    replica: Path, history: History
) -> None:
    """The rows' pages are in newer files, and what is damaged may be not needed at all."""
    found = outcomes(replica, history, 1, sample(index_bits(history.files[0]), 120))
    assert set(found) <= {"LTXError", "right"}


@pytest.mark.usefixtures("by_ranges")
def test_flipped_bits_in_an_index_that_is_read_in_pieces_give_no_wrong_rows(
    replica: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only damage near the entries of the pages that are read is met: whoever meets it gets an error."""
    monkeypatch.setattr(layers, "PASSING_TOTAL", 10 << 20)
    history = make_history(tmp_path, page_size=512, rows=25000)
    data = history.files[0]
    index = decode_file(data).index
    assert len(index_bits(data)) > 3 * 8 * BLOCK_SIZE
    found = outcomes(replica, history, 1, sample(index_bits(data), 60), files=(1,))
    assert set(found) <= {"LTXError", "right"}
    # Of the table's pages, which come before those of SQL's index, all are read.
    begin = index.offsets[-1] + 6
    found = outcomes(replica, history, 1, sample(range(begin * 8, (begin + BLOCK_SIZE) * 8), 60), files=(1,))
    assert found["LTXError"] > 50


@pytest.mark.usefixtures("by_ranges")
@pytest.mark.parametrize("txid", [2, 3])
def test_flipped_bits_in_a_large_increments_index_show_no_older_page(
    replica: Path, history: History, txid: int
) -> None:
    """A page number that changed to another one hides a page, and an older version of it must not come instead."""
    outcomes(replica, history, txid, index_bits(history.files[txid - 1]), once=verified)


def with_another_page_number(data: bytes) -> bytes:
    """An increment in whose index one page's number became the next one, which the file does not hold.

    So the numbers still ascend, within the database, and only the file's checksum tells.
    """
    decoded = decode_file(data)
    index = decoded.index
    free = next(pgno + 1 for pgno in index.pgnos if 1 < pgno < decoded.header.commit and index.get(pgno + 1) is None)
    entries = [(pgno + (pgno + 1 == free), offset, size) for pgno, offset, size in index.frames(0, len(index))]
    damaged = data[: index.offsets[-1] + 6] + encode_index(entries) + data[-16:]
    assert len(damaged) == len(data)
    with pytest.raises(LTXError):
        decode_file(damaged)
    return damaged


def wrong_rows(url: str, history: History) -> list[int]:
    """The rows that are wrong, each asked for alone: where that is an error, none came."""
    wrong = []
    for row in history.rows[2]:
        with contextlib.suppress(LTXError), opened(url, **STILL) as connection:
            if connection.execute("SELECT * FROM t WHERE id = ?", row[:1]).fetchall() != [row]:
                wrong.append(row[0])
    return wrong


@pytest.mark.usefixtures("by_ranges")
def test_an_increment_whose_index_names_another_page_shows_no_older_page(replica: Path, history: History) -> None:
    url = history.write(replica)
    put(replica, 0, 3, 3, with_another_page_number(history.files[2]))
    with verified(url):
        assert not wrong_rows(url, history)


@pytest.mark.usefixtures("by_ranges")
def test_no_flipped_bit_of_an_lz4_frame_gives_wrong_rows(replica: Path, fine_history: History) -> None:
    """LZ4 frames (Litestream 0.5.0-0.5.15) carry a checksum of their own: even a page read alone is verified."""
    url = fine_history.write(replica, 1)
    decoded = decode_file(fine_history.files[0])
    data = encode_file(decoded.header, ((pgno, decoded.page(pgno)) for pgno in decoded.index.pgnos), Compression.FRAME)
    found: Counter[str] = Counter()
    for bit in sample(range(100 * 8, decode_file(data).index.offsets[-1] * 8), 100):
        put(replica, 0, 1, 1, flipped(data, bit))
        kind = outcome(url, fine_history.rows[0])
        assert kind != "WRONG", bit
        found[kind] += 1
    assert found["LTXError"] > 40


def undetectable_flip(data: bytes, page_size: int) -> tuple[int, int]:
    """A bit whose flip gives another page that decompresses as well, and that page's number."""
    index = decode_file(data).index
    for pgno, offset, size in reversed(list(index.frames(0, len(index)))):
        frame = data[offset : offset + size]
        right = decode_frame(frame, pgno, page_size)
        for bit in range(10 * 8, size * 8):
            try:
                if decode_frame(flipped(frame, bit), pgno, page_size) != right:
                    return offset * 8 + bit, pgno
            except LTXError:
                continue
    raise AssertionError("every flip is noticed")


def wait_for_record(caplog: pytest.LogCaptureFixture, level: int, logger: str) -> logging.LogRecord:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for record in caplog.records:
            if record.levelno == level and record.name == logger:
                return record
        time.sleep(0.01)
    raise AssertionError(f"no record of level {level} from {logger}: {caplog.text}")


@pytest.mark.usefixtures("by_ranges")
@pytest.mark.parametrize("txid", [1, 2])
def test_hydration_finds_the_damage_that_a_single_read_cannot_and_refuses_the_files_pages(
    replica: Path, history: History, txid: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "VERIFY_FILE", 100)  # increments of many MiB, that is
    url = history.write(replica, *range(1, txid + 1))
    bit, _ = undetectable_flip(history.files[txid - 1], 4096)
    damaged = put(replica, 0, txid, txid, flipped(history.files[txid - 1], bit))
    options = Options(hydrate=True, poll_interval=0)
    damaged_replica = acquire(url, options)
    try:
        record = wait_for_record(caplog, logging.ERROR, "lazyreplica.hydrator")
        assert damaged.name in record.getMessage() and "checksum" in record.getMessage()
        # A new connection has no pages of its own in memory. (SQLite reads page 1 while it opens, if that is in there.)
        with pytest.raises(LTXError, match=damaged.name) as caught:
            read(url, hydrate=True)
        assert isinstance(caught.value, apsw.IOError)
        assert caught.value.extendedresult == apsw.SQLITE_IOERR_CORRUPTFS
        assert damaged_replica.hydration_progress < 100
    finally:
        release(damaged_replica)


@pytest.mark.parametrize("length", [0, 1, 4, 99, 100, 105, 110, -1, -8, -16, -23, -24, -25, -100])
@pytest.mark.parametrize("txid", [1, 2, 3])
def test_a_truncated_small_file_is_an_error(replica: Path, history: History, txid: int, length: int) -> None:
    url = history.write(replica)
    path = put(replica, 0, txid, txid, history.files[txid - 1][:length])
    assert path.name in failure(url, LTXError)


def test_a_file_cut_anywhere_is_an_error(replica: Path, history: History) -> None:
    url = history.write(replica)
    data = history.files[1]
    for length in random.Random(3).sample(range(len(data)), 60):
        path = put(replica, 0, 2, 2, data[:length])
        assert path.name in failure(url, LTXError)


@pytest.mark.usefixtures("by_ranges")
def test_a_large_file_cut_anywhere_is_an_error(replica: Path, history: History) -> None:
    url = history.write(replica)
    for txid in (1, 3):
        data = history.files[txid - 1]
        for length in random.Random(4).sample(range(101, len(data)), 40):
            path = put(replica, 0, txid, txid, data[:length])
            assert path.name in failure(url, LTXError)
        put(replica, 0, txid, txid, data)


def test_bytes_after_the_end_are_an_error(replica: Path, history: History) -> None:
    url = history.write(replica)
    for more in (b"\0", b"x" * 24, history.files[1]):
        path = put(replica, 0, 2, 2, history.files[1] + more)
        assert path.name in failure(url, LTXError)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes"),
        (b"hello\n", "6 bytes"),
        (b"this is not an LTX file, it is a letter to a friend\n" * 10, "this"),
        (b"<html><body>404 Not Found</body></html>" * 10, "not an LTX file"),
        (b"SQLite format 3\0" + bytes(4080), "not an LTX file"),
        (b"\0" * 5000, "not an LTX file"),
    ],
)
@pytest.mark.parametrize("place", [(0, 1, 1), (0, 3, 3), (9, 1, 3)])
def test_an_object_that_is_no_ltx_file_is_an_error_that_says_so(
    replica: Path, history: History, content: bytes, says: str, place: tuple[int, int, int]
) -> None:
    url = history.write(replica)
    path = put(replica, *place, content)
    message = failure(url, LTXError)
    assert path.name in message and f"level {place[0]}" in message and str(replica) in message
    assert says in message


@pytest.mark.usefixtures("by_ranges")
def test_a_large_object_that_is_no_ltx_file_is_an_error_that_says_so(replica: Path, history: History) -> None:
    url = history.write(replica)
    path = put(replica, 0, 2, 2, b"a very long letter to a friend\n" * 1000)
    message = failure(url, LTXError)
    assert path.name in message and "not an LTX file" in message


def test_garbage_of_all_sizes_is_an_error(replica: Path, history: History) -> None:
    url = history.write(replica)
    rng = random.Random(5)
    for size in itertools.chain(range(0, 300, 7), (1000, 5000)):
        put(replica, 0, 2, 2, rng.randbytes(size))
        failure(url, LTXError)
        put(replica, 0, 2, 2, history.files[1][:100] + rng.randbytes(size))
        failure(url, LTXError)


@pytest.mark.parametrize("large", ["", "local", "near", "far"])
@pytest.mark.parametrize("place", [(0, 2, 2), (1, 1, 2), (9, 1, 3)])
def test_a_file_whose_name_and_header_disagree_is_an_error(
    replica: Path, history: History, place: tuple[int, int, int], large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        treat_as_large(monkeypatch, large)
    url = history.write(replica)
    source = 2 if place == (0, 2, 2) else 0  # 3-3 under the name 2-2, or 1-1 under that of a longer file
    path = put(replica, *place, history.files[source])
    message = failure(url, ReplicaDamaged)
    inside = f"{source + 1:016x}-{source + 1:016x}.ltx"
    assert path.name in message and inside in message and "disagree" in message


def test_a_file_that_is_damaged_only_at_first_is_read_again(
    replica: Path, history: History, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = history.write(replica)
    whole, given = LocalStore.read, []

    def once_damaged(self: LocalStore, file: object, offset: int, length: int, timeout: float) -> bytes:
        data = whole(self, file, offset, length, timeout)  # type: ignore[arg-type]
        given.append(length)
        return flipped(data, 900) if len(given) == 1 else data

    monkeypatch.setattr(LocalStore, "read", once_damaged)
    assert read(url) == history.rows[2]
    assert len(given) == 4 and "fetching it again" in caplog.text


def test_damage_under_an_open_connection_is_an_error_of_the_query(
    replica: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's pages rot after it was opened: the same size, the same date, other bytes."""
    monkeypatch.setattr(layers, "KEEP_FILE", 100)
    monkeypatch.setattr(layers, "KEEP_TOTAL", 0)
    monkeypatch.setattr(layers, "PASSING_TOTAL", 0)
    history = make_history(tmp_path, rows=2000)
    url = history.write(replica, 1)
    path = replica / "ltx" / "0" / f"{1:016x}-{1:016x}.ltx"
    with opened(url, **STILL, cache_size=0) as connection:
        connection.pragma("cache_size", 1)
        assert connection.execute("SELECT count(*) FROM t").get == 2000
        status = path.stat()
        index = decode_file(history.files[0]).index
        damaged = bytearray(history.files[0])
        for _, offset, _ in index.frames(1, len(index)):
            damaged[offset + 3] ^= 1  # page numbers
        with path.open("r+b") as file:
            file.write(damaged)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(LTXError, match=path.name) as caught:
            connection.execute("SELECT sum(length(word)) FROM t").fetchall()
        assert isinstance(caught.value, apsw.IOError)
        # and heals with its file
        with path.open("r+b") as file:
            file.write(history.files[0])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert connection.execute("SELECT * FROM t ORDER BY id").fetchall() == history.rows[0]
