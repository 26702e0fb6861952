"""Every parser of ours that reads what others wrote, and inputs that are nearly right.

A *target* takes bytes, and may raise nothing but errors of ours. Its seeds are the small files in
``tests/fuzz/corpus/<target>``; the mutators change a few bytes, cut, splice, and write other numbers where a length may
stand. ``scripts/fuzz`` runs a target for as long as wished, ``tests/fuzz`` each for a moment. A run follows from its
seed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import logging
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from lazyreplica.errors import ConfigError, LazyReplicaError, LTXError, StoreError
from lazyreplica.litestream_yml import load
from lazyreplica.local.deltalog import DeltaLog
from lazyreplica.local.state import STATE, read_state
from lazyreplica.ltx import HEADER_SIZE, Header, PageIndex, StreamDecoder, decode_file, decode_frame, locate_index
from lazyreplica.ltx.lazyindex import LazyIndex
from lazyreplica.storage.s3_xml import parse_failure, parse_page, parse_upload_id
from lazyreplica.storage.url import parse_replica_url, redact

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"
LIMIT = 64 << 10
"""Bytes of an input, at most: longer ones find nothing more, and slower."""
SLOW = 2.0
"""Seconds that one input may take on a busy machine."""


class Finding(Exception):
    """An input on which a target did what it must not do."""

    def __init__(self, data: bytes, problem: str) -> None:
        super().__init__(problem)
        self.data = data


# -- targets --


def ltx(data: bytes) -> None:
    """`decode_file`, and the same in chunks; what is accepted is accepted by both, with the same pages."""
    whole = _pages(data, len(data) or 1)
    pieces = _pages(data, 1 + len(data) // 7)
    assert whole == pieces, "chunks made a difference"
    if whole is not None:
        file = decode_file(data)
        assert {pgno: file.page(pgno) for pgno in file.index.pgnos} == dict(whole)


def _pages(data: bytes, size: int) -> list[tuple[int, bytes]] | None:
    decoder, pages = StreamDecoder(), []
    try:
        for at in range(0, len(data), size):
            for page in decoder.feed(data[at : at + size]):
                pages.append(page)
                if len(pages) > LIMIT // 8:
                    raise AssertionError("more pages than bytes allow")
        decoder.close()
    except LTXError:
        return None
    return pages


def frame(data: bytes) -> None:
    """One frame: a page of the size asked for, or an error."""
    pgno = int.from_bytes(data[:4], "big")
    for page_size in (512, 4096, 65536):
        try:
            assert len(decode_frame(data, pgno, page_size)) == page_size
        except LTXError:
            pass


def index(data: bytes) -> None:
    """A file's page index, read whole and lazily: where the first is accepted, both say the same of every page."""
    header = Header.parse(data[:HEADER_SIZE])
    start, length = locate_index(data[-256:], len(data))
    region = data[start : start + length]
    try:
        whole = PageIndex.parse(region, header=header, file_size=len(data))
    except LTXError:
        whole = None
    if not header.is_snapshot:
        return
    reads = 0

    def read(offset: int, size: int) -> bytes:
        nonlocal reads
        reads += 1
        assert 0 <= offset <= offset + size <= len(data), "reads within the file only"
        return data[offset : offset + size]

    lazy = LazyIndex(header, len(data), start, length, read, block_size=64, read_size=128, capacity=2000)
    wanted = range(1, header.commit + 1)[: 1 << 12] if whole else [1, header.commit // 2 + 1, header.commit]
    for pgno in wanted:
        try:
            found = lazy.get(pgno)
        except LTXError:
            assert whole is None, "an index is refused lazily that is accepted whole"
            found = None
        if whole is not None:
            assert found == whole.get(pgno)
    assert reads <= 100 * len(wanted), "reads without end"


def xml(data: bytes) -> None:
    """A listing, a refusal, an upload's id."""
    parse_failure(data)
    for parse in (lambda: parse_page(data, "app/"), lambda: parse_upload_id(data)):
        try:
            parse()
        except StoreError:
            pass


def url(data: bytes) -> None:
    """A replica's URL: its canonical form means the same, and is shown without secrets."""
    text = data.decode("utf-8", "surrogateescape")
    redact(text)
    try:
        parsed = parse_replica_url(text, {})
    except ConfigError as exc:
        sole = text.count("S3CR3T") == 1 and _IN_USERINFO.match(text)
        assert not sole or "S3CR3T" not in str(exc), "a secret is shown"
        raise
    assert parse_replica_url(str(parsed), {}) == parsed, f"{parsed} is another one"
    assert "S3CR3T" in _CUSTOMER_KEY.sub("", text) or "S3CR3T" not in str(parsed) + repr(parsed), "a key is shown"


def yml(data: bytes) -> None:
    """litestream.yml, with variables, and the replicas of its databases. No error quotes a secret."""
    path = _scratch() / "litestream.yml"
    path.write_bytes(data)
    try:
        config = load({"LITESTREAM_CONFIG": str(path), "X": "value"})
        assert config is not None
        assert config.inventory
        for name in ("app.db", "/data/app.db"):
            if config.lists(name):
                config.replica_of(name)
    except ConfigError as exc:
        keys = [line for line in data.splitlines() if b"S3CR3T" in line]
        assert not all(map(_KEY.fullmatch, keys)) or "S3CR3T" not in str(exc), "a secret is shown"


def state(data: bytes) -> None:
    """state.json: what was written, or nothing."""
    path = _scratch() / STATE
    path.write_bytes(data)
    found = read_state(path.parent)
    if found is not None:  # other blanks between the values, perhaps
        originals = []
        for seed in seeds("state").values():
            path.write_bytes(seed)
            originals.append(read_state(path.parent))
        assert found in originals, "an altered state is believed"


def log(data: bytes) -> None:
    """A delta log: whole records only, each as it was written."""
    path = _scratch() / "log-1"
    path.write_bytes(data)
    opened = DeltaLog(path)
    for record in opened.scan(0):
        assert record.end <= len(opened.data)
        assert list(record.pgnos) == sorted(record.pgnos)
        found = opened.data[record.start : record.end]
        assert any(found in seed for seed in seeds("log").values()), "altered pages are believed"


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (ltx, frame, index, xml, url, yml, state, log)
}

_IN_USERINFO = re.compile(r"\w+://\w+:S3CR3T@?[^?#]*$")
_CUSTOMER_KEY = re.compile(r"(?<=[?&]sse-customer-key=)[^&]*")
_KEY = re.compile(rb"\s*secret-access-key:\s*'?S3CR3T'?\s*")
_scratch_directory: tempfile.TemporaryDirectory[str] | None = None


def _scratch() -> Path:
    global _scratch_directory
    if _scratch_directory is None:
        _scratch_directory = tempfile.TemporaryDirectory(prefix="lazyreplica-fuzz-")
    return Path(_scratch_directory.name)


# -- inputs --

_seeds: dict[str, dict[str, bytes]] = {}


def seeds(name: str) -> dict[str, bytes]:
    """The corpus of a target by file name. A real file is a seed for all that read a part of it."""
    if name not in _seeds:
        places = [CORPUS / name, *([CORPUS / "ltx"] if name == "index" else [])]
        _seeds[name] = {path.name: path.read_bytes() for place in places for path in sorted(place.glob("*"))}
    return _seeds[name]


_NUMBERS = [
    0,
    1,
    2,
    7,
    0x7F,
    0x80,
    0xFF,
    0xFFFF,
    0x10000,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    (1 << 63) - 1,
    1 << 63,
]
_NUMBERS += [(1 << 64) - 1]


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to four changes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        _CHANGES[rng.randrange(len(_CHANGES))](changed, others, rng)
    return bytes(changed[:LIMIT])


def _flip(data: bytearray, others: list[bytes], rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(data: bytearray, others: list[bytes], rng: random.Random) -> None:
    if data:
        at = rng.randrange(len(data))
        data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])


def _cut(data: bytearray, others: list[bytes], rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _remove(data: bytearray, others: list[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.choice([1, 2, 4, 8, 64])]


def _repeat(data: bytearray, others: list[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = data[at : at + rng.choice([1, 3, 9, 100])] * rng.choice([1, 2, 50])


def _splice(data: bytearray, others: list[bytes], rng: random.Random) -> None:
    other = rng.choice(others)
    at, from_ = rng.randrange(len(data) + 1), rng.randrange(len(other) + 1)
    end = len(data) if rng.random() < 0.5 else at + rng.randrange(64)
    data[at:end] = other[from_ : from_ + end - at]


def _number(data: bytearray, others: list[bytes], rng: random.Random) -> None:
    """Another number where a length, a count or an offset may stand: near the ends, or anywhere."""
    size = rng.choice([1, 2, 4, 8])
    if len(data) < size:
        return
    at = rng.choice([rng.randrange(len(data)), rng.randrange(min(len(data), 120)), len(data) - rng.randrange(1, 40)])
    at = max(0, min(at, len(data) - size))
    before = int.from_bytes(data[at : at + size], "big")
    value = rng.choice([*_NUMBERS, before + 1, before - 1, 2 * before, len(data)]) & (1 << 8 * size) - 1
    data[at : at + size] = value.to_bytes(size, rng.choice(["big", "big", "little"]))


def _text(data: bytearray, others: list[bytes], rng: random.Random) -> None:
    """What means something in a text: in place of some bytes, or between them."""
    at = rng.randrange(len(data) + 1)
    data[at : at + rng.choice([0, 0, 1, 5])] = rng.choice(_TOKENS)


_TOKENS = [
    *(bytes([byte]) for byte in b"<>&;:/?#[]@!$'()*+,=%\"{}|\\^`~\0\r\n\t .-0129aZ"),
    *(
        b"://",
        b"%00",
        b"%zz",
        b"%2f",
        b"&amp;",
        b"&#0;",
        b"&#x110000;",
        b"<!--",
        b"<![CDATA[",
        b"]]>",
        b"<?x?>",
        b"<a/>",
    ),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", "\u2100".encode(), "\N{FULLWIDTH SOLIDUS}".encode(), b"\xc0\x80"),
    *(b"1e999", b"-1", b"9" * 30, b"NaN", b"null", b"true", b"[[[[", b"{}", b"\n- ", b"\n  ", b"*a", b"&a ", b"<<: *a"),
    *(
        b"!!python/object:os.system ",
        b"${X}",
        b"$X",
        b"s3://",
        b"file://",
        b"endpoint=",
        b"?",
        b"&region=",
        b"..",
        b"//",
    ),
    *(b"sse-customer-key=x", b"key:x@", b"9999-12-31T23:59:59+00:00", b"0001-01-01T00:00:00"),
]
_CHANGES = [_flip, _flip, _overwrite, _cut, _remove, _repeat, _splice, _number, _number, _text]


# -- running --


def run(name: str, data: bytes) -> None:
    """One input. Raises `Finding` unless the target takes it, or refuses it with an error of ours, in time."""
    start = time.monotonic()
    try:
        TARGETS[name](data)
    except LazyReplicaError as exc:
        if len(str(exc)) > 4000:
            raise Finding(data, f"{type(exc).__name__} quotes too much: {str(exc)[:200]}") from exc
    except Exception as exc:
        raise Finding(data, "".join(traceback.format_exception(exc)[-6:])) from exc
    if time.monotonic() - start > SLOW:
        raise Finding(data, f"took {time.monotonic() - start:.1f} seconds")


def fuzz(name: str, seconds: float, seed: int) -> int:
    """Run a target on all seeds, then on mutants of them. Returns how many inputs there were; raises `Finding`."""
    found = list(seeds(name).values())
    if not found:
        raise SystemExit(f"there are no seeds in {CORPUS / name}")
    for data in found:
        run(name, data)
    rng = random.Random(f"{name} {seed}")
    count, end = len(found), time.monotonic() + seconds
    while time.monotonic() < end:
        run(name, mutate(rng.choice(found), found, rng))
        count += 1
    return count


def main() -> int:
    """The command ``scripts/fuzz``."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description="Feed nearly right inputs to our parsers.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target (default: 60)")
    parser.add_argument("--seed", type=int, help="of the mutations (default: a random one, which is shown)")
    parser.add_argument("--atheris", action="store_true", help="let coverage guide, with the package atheris")
    args = parser.parse_args()
    if unknown := [name for name in args.targets if name not in TARGETS]:
        parser.error(f"no target {unknown[0]!r}; there are {', '.join(TARGETS)}")
    logging.disable()
    if args.atheris:
        return _with_atheris(args.targets, args.seconds)
    seed = random.SystemRandom().randrange(1 << 31) if args.seed is None else args.seed
    failed = False
    for name in args.targets or TARGETS:
        try:
            count = fuzz(name, args.seconds, seed)
            print(f"{name}: {count} inputs, seed {seed}: nothing found", flush=True)
        except Finding as found:
            failed = True
            path = Path(f"fuzz-{name}-{hashlib.sha256(found.data).hexdigest()[:12]}")
            path.write_bytes(found.data)
            print(f"{name}: seed {seed}: {path} (put it into {CORPUS / name}):\n{found}", flush=True)
    return int(failed)


def _with_atheris(names: list[str], seconds: float) -> int:
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        sys.exit("scripts/fuzz: --atheris needs the package atheris: .venv/bin/python -m pip install atheris")
    if len(names) != 1:
        sys.exit("scripts/fuzz: --atheris takes one TARGET")
    with tempfile.TemporaryDirectory(prefix="lazyreplica-fuzz-") as corpus:
        for path, data in seeds(names[0]).items():
            (Path(corpus) / path).write_bytes(data)
        atheris.instrument_all()
        atheris.Setup(
            [sys.argv[0], f"-max_total_time={int(seconds)}", f"-max_len={LIMIT}", corpus],
            lambda data: run(names[0], data),
        )
        sys.stdout.flush()
        atheris.Fuzz()
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
