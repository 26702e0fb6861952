"""The log: what is appended is what is read, and nothing torn or flipped ever is."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from copies import layer_of, new_history
from hypothesis import given, settings
from hypothesis import strategies as st
from replicas import History, disk_full

from lazyreplica.errors import LTXError
from lazyreplica.local.deltalog import DeltaLog, Record


def append(log: DeltaLog, history: History, txid: int) -> Record:
    layer = layer_of(history, txid)
    pgnos = array("I", layer.index.pgnos)
    offsets = array("Q", range(100, 100 * (len(pgnos) + 2), 100))
    pages = [(p, history.states[txid][p]) for p in pgnos]
    return log.append(layer.file, layer.header, layer.checksum, (pgnos, offsets), pages)


@pytest.fixture(scope="module")
def history() -> History:
    history = new_history(4)
    for written, size in (([2], 4), ([1, 3], 4), ([], 5), ([2], 2)):
        history.commit(written, size)
    return history


def write(path: Path, history: History) -> list[Record]:
    log = DeltaLog(path, create=True)
    return [append(log, history, txid) for txid in range(1, history.txid + 1)]


def right(log: DeltaLog, record: Record, history: History) -> bool:
    size, state = history.page_size, history.states[record.max_txid]
    pages = [log.data[record.start + n * size : record.start + (n + 1) * size] for n in range(len(record.pgnos))]
    return pages == [state[p] for p in record.pgnos]


def test_round_trip(tmp_path: Path, history: History) -> None:
    written = write(tmp_path / "log", history)
    log = DeltaLog(tmp_path / "log")
    assert list(log.scan(0)) == written
    assert log.end == written[-1].end
    assert all(right(log, record, history) for record in written)
    assert [record.file.modified for record in written] == [1.5] * len(written)


def test_a_scan_ends_where_it_is_told_and_goes_on_there(tmp_path: Path, history: History) -> None:
    written = write(tmp_path / "log", history)
    log = DeltaLog(tmp_path / "log")
    for record in written:
        assert list(log.scan(log.end, record.end)) == [record]
        assert list(log.scan(log.end, record.end)) == []
    assert log.end == written[-1].end


def test_a_tail_that_is_torn_at_any_byte_is_not_there(tmp_path: Path, history: History) -> None:
    written = write(tmp_path / "log", history)
    whole = (tmp_path / "log").read_bytes()[: written[-1].end]
    for cut in range(written[-2].end, len(whole)):
        (tmp_path / "torn").write_bytes(whole[:cut].ljust(len(whole) + 4096, b"\0"))
        log = DeltaLog(tmp_path / "torn")
        # Unless what was cut off is zero.
        expected = written if not any(whole[cut:]) else written[:-1]
        assert list(log.scan(0)) == expected, cut
        assert log.end == expected[-1].end


def test_a_file_that_ends_within_a_record(tmp_path: Path, history: History) -> None:
    written = write(tmp_path / "log", history)
    whole = (tmp_path / "log").read_bytes()
    for cut in (1, 20, 39, 40, written[0].start, written[0].end - 1, written[0].end, written[0].end + 3):
        (tmp_path / "cut").write_bytes(whole[:cut])
        assert list(DeltaLog(tmp_path / "cut").scan(0)) == [record for record in written if record.end <= cut]


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_ends_the_log_there(
    tmp_path_factory: pytest.TempPathFactory, history: History, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("flip") / "log"
    written = write(path, history)
    at = data.draw(st.integers(0, written[-1].end - 1))
    change = data.draw(st.integers(1, 255))
    with path.open("r+b") as file:
        file.seek(at)
        (before,) = file.read(1)
        file.seek(at)
        file.write(bytes([before ^ change]))
    log = DeltaLog(path)
    found = list(log.scan(0))
    damaged = next(n for n, record in enumerate(written) if at < record.end)
    assert found == written[:damaged]
    path.unlink()


def test_what_is_appended_after_a_torn_tail_replaces_it(tmp_path: Path, history: History) -> None:
    written = write(tmp_path / "log", history)
    with (tmp_path / "log").open("r+b") as file:
        file.seek(written[1].start)
        file.write(b"\xff" * 700)
    log = DeltaLog(tmp_path / "log")
    assert list(log.scan(0)) == written[:1]
    append(log, history, 5)
    again = DeltaLog(tmp_path / "log")
    found = list(again.scan(0))
    assert [record.max_txid for record in found] == [1, 5]
    assert all(right(again, record, history) for record in found)


@pytest.mark.parametrize("kind", ["fewer", "more", "another", "short"])
def test_pages_that_are_not_those_of_the_index_leave_no_record(tmp_path: Path, history: History, kind: str) -> None:
    log = DeltaLog(tmp_path / "log", create=True)
    append(log, history, 1)
    layer = layer_of(history, 3)
    pgnos, offsets = array("I", layer.index.pgnos), array("Q", [100, 200, 300])
    pages = [(p, history.states[3][p]) for p in pgnos]
    wrong = {"fewer": pages[:1], "more": [*pages, (9, pages[0][1])], "another": [pages[0], (2, pages[1][1])]}
    given = wrong.get(kind, [(p, page[:-1]) for p, page in pages])
    with pytest.raises(LTXError):
        log.append(layer.file, layer.header, 1, (pgnos, offsets), given)
    append(log, history, 2)
    assert [record.max_txid for record in DeltaLog(tmp_path / "log").scan(0)] == [1, 2]


def test_a_full_disk_leaves_no_record(tmp_path: Path, history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    log = DeltaLog(tmp_path / "log", create=True)
    append(log, history, 1)
    real = os.pwrite
    for fail_at in range(3):
        calls = iter(range(10))

        def pwrite(fd: int, data: bytes, at: int, calls: Iterator[int] = calls, fail_at: int = fail_at) -> int:
            if next(calls) == fail_at:
                real(fd, bytes(data)[: len(data) // 2], at)
                disk_full()
            return real(fd, data, at)

        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            append(log, history, 2)
        monkeypatch.setattr(os, "pwrite", real)
        assert [record.max_txid for record in DeltaLog(tmp_path / "log").scan(0)] == [1]
    append(log, history, 2)
    assert [record.max_txid for record in DeltaLog(tmp_path / "log").scan(0)] == [1, 2]


def test_a_log_that_grows_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyreplica.local.deltalog._GROW", 4096)
    history = new_history(4)
    log = DeltaLog(tmp_path / "log", create=True)
    other = DeltaLog(tmp_path / "log")
    old = other.data
    for _ in range(30):
        record = append(log, history, history.commit([1, 2, 3]))
        assert list(other.scan(other.end, log.end)) == [record]
        assert right(other, record, history)
        assert right(log, record, history)
    assert len(old) == 4096
    assert bytes(old[:8]) == b"LZRDELT2", "who has the old mapping still reads it"
