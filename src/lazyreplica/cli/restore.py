"""``lazyreplica restore``: one state of a replica as a plain SQLite file."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lazyreplica.cli.arguments import (
    UsageError,
    add_command,
    add_json,
    add_moment,
    add_url,
    is_url,
    moment,
    open_replica,
)
from lazyreplica.cli.terminal import format_size, format_time, iso_time, print_json, progress_bar
from lazyreplica.cli.verify import check_integrity
from lazyreplica.config import Options
from lazyreplica.errors import DatabaseChanged, LazyReplicaError, LineageChanged, LTXError
from lazyreplica.ltx.name import format_txid
from lazyreplica.moments import Moment
from lazyreplica.restore import Restorer
from lazyreplica.snapshot import Snapshot
from lazyreplica.standby import Standby, state_path

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "restore",
        run,
        summary="write a state of a replica to a SQLite database file",
        description="Write the newest state of a replica, or one of the past, to a SQLite database file: the same "
        "bytes as `litestream restore`. The file appears once it is whole. An interrupted restore leaves OUT.part, "
        "with which the next one to the same output goes on.\n\n"
        "With --follow it stays, and each new transaction of the primary becomes one on OUT, under SQLite's locks and "
        "with a rollback journal, so that other processes may read OUT with any SQLite meanwhile, and undo what a "
        "crash left. They must not write to it; they should set a busy timeout, and keep read transactions short: a "
        "transaction on OUT waits for them. OUT is in rollback mode then, whatever the primary's is: its header "
        "(bytes 18, 19, 24-31, 40-43, 92-95) differs from what was replicated. OUT-lazyreplica says where it is, and "
        "the same command goes on from there. It ends by Ctrl-C, when OUT was changed by others, or when the replica "
        "holds another database.",
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
    parser.add_argument("--follow", action="store_true", help="keep OUT at the newest state until Ctrl-C")
    add_json(parser, "a JSON object")


def run(args: argparse.Namespace, out: Console, err: Console) -> int:
    wanted, started = moment(args), time.monotonic()
    if args.follow and (args.time is not None or args.txid is not None):
        raise UsageError("--follow keeps the newest state: leave out --time and --txid")
    options = Options.from_environment()
    with closing(open_replica(args.url)) as store:
        restorer = Restorer(store, options.read_timeout, args.url if is_url(args.url) else None)
        if args.follow and not args.force and args.output.exists() and state_path(args.output).exists():
            with err.status("catching up"):
                standby = Standby.resume(restorer, args.output, options.read_timeout)
            out.print(f"going on from TXID {format_txid(standby.txid)}", highlight=False)
        else:
            snapshot = _restore(args, restorer, wanted, err)
            _print(args, out, snapshot, time.monotonic() - started)
            if not args.follow:
                return 0
            standby = Standby.begin(restorer, args.output, snapshot, options.read_timeout)
        sys.stdout.flush()
        with closing(standby):
            _follow(standby, options.poll_interval or 1.0, err)
    raise AssertionError("following ends by an exception")


def _restore(args: argparse.Namespace, restorer: Restorer, wanted: Moment | None, err: Console) -> Snapshot:
    def check(database: Path, snapshot: Snapshot) -> None:
        if args.verify:
            with err.status("PRAGMA integrity_check"):
                found = check_integrity(database)
            if found != ["ok"]:
                raise LTXError(f"PRAGMA integrity_check of the restored database says: {'; '.join(found[:5])}")
        if args.follow:
            Standby.mark(database, args.output, snapshot, restorer.store.url)

    with progress_bar(err) as bar:
        task = bar.add_task("restoring", total=None)
        return restorer.restore(
            args.output,
            wanted,
            force=args.force,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            check=check,
        )


def _print(args: argparse.Namespace, out: Console, snapshot: Snapshot, seconds: float) -> None:
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
        return
    out.print(
        f"restored TXID {format_txid(snapshot.txid)} of {format_time(snapshot.timestamp_ms / 1000)}: "
        f"{format_size(snapshot.size)} in {seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def _follow(standby: Standby, interval: float, err: Console) -> NoReturn:
    """Until Ctrl-C, or until it makes no sense any more."""
    with err.status("following") as status:
        while True:
            time.sleep(interval)
            try:
                standby.poll()
            except (LineageChanged, DatabaseChanged):
                raise
            except LazyReplicaError as exc:  # of the moment: an outage, a reader that holds its transaction
                log.error("cannot follow: %s", exc)
            else:
                status.update(f"following: TXID {format_txid(standby.txid)}")
