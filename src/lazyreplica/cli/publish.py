"""``lazyreplica publish``: a database as a replica."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lazyreplica.cli.arguments import add_command
from lazyreplica.cli.terminal import progress_bar
from lazyreplica.ltx.name import format_txid
from lazyreplica.publish import publish

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "publish",
        run,
        summary="write a snapshot of a database as a replica",
        description="Write a consistent snapshot of a SQLite database, which may be in use, as a replica. Run it again "
        "after changes: open readers follow. Never publish to a path that Litestream replicates to.",
        examples=["lazyreplica publish app.db s3://bucket/app-snapshot"],
    )
    parser.add_argument("database", metavar="DB", help="the SQLite database file")
    parser.add_argument("url", metavar="URL", help="an empty path, or one published to before")


def run(args: argparse.Namespace, out: Console, err: Console) -> int:
    with progress_bar(err) as bar:
        task = bar.add_task("publishing", total=None)
        result = publish(args.database, args.url, lambda done, total: bar.update(task, completed=done, total=total))
    if result.changed:
        out.print(
            f"published TXID {format_txid(result.txid)}: {result.pages} pages, {result.size} bytes",
            highlight=False,
        )
    else:
        out.print(f"unchanged since TXID {format_txid(result.txid)}: nothing written", highlight=False)
    return 0
