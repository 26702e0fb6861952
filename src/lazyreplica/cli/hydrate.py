"""``lazyreplica hydrate``: a local copy, made before somebody needs it."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING

from lazyreplica.cli.arguments import UsageError, add_command, add_options, add_url, connect, options
from lazyreplica.cli.terminal import format_size, progress_bar
from lazyreplica.config import Options
from lazyreplica.errors import ReplicaError
from lazyreplica.ltx.name import format_txid
from lazyreplica.replica import Replica
from lazyreplica_vfs.file import file_of

if TYPE_CHECKING:
    from rich.console import Console

_LOOK = 0.05


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "hydrate",
        run,
        summary="make a replica's local copy, or bring it up to date",
        description="Download the newest state of a replica into the local copy that programs use when they name the "
        "same hydration_path (or cache_dir), and wait until all of it is there. It is then a plain SQLite database at "
        "that path as well. A copy that is there already is brought up to date.",
        examples=["lazyreplica hydrate s3://bucket/app --hydration-path copy.db"],
    )
    add_url(parser)
    parser.add_argument(
        "--hydration-path", metavar="P", help="where the copy appears (default: the option's value, or in cache_dir)"
    )
    parser.add_argument(
        "--follow", action="store_true", help="stay, and keep the copy at the newest state until Ctrl-C"
    )
    add_options(parser)


def run(args: argparse.Namespace, out: Console, err: Console) -> int:
    if args.hydration_path is not None:
        args.option.append(f"hydration_path={args.hydration_path}")
    args.option.append("hydrate=yes")
    wanted = Options.from_environment().updated(options(args), "-o")
    if wanted.hydration_path is None and wanted.cache_dir is None:
        raise UsageError(
            "where to? Give --hydration-path P (or -o cache_dir=DIR): a private copy would be gone at once"
        )
    if args.follow and not wanted.poll_interval:
        raise UsageError("--follow with poll_interval 0 would follow nothing")
    with closing(connect(args)) as connection:
        replica = file_of(connection, "main").replica
        _wait(replica, err)
        out.print(
            f"{replica.hydration_file}: {format_size(replica.head.size)} at TXID {format_txid(replica.head.txid)}",
            highlight=False,
            soft_wrap=True,
        )
        sys.stdout.flush()
        if args.follow:
            with err.status("following") as status:
                while True:
                    time.sleep(0.5)
                    status.update(f"following: TXID {format_txid(replica.head.txid)}")
    return 0


def _wait(replica: Replica, err: Console) -> None:
    """Until every page is local. Raises `ReplicaError` when that was given up, for which the log says why."""
    with progress_bar(err) as bar:
        task = bar.add_task("hydrating", total=100)
        while (progress := replica.hydration_progress) < 100:
            if replica.hydration_file is None:
                raise ReplicaError(
                    f"{replica.url} was not hydrated (-v shows why): check the disk's space and the path"
                )
            bar.update(task, completed=progress)
            time.sleep(_LOOK)
