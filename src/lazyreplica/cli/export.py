"""``lazyreplica export``: a plain SQLite file out of a local copy, or of a replica."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import lazyreplica
from lazyreplica.cli.arguments import UsageError, add_command, add_options, connect
from lazyreplica.cli.terminal import format_size
from lazyreplica.copies import export_copy, is_copy
from lazyreplica.ltx.name import format_txid, parse_txid

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "export",
        run,
        summary="write a local copy, or a replica, to a SQLite database file",
        description="Write the newest state to a SQLite database file, which appears once it is whole. From a "
        "hydration_path whose copy is complete that needs no network, and takes the transactions along that still wait "
        "in its log; programs may use the copy meanwhile. From a replica, what is local (-o hydration_path=P) is not "
        "downloaded again; `lazyreplica restore` is faster where nothing is.",
        examples=["lazyreplica export s3://bucket/app exported.db"],
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a hydration_path; or a replica's URL, or its database's path or base name in litestream.yml",
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="the database file to write")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    add_options(parser)


def run(args: argparse.Namespace, out: Console, err: Console) -> int:
    if args.output.exists() and not args.force:
        raise UsageError(f"{str(args.output)!r} exists: name another output, or overwrite it with --force")
    with err.status("exporting"):
        if is_copy(args.source):
            if args.option:
                raise UsageError(f"{args.source!r} is a local copy: leave out -o")
            txid = export_copy(Path(args.source), args.output)
        else:
            args.url = args.source
            with closing(connect(args)) as connection:
                txid = parse_txid(lazyreplica.export(connection, args.output))
    size = format_size(args.output.stat().st_size)
    out.print(f"exported TXID {format_txid(txid)}: {size}", highlight=False, soft_wrap=True)
    return 0
