"""``lazyreplica dump-file``: one LTX file, taken apart."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lazyreplica.cli.arguments import UsageError, add_command, add_json, add_level, is_url, open_replica
from lazyreplica.cli.listing import TIMEOUT
from lazyreplica.cli.terminal import format_time, iso_time, print_facts, print_json, print_rows, progress_bar
from lazyreplica.errors import LTXError, ReplicaError
from lazyreplica.ltx.frame import FLAG_BLOCK
from lazyreplica.ltx.header import HEADER_SIZE, Header, Trailer
from lazyreplica.ltx.index import PageIndex
from lazyreplica.ltx.name import FileName, format_txid
from lazyreplica.storage import Store, StoredFile
from lazyreplica.verify import decode_into

if TYPE_CHECKING:
    from rich.console import Console

_PIECE = 1 << 20
Page = tuple[int, int, int, str]
"""Number, offset and size of its frame, compression."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "dump-file",
        run,
        summary="show what is in one LTX file",
        description="Show the header, pages and trailer of an LTX file, after checking its structure and its checksum. "
        "The file is a local one, or one of a replica: then give its level and its name, as `lazyreplica ltx` lists "
        "them.\n\nExit status: 0 sound, 1 damaged or not there, 2 a command line that makes no sense.",
        examples=[
            "lazyreplica dump-file 0000000000000001-0000000000000001.ltx",
            "lazyreplica dump-file --level 0 s3://bucket/app 0000000000000001-0000000000000001.ltx",
            "lazyreplica dump-file --pages --json 0000000000000001-0000000000000001.ltx",
        ],
    )
    parser.add_argument("file", metavar="FILE_OR_URL", help="a local file, or a replica (with NAME and --level)")
    parser.add_argument("name", metavar="NAME", nargs="?", help="with a replica: the file's name")
    add_level(parser, "with a replica: the file's level")
    parser.add_argument("--pages", action="store_true", help="list all pages")
    add_json(parser, "a JSON object")


def run(args: argparse.Namespace, out: Console, err: Console) -> int:
    with _opened(args, err) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            header, index, trailer = decode_into(_pieces(file), None)
        except LTXError as exc:
            return _damaged(args, out, file, exc)
        columns = ("pgno", "offset", "size", "compression")
        if args.json:
            listed = [dict(zip(columns, page, strict=True)) for page in (_pages(file, index) if args.pages else ())]
            print_json(
                {"size": size, "sound": True, "header": _fields(header), "page_count": len(index)}
                | ({"pages": listed} if args.pages else {})
                | {"trailer": _checksums(trailer)}
            )
            return 0
        about = _describe_pages(header, index, _pages(file, index), size)
        print_facts(out, [*_describe(header), *about, *_describe_end(trailer)])
        if args.pages:
            out.print()
            print_rows(out, columns, _pages(file, index), "rrr")
    return 0


@contextmanager
def _opened(args: argparse.Namespace, err: Console) -> Iterator[BinaryIO]:
    """The file, here: a replica's is fetched into a temporary one."""
    if not is_url(args.file) and (args.name is None or args.level is None):
        if args.name is not None or args.level is not None:
            raise UsageError(f"{args.file!r} is a local file: leave out NAME and --level")
        with Path(args.file).open("rb") as file:
            yield file
        return
    name = FileName.parse(args.name or "")
    if name is None or args.level is None:
        raise UsageError(
            "with a replica give --level and the file's name, such as "
            "--level 0 URL 0000000000000001-0000000000000001.ltx; `lazyreplica ltx` lists them"
        )
    with closing(open_replica(args.file)) as store, tempfile.TemporaryFile() as file:
        _fetch(store, _find(store, args.level, name), file, err)
        yield file


def _find(store: Store, level: int, name: FileName) -> StoredFile:
    found = store.get(level, name, HEADER_SIZE, TIMEOUT)
    if found is None:
        raise ReplicaError(f"{store.url} has no level {level} file {name}; `lazyreplica ltx` lists those there are")
    return found[0]


def _fetch(store: Store, stored: StoredFile, file: BinaryIO, err: Console) -> None:
    with progress_bar(err) as bar:
        task = bar.add_task("fetching", total=stored.size)
        for at in range(0, stored.size, _PIECE):
            file.write(store.read(stored, at, min(_PIECE, stored.size - at), TIMEOUT))
            bar.update(task, completed=at + _PIECE)
    file.flush()


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while data := file.read(_PIECE):
        yield data


def _pages(file: BinaryIO, index: PageIndex) -> Iterator[Page]:
    for pgno, offset, size in index.frames(0, len(index)):
        flags = int.from_bytes(os.pread(file.fileno(), 2, offset + 4))  # behind the page number
        yield pgno, offset, size, "LZ4 block" if flags & FLAG_BLOCK else "LZ4 frame"


def _damaged(args: argparse.Namespace, out: Console, file: BinaryIO, damage: LTXError) -> int:
    """What can still be told: the header, if that is one."""
    file.seek(0)
    header = None
    try:
        header = Header.parse(file.read(HEADER_SIZE))
    except LTXError:
        pass
    if args.json:
        print_json({"sound": False, "error": str(damage), "header": _fields(header) if header else None})
    else:
        print_facts(out, [*(_describe(header) if header else ()), ("damaged", str(damage))])
    return 1


def _fields(header: Header) -> dict[str, object]:
    return {
        **asdict(header),
        "min_txid": format_txid(header.min_txid),
        "max_txid": format_txid(header.max_txid),
        "time": iso_time(header.timestamp_ms / 1000),
        "pre_apply_checksum": _hex(header.pre_apply_checksum),
        "wal_salt1": f"{header.wal_salt1:08x}",
        "wal_salt2": f"{header.wal_salt2:08x}",
        "node_id": _hex(header.node_id),
    }


def _checksums(trailer: Trailer) -> dict[str, str]:
    """As text: JSON's numbers do not hold 64 bits everywhere."""
    return {name: _hex(value) for name, value in asdict(trailer).items()}


def _hex(value: int) -> str:
    return f"{value:016x}"


def _describe(header: Header) -> list[tuple[str, str]]:
    kind = "a snapshot: every page" if header.is_snapshot else "an increment: pages that changed"
    checksums = "database checksums" if header.has_checksums else "no database checksums"
    facts = [
        ("transactions", f"{format_txid(header.min_txid)} to {format_txid(header.max_txid)}, {kind}"),
        ("time", format_time(header.timestamp_ms / 1000) if header.timestamp_ms else "not set"),
        ("database", f"{header.commit:,} pages of {header.page_size} bytes, after this file"),
        ("flags", f"{header.flags:#x}: {checksums}"),
    ]
    if header.wal_offset:
        end = header.wal_offset + header.wal_size
        salts = f"{header.wal_salt1:08x} {header.wal_salt2:08x}"
        facts.append(("WAL", f"bytes {header.wal_offset:,} to {end:,} of the log with salts {salts}"))
    if header.pre_apply_checksum:
        facts.append(("database before", f"checksum {_hex(header.pre_apply_checksum)}"))
    if header.node_id:
        facts.append(("node", _hex(header.node_id)))
    return facts


def _describe_pages(header: Header, index: PageIndex, pages: Iterator[Page], size: int) -> list[tuple[str, str]]:
    kinds = Counter(page[3] for page in pages)
    text = f"{len(index):,}"
    if kinds:
        frames = index.offsets[-1] - index.offsets[0]
        share = frames / (len(index) * header.page_size)
        how = ", ".join(f"{count:,} as {kind}" for kind, count in kinds.items())
        numbers = f"from {index.pgnos[0]} to {index.pgnos[-1]}"
        text = f"{text}, numbers {numbers}: {how}; {frames:,} bytes, {share:.0%} of the pages' size"
    return [("pages", text), ("file", f"{size:,} bytes")]


def _describe_end(trailer: Trailer) -> list[tuple[str, str]]:
    facts = [("file checksum", f"{_hex(trailer.file_checksum)}, as it must be")]
    if trailer.post_apply_checksum:
        facts.insert(0, ("database after", f"checksum {_hex(trailer.post_apply_checksum)}"))
    return facts
