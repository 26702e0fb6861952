"""The state file switches at once, and garbage in it is no state; words of memory that processes share."""

from __future__ import annotations

import os
import random
from array import array
from pathlib import Path

import pytest
from copies import URL, layer_of, new_history, proof_of

from lazyreplica.local.control import Control
from lazyreplica.local.state import STATE, CopyState, Proof, read_state, write_state


def some_state(history_of: int = 3) -> CopyState:
    history = new_history(4)
    for n in range(history_of):
        history.commit([n % 4 + 1])
    chain = tuple(proof_of(history, n) for n in range(1, history.txid + 1))
    return CopyState.new(URL, 512, 7, history.txid, 4, chain)


def test_round_trip(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    state = some_state()
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    later = state.at(9, 5, (), state.base)
    write_state(tmp_path, later)
    assert read_state(tmp_path) == later
    assert (later.log, later.base, later.lineage) == (8, 7, state.lineage)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [STATE]


def test_the_numbers_of_pages_are_remembered_where_they_are_few() -> None:
    history = new_history(3)
    proof = proof_of(history, 1)
    assert list(proof.pgnos() or ()) == [1, 2, 3]
    layer = layer_of(history, 1)
    assert Proof.of(layer.file, layer.header, None).pgnos() is None
    assert Proof.of(layer.file, layer.header, array("I", range(1, 30_000))).pgnos() is None
    assert list(Proof.of(layer.file, layer.header, array("I")).pgnos() or ()) == []
    assert Proof.of(layer.file, layer.header, array("I")).pgnos() is not None


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_switch_that_fails_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    state = some_state()
    write_state(tmp_path, state)

    def fail(*args: object) -> None:
        raise OSError

    monkeypatch.setattr(*(os, "fsync") if step == "fsync" else (Path, "rename"), fail)
    with pytest.raises(OSError):
        write_state(tmp_path, state.at(9, 5, (), 8))
    monkeypatch.undo()
    assert read_state(tmp_path) == state
    write_state(tmp_path, state.at(9, 5, (), 8))
    assert read_state(tmp_path) == state.at(9, 5, (), 8)


def test_garbage_is_no_state(tmp_path: Path) -> None:
    rng = random.Random(1)
    path = tmp_path / STATE
    state = some_state()
    write_state(tmp_path, state)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert read_state(tmp_path) is None
        # A digit that became another one is a page of another transaction.
        path.write_bytes(whole[:n] + bytes([whole[n] ^ rng.randint(1, 255)]) + whole[n + 1 :])
        assert read_state(tmp_path) in (None, state)
    for text in (b"", b"{}", b"[]", b"null", b"\0" * 5000, b"\xff\xfe", b'{"format": 1}', rng.randbytes(3000)):
        path.write_bytes(text)
        assert read_state(tmp_path) is None


def test_control_is_shared_until_nobody_uses_it(tmp_path: Path) -> None:
    path = tmp_path / "control"
    Control.make(path)
    one, two = Control(path), Control(path)
    assert (two.generation, two.log_end, two.polled_at) == (0, 0, 0.0)
    one.generation, one.log_end, one.polled_at = 3, 1 << 40, 12345.25
    assert (two.generation, two.log_end, two.polled_at) == (3, 1 << 40, 12345.25)
    Control.make(path)
    assert Control(path).generation == 0
    assert one.generation == two.generation == 3, "who had it open has that one"
