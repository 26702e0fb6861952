"""Histories, and local copies that are made of them by hand."""

from __future__ import annotations

from array import array
from pathlib import Path

from replicas import PAGE_SIZE, History

from lazyreplica.local.copy import LocalCopy
from lazyreplica.local.state import CopyState, Proof, write_state
from lazyreplica.ltx import FLAG_NO_CHECKSUM, FileName, Header, PageIndex
from lazyreplica.pagemap import Layer
from lazyreplica.storage import StoredFile

URL = "file:///replica"


def layer_of(history: History, low: int, high: int | None = None, level: int = 0) -> Layer:
    """The file of transactions low..high, without its bytes."""
    high = low if high is None else high
    state = history.states[high]
    pgnos = array("I", sorted(set().union(*history.changed[low : high + 1]) & set(state)))
    offsets = array("Q", range(100, 100 * (len(pgnos) + 2), 100))
    header = Header(
        FLAG_NO_CHECKSUM, history.page_size, len(state), low, high, 1_700_000_000_000 + high, 0, *history.wal[high]
    )
    file = StoredFile(level, FileName(low, high), 4096 + high, f"{history.name}-{level}-{low}-{high}", 1.5)
    return Layer(high, file, header, PageIndex(pgnos, offsets), checksum=high * 7)


def proof_of(history: History, low: int, high: int | None = None, level: int = 0) -> Proof:
    layer = layer_of(history, low, high, level)
    return Proof.of(layer.file, layer.header, array("I", layer.index.pgnos))


def append(copy: LocalCopy, history: History, low: int, high: int | None = None) -> None:
    layer = layer_of(history, low, high)
    state = history.states[layer.max_txid]
    copy.append(layer, [(p, state[p]) for p in layer.index.pgnos])


def begin(directory: Path, history: History, txid: int = 1, *, durable: bool = True) -> LocalCopy:
    """An empty copy of the state at `txid`."""
    state = CopyState.new(URL, PAGE_SIZE, 1, txid, len(history.states[txid]), (proof_of(history, 1, txid),))
    copy = LocalCopy(directory, state, create=True, durable=durable)
    write_state(directory, state)
    return copy


def fill(copy: LocalCopy, history: History, pgnos: list[int] | None = None) -> None:
    """Bring missing pages of the copy's newest state: all of them, or those among `pgnos`."""
    missing = [p for p in copy.missing() if p <= copy.base.commit]
    for pgno in missing if pgnos is None else sorted(set(pgnos) & set(missing)):
        copy.base.write(pgno, history.states[copy.txid][pgno])


def new_history(size: int) -> History:
    history = History()
    history.commit(size=size)
    return history
