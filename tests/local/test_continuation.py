"""Whether a listing goes on from a copy: never another branch, and our own whenever that can be shown."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from copies import layer_of, proof_of
from hypothesis import given, settings
from hypothesis import strategies as st
from replicas import History, Pages

from lazyreplica.local.continuation import continuation, leads_on
from lazyreplica.local.copy import LocalCopy
from lazyreplica.local.state import Proof
from lazyreplica.pagemap import Layer
from lazyreplica.storage import StoredFile

pytestmark = pytest.mark.slow


def grow(history: History, rng: random.Random, count: int) -> None:
    for _ in range(count):
        size = max(1, len(history.states[-1]) + rng.choice([0, 0, 0, 1, 2, -2]))
        history.commit(rng.sample(range(1, size + 1), min(size, rng.randint(1, 3))), size)


def branched(history: History, at: int, name: str) -> History:
    other = History(name)
    other.states, other.changed, other.wal = (list(x[: at + 1]) for x in (history.states, history.changed, history.wal))
    return other


def compacted(history: History, common: int, rng: random.Random) -> list[Layer]:
    """A listing of all transactions, cut into files of random levels; old level-0 files may be left."""
    found, low = [], 1
    while low <= history.txid:
        high = min(history.txid, low + rng.choice([0, 0, 0, 1, 3, 6]))
        level = 0 if low == high else rng.randint(1, 3)
        found.append(layer_of(history, low, high, level))
        if level:
            found += [layer_of(history, n) for n in range(low, high + 1) if rng.random() < 0.2]
        low = high + 1
    # What lies wholly in the common part is the same file in both branches.
    return [replace_name(layer) if layer.max_txid <= common else layer for layer in found]


def replace_name(layer: Layer) -> Layer:
    file = replace(layer.file, etag="common-" + layer.file.etag.partition("-")[2])
    return Layer(layer.number, file, layer.header, layer.index, layer.checksum)


def apply(pages: Pages, chain: list[Layer], history: History) -> Pages:
    """The copy's pages after a chain; a page that it does not have then is brought from the store, and right."""
    found = dict(pages)
    for layer in chain:
        state = history.states[layer.max_txid]
        found.update((p, state[p]) for p in layer.index.pgnos)
    truth = history.states[chain[-1].max_txid] if chain else found
    return {p: found.get(p, truth[p]) for p in truth}


@settings(max_examples=400, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_a_listing_that_is_accepted_leads_to_its_own_state(rng: random.Random, another: bool, alike: bool) -> None:
    """`another`: the listing is of a branch. `alike`: timestamps of its transactions differ from ours, as they do."""
    ours = History()
    ours.commit(size=rng.randint(2, 6))
    grow(ours, rng, rng.randint(1, 6))
    common = rng.randint(1, ours.txid) if another else ours.txid
    theirs = branched(ours, common, "branch") if another else ours
    txid = ours.txid
    grow(theirs, rng, rng.randint(0, 6))
    if theirs.txid < txid:
        grow(theirs, rng, txid - theirs.txid)
    history = [replace_name(layer_of(ours, n)) if n <= common else layer_of(ours, n) for n in range(1, txid + 1)]
    proofs = [Proof.of(layer.file, layer.header, layer.index.pgnos) for layer in history]  # type: ignore[arg-type]
    layers = {layer.file: layer for layer in compacted(theirs, common, rng)}

    def same(file: StoredFile, proof: Proof) -> bool:
        return alike and file.name.max_txid <= common and layers[file].header.commit == proof.commit

    found = continuation(proofs, txid, layers, same)
    if found is None:
        return
    assert found.proven <= common
    chain = [layers[file] for file in found.chain]

    class Copy:
        def __init__(self) -> None:
            self.txid = txid

    copy: LocalCopy = Copy()  # type: ignore[assignment]
    if leads_on(found, chain, copy.txid):
        assert apply(ours.states[txid], chain, theirs) == theirs.states[chain[-1].max_txid if chain else txid]


# Found by the test above: only the last of several files that lead on was looked into.
def test_files_between_that_are_not_ours_prove_that_it_is_another_branch() -> None:
    ours = History()
    ours.commit(size=5)
    for _ in range(3):
        ours.commit([2])
    theirs = branched(ours, 1, "branch")
    for written in ([3], [4], [5], [2]):
        theirs.commit(written)
    proofs = [proof_of(ours, n) for n in range(1, 5)]
    listed = [layer_of(ours, 1).file, *(layer_of(theirs, n).file for n in range(2, 6))]
    assert continuation(proofs, 4, listed, lambda file, proof: False) is None


# Found on a busy machine: Litestream gives a local file its time after it has appeared, which changes its identity.
@pytest.mark.parametrize(("alike", "longer"), [(True, 0), (False, 0), (True, 1)])
def test_the_newest_file_is_known_by_its_transaction_when_its_identity_has_changed(alike: bool, longer: int) -> None:
    history = History()
    history.commit(size=3)
    history.commit([1])
    proofs = [proof_of(history, n) for n in (1, 2)]
    file = layer_of(history, 2).file
    touched = replace(file, etag="touched", size=file.size + longer)
    found = continuation(proofs, 2, [layer_of(history, 1).file, touched], lambda file, proof: alike and file == touched)
    assert found is not None
    known = alike and not longer
    assert found.proven == (2 if known else 1)
    assert leads_on(found, [], 2) == known


def test_files_of_level_0_that_are_not_ours_do_not_keep_from_looking_into_compactions() -> None:
    history = History()
    history.commit(size=9)
    for n in range(10):
        history.commit([n % 5 + 1])
    proofs = [proof_of(history, n) for n in range(1, 12)]
    others = [replace(layer_of(history, n).file, etag=f"other-{n}") for n in range(8, 12)]
    compacted = [layer_of(history, 1, 6, 1).file, layer_of(history, 7, 11, 1).file]
    found = continuation(proofs, 11, [*others, *compacted], lambda file, proof: file == compacted[0])
    assert found is not None and found.proven == 6


@pytest.mark.parametrize("cut", range(1, 8))
def test_our_own_history_is_continued_by_any_compaction_that_ends_where_we_know(cut: int) -> None:
    history = History()
    history.commit(size=9)
    for n in range(9):
        history.commit([n % 5 + 1])
    proofs = [proof_of(history, n) for n in range(1, 8)]
    listed = [layer_of(history, 1, cut, 1).file] if cut > 1 else [layer_of(history, 1).file]
    listed += [layer_of(history, cut + 1, 10, 2).file]
    found = continuation(proofs, 7, listed, lambda file, proof: file.name.max_txid == proof.max_txid)
    assert found is not None
    assert (found.proven, found.chain) == (cut, (listed[-1],))
    expected = {p for n in range(cut + 1, 8) for p in history.changed[n]}
    assert found.unproven == expected


def test_a_gap_or_an_unknown_path_is_no_continuation() -> None:
    history = History()
    history.commit(size=3)
    for _ in range(5):
        history.commit([1])
    proofs = [proof_of(history, n) for n in range(1, 4)]
    assert continuation(proofs, 3, [layer_of(history, 6).file], lambda file, proof: True) is None
    listed = [layer_of(history, 3).file, layer_of(history, 6).file]
    assert continuation(proofs, 3, listed, lambda file, proof: True) is None
    assert continuation(proofs, 3, [], lambda file, proof: True) is None
