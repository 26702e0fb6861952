"""``lazyreplica ltx``: the files of a replica."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import TYPE_CHECKING

from lazyreplica.cli.arguments import add_command, add_json, add_level, add_url, open_replica
from lazyreplica.cli.listing import list_files, read_headers
from lazyreplica.cli.terminal import format_size, format_time, iso_time, print_json, print_rows
from lazyreplica.ltx.header import Header
from lazyreplica.ltx.name import format_txid
from lazyreplica.storage import StoredFile

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "ltx",
        run,
        summary="list the LTX files of a replica",
        description="List a replica's files by level and TXID. 'created' is the date that the store has for the "
        "object: for a compacted file in S3 that is when it was uploaded. With --headers it is when the primary wrote "
        "the last of its transactions, which takes a request for each file.",
        examples=[
            "lazyreplica ltx s3://bucket/app",
            "lazyreplica ltx --level 0 --headers s3://bucket/app",
            "lazyreplica ltx --json s3://bucket/app",
        ],
    )
    add_url(parser)
    add_level(parser, "only files of this level")
    parser.add_argument("--headers", action="store_true", help="read each file's header for its timestamp")
    add_json(parser, "a JSON array of objects")


def run(args: argparse.Namespace, out: Console, err: Console) -> int:
    with closing(open_replica(args.url)) as store:
        files = [file for file in list_files(store, err).files if args.level in (None, file.level)]
        headers = read_headers(store, files, err) if args.headers else {}
    if args.headers:
        files = [file for file in files if file in headers]
    if args.json:
        print_json([as_object(file, headers.get(file)) for file in files])
        return 0
    human = out.is_terminal
    rows = (
        (
            file.level,
            format_txid(file.name.min_txid),
            format_txid(file.name.max_txid),
            format_size(file.size) if human else file.size,
            (format_time(created)[:19] if human else iso_time(created)),
        )
        for file in files
        for created in [_created(file, headers.get(file))]
    )
    columns = ("level", "min_txid", "max_txid", "size", "created, UTC" if human else "created")
    print_rows(out, columns, rows, "r  r")
    return 0


def _created(file: StoredFile, header: Header | None) -> float:
    return header.timestamp_ms / 1000 if header else file.modified


def as_object(file: StoredFile, header: Header | None) -> dict[str, object]:
    """A file for JSON."""
    fields = {} if header is None else {"page_size": header.page_size, "pages": header.commit}
    return {
        "level": file.level,
        "min_txid": format_txid(file.name.min_txid),
        "max_txid": format_txid(file.name.max_txid),
        "size": file.size,
        "created": iso_time(_created(file, header)),
        **fields,
    }
