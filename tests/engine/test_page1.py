"""Page 1 as SQLite sees it, and reads that are a piece of a page."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from replicas import ReplicaDirectory, make_layer, make_snapshot, opened, start

from lazyreplica.head import Hold
from lazyreplica.prefetch import Reader
from lazyreplica.snapshot import Lineage
from lazyreplica.trees import Trees
from lazyreplica_vfs import page1
from lazyreplica_vfs.file import ReplicaFile

STORED = bytes(range(256)) * 16


def a_snapshot(txid: int = 7, commit: int = 5, lineage: Lineage | None = None) -> Any:
    return make_snapshot([make_layer(range(1, commit + 1), commit, 1, txid, page_size=4096)], lineage)


def test_page_1_shows_a_rollback_journal_a_counter_and_the_size() -> None:
    lineage = Lineage(counter_seed=0x01020304)
    page = page1.shown(a_snapshot(lineage=lineage), STORED)
    assert page[18:20] == b"\1\1"
    assert page[24:28] == page[92:96] == (0x01020304 + 7).to_bytes(4)
    assert page[28:32] == (5).to_bytes(4)
    untouched = [n for n in range(4096) if not (18 <= n < 20 or 24 <= n < 32 or 92 <= n < 96)]
    assert all(page[n] == STORED[n] for n in untouched)
    assert STORED[18:20] == b"\x12\x13", "the stored bytes stay"


def test_the_counter_is_a_function_of_lineage_and_txid() -> None:
    lineage = Lineage()

    def counter(txid: int, commit: int, of: Lineage) -> bytes:
        return page1.shown(a_snapshot(txid, commit, of), STORED)[24:28]

    assert counter(7, 5, lineage) == counter(7, 9, lineage) == counter(7, 5, lineage.next_epoch())
    assert counter(8, 5, lineage) != counter(7, 5, lineage)
    assert page1.shown(a_snapshot(1 << 40, 5, Lineage(counter_seed=0xFFFFFFFF)), STORED)[24:28] == b"\xff\xff\xff\xff"


def test_an_epoch_moves_the_schema_cookie_far_away() -> None:
    """A cookie counts schema changes: one step more could be what SQLite has parsed already."""
    lineage = Lineage()
    cookies = []
    for _ in range(200):
        cookies.append(int.from_bytes(page1.shown(a_snapshot(lineage=lineage), STORED)[40:44]))
        lineage = lineage.next_epoch()
    assert cookies[0] == int.from_bytes(STORED[40:44])
    ordered = sorted(cookies)
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 100_000
    full = STORED[:40] + b"\xff\xff\xff\xff" + STORED[44:]
    shown = int.from_bytes(page1.shown(a_snapshot(lineage=Lineage(epoch=1)), full)[40:44])
    assert 0 <= shown < 1 << 31


@given(offset=st.integers(0, 2200), amount=st.integers(1, 1200))
def test_every_read_is_a_piece_of_one_file(offset: int, amount: int) -> None:
    """SQLite reads 100 bytes at 0, 16 at 24, whole pages; whatever it asks for is cut from the same bytes."""
    whole, file = shown_file()
    assert file.xRead(amount, offset) == whole[offset : offset + amount]


@pytest.mark.parametrize(("amount", "offset"), [(100, 0), (16, 24), (512, 0), (512, 512), (4, 92), (1, 19), (600, 500)])
def test_the_reads_that_sqlite_makes(amount: int, offset: int) -> None:
    whole, file = shown_file()
    assert file.xRead(amount, offset) == whole[offset : offset + amount]


def test_reads_at_and_beyond_the_end_are_short() -> None:
    whole, file = shown_file()
    assert file.xRead(512, len(whole)) == b""
    assert file.xRead(512, len(whole) - 12) == whole[-12:]
    assert file.xFileSize() == len(whole) == 4 * 512


def shown_file() -> tuple[bytes, ReplicaFile]:
    """A file over four pages of 512 bytes, and the bytes that it must show."""
    snapshot = make_snapshot([make_layer(range(1, 5), 4, 1)])
    pages = {p: random.Random(p).randbytes(512) for p in range(1, 5)}
    replica = SimpleNamespace(
        head=snapshot,
        begin=lambda lineage, past: snapshot,
        end=lambda _: None,
        reader=lambda past: Reader(Trees(512), 512, frozenset()),
        hold=Hold,
        resume=lambda hold: False,
        read=lambda _, pgno, reader, is_off: pages[pgno],
    )
    whole = page1.shown(snapshot, pages[1]) + b"".join(pages[p] for p in (2, 3, 4))
    return whole, ReplicaFile(cast("Any", replica), locks=True)


def test_a_file_shows_the_size_of_the_last_commit(directory: ReplicaDirectory) -> None:
    history, _ = start(directory.path, 10)
    history.commit([1], 3)
    directory.sync(history)
    with opened(directory) as replica:
        file = ReplicaFile(replica, locks=True)
        file.xLock(1)
        assert file.xFileSize() == 3 * 512
        assert file.xRead(512, 3 * 512) == b""
        assert file.xRead(512, 1024) == history.states[2][3]
        file.xUnlock(0)
        assert not list(replica._head._pins) or replica.options.poll_interval == 0
