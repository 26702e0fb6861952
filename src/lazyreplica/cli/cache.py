"""``lazyreplica cache``: the local copies that are kept on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lazyreplica.cli.arguments import UsageError, add_command, add_json
from lazyreplica.cli.terminal import format_size, print_json, print_rows
from lazyreplica.config import Options
from lazyreplica.copies import Copy, find_copies, remove_copy
from lazyreplica.ltx.name import format_txid

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "cache",
        run,
        summary="list or remove local copies",
        description="List the local copies in a directory (a cache_dir), or the one at a hydration_path: the replica, "
        "its newest transaction here, bytes on the disk, whether all pages are there, and whether a program uses it. "
        "Or remove those that are named, unless they are in use. What is not lazyreplica's is never touched.",
        examples=["lazyreplica cache ls .", "lazyreplica cache ls --json ."],
    )
    add_json(parser, "a JSON array of objects")
    # Parsers of their own, else argparse takes no option between the action and its paths.
    actions = parser.add_subparsers(
        dest="action",
        metavar="ls|rm PATH",
        required=True,
        help="list, or remove; then hydration_paths, of ls also directories (default: cache_dir)",
    )
    ls = actions.add_parser("ls", help="list local copies", description="List local copies.")
    ls.add_argument("paths", metavar="PATH", nargs="*", type=Path, help="hydration_paths, or directories (cache_dir)")
    ls.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print a JSON array of objects")
    rm = actions.add_parser("rm", help="remove local copies", description="Remove local copies that nobody uses.")
    rm.add_argument("paths", metavar="PATH", nargs="*", type=Path, help="hydration_paths")


def run(args: argparse.Namespace, out: Console, err: Console) -> int:  # noqa: ARG001 (every command has the two)
    paths = list(args.paths)
    if args.action == "rm":
        if not paths:
            raise UsageError("rm needs the hydration_paths of the copies to remove; `lazyreplica cache ls` lists them")
        for path in paths:
            remove_copy(path)
            out.print(f"removed {path}", highlight=False, soft_wrap=True)
        return 0
    if not paths:
        default = Options.from_environment().cache_dir
        if default is None:
            raise UsageError("which directory? Name one, or set LITESTREAM_CACHE_DIR")
        paths = [Path(default)]
    copies = [copy for path in paths for copy in find_copies(path)]
    if args.json:
        print_json([_as_object(copy) for copy in copies])
        return 0
    rows = [
        (
            copy.path,
            copy.url,
            format_txid(copy.txid),
            format_size(copy.size) if out.is_terminal else copy.size,
            "yes" if copy.complete else "no",
            "yes" if copy.in_use else "no",
        )
        for copy in copies
    ]
    print_rows(out, ("path", "replica", "txid", "size", "complete", "in use"), rows, "lllr")
    return 0


def _as_object(copy: Copy) -> dict[str, object]:
    return {
        "path": str(copy.path),
        "url": copy.url,
        "txid": format_txid(copy.txid),
        "bytes": copy.size,
        "complete": copy.complete,
        "in_use": copy.in_use,
    }
