"""``lazyreplica restore``: one state of a replica as a plain SQLite file."""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from lazyreplica.cli.arguments import add_command, add_json, add_moment, add_url, is_url, moment, open_replica
from lazyreplica.cli.terminal import format_size, format_time, iso_time, print_json, progress_bar
from lazyreplica.cli.verify import check_integrity
from lazyreplica.config import Options
from lazyreplica.errors import LTXError
from lazyreplica.ltx.name import format_txid
from lazyreplica.restore import Restorer
from lazyreplica.snapshot import Snapshot

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "restore",
        run,
        summary="write a state of a replica to a SQLite database file",
        description="Write the newest state of a replica, or one of the past, to a SQLite database file: the same "
        "bytes as `litestream restore`. The file appears once it is whole. An interrupted restore leaves OUT.part, "
        "with which the next one to the same output goes on.",
        examples=[
            "lazyreplica restore s3://bucket/app -o restored.db",
            "lazyreplica restore s3://bucket/app --txid 1 --verify --force -o restored.db",
        ],
    )
    add_url(parser)
    parser.add_argument("-o", "--output", metavar="OUT", required=True, type=Path, help="the database file to write")
    add_moment(parser)
    parser.add_argument("--force", action="store_true", help="overwrite OUT, its -wal, -shm and -journal")
    parser.add_argument("--verify", action="store_true", help="run PRAGMA integrity_check before the file appears")
    add_json(parser, "a JSON object")


def run(args: argparse.Namespace, out: Console, err: Console) -> int:
    wanted = moment(args)
    started = time.monotonic()

    def check(database: Path, _: Snapshot) -> None:
        if args.verify:
            with err.status("PRAGMA integrity_check"):
                found = check_integrity(database)
            if found != ["ok"]:
                raise LTXError(f"PRAGMA integrity_check of the restored database says: {'; '.join(found[:5])}")

    with closing(open_replica(args.url)) as store:
        restorer = Restorer(store, Options.from_environment().read_timeout, args.url if is_url(args.url) else None)
        with progress_bar(err) as bar:
            task = bar.add_task("restoring", total=None)
            snapshot = restorer.restore(
                args.output,
                wanted,
                force=args.force,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                check=check,
            )
    seconds = time.monotonic() - started
    if args.json:
        print_json(
            {
                "output": str(args.output),
                "txid": format_txid(snapshot.txid),
                "time": iso_time(snapshot.timestamp_ms / 1000),
                "page_size": snapshot.page_size,
                "bytes": snapshot.size,
                "seconds": round(seconds, 3),
            }
        )
    else:
        out.print(
            f"restored TXID {format_txid(snapshot.txid)} of {format_time(snapshot.timestamp_ms / 1000)}: "
            f"{format_size(snapshot.size)} in {seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )
    return 0
