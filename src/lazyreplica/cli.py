"""The ``lazyreplica`` command."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import apsw

import lazyreplica
from lazyreplica.config import OPTION_NAMES
from lazyreplica.errors import LazyReplicaError
from lazyreplica.ltx.name import format_txid
from lazyreplica.publish import publish
from lazyreplica.results import print_json, print_tables, print_tabs, run
from lazyreplica_vfs.file import file_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 1 after an error, or 2 for a command line that makes no sense."""
    args = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.ERROR, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        # Tables and progress bars come with the `cli` extra; the library does without.
        from rich.console import Console
    except ImportError:
        print("error: the lazyreplica command needs its extra: pip install 'lazyreplica[cli]'", file=sys.stderr)
        return 1
    try:
        status: int = args.run(args, Console(), Console(stderr=True))
    except (LazyReplicaError, apsw.Error) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    except UnicodeDecodeError as exc:
        print(f"error: a text value is not UTF-8 ({exc}): select it as cast(... as blob)", file=sys.stderr)
        return 1
    except UnicodeEncodeError as exc:
        print(f"error: the command line is not valid text: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has left. What is still buffered must not be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lazyreplica",
        description="Instant read replicas of SQLite databases, from their Litestream backups.",
    )
    parser.add_argument("--version", action="version", version=f"lazyreplica {lazyreplica.__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what the library logs")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    query = commands.add_parser(
        "query",
        help="run a query against a replica",
        description="Run SQL against a replica and print its rows, while the replica is hydrated.",
        epilog="example: lazyreplica query s3://bucket/app 'select count(*) from users'",
    )
    query.add_argument("url", metavar="URL", help="the replica: s3://bucket/path or file:///dir")
    query.add_argument("sql", metavar="SQL")
    query.add_argument("--json", action="store_true", help="print a JSON array of objects")
    query.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"an option of the replica: {', '.join(OPTION_NAMES)}",
    )
    query.set_defaults(run=_query)

    publishing = commands.add_parser(
        "publish",
        help="write a snapshot of a database as a replica",
        description="Write a consistent snapshot of a SQLite database, which may be in use, as a replica. Run it again "
        "after changes: open readers follow. Never publish to a path that Litestream replicates to.",
        epilog="example: lazyreplica publish app.db s3://bucket/app-snapshot",
    )
    publishing.add_argument("database", metavar="DB", help="the SQLite database file")
    publishing.add_argument("url", metavar="URL", help="an empty path, or one published to before")
    publishing.set_defaults(run=_publish)
    return parser


def _query(args: argparse.Namespace, out: Console, err: Console) -> int:
    options: dict[str, object] = {}
    for given in args.option:
        name, equals, value = given.partition("=")
        if not equals or name not in OPTION_NAMES:
            print(f"error: {given!r} is not NAME=VALUE with NAME one of {', '.join(OPTION_NAMES)}", file=sys.stderr)
            return 2
        options[name] = value
    connection = lazyreplica.connect(args.url, **options)
    try:
        # Ctrl-C is noticed when Python code runs, which a long query on local pages may not need for minutes.
        connection.set_progress_handler(lambda: False, 50_000)
        with _hydration_bar(connection, err):
            results = run(connection, args.sql)
    finally:
        connection.close()
    if args.json:
        print_json(results)
    elif out.is_terminal:
        print_tables(results, out)
    else:
        print_tabs(results)
    sys.stdout.flush()  # here, where a reader that has left is expected
    return 0


def _publish(args: argparse.Namespace, out: Console, err: Console) -> int:
    with _progress(err) as bar:
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


def _progress(err: Console) -> Progress:
    """A progress bar on standard error; silent where that is no terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


@contextlib.contextmanager
def _hydration_bar(connection: apsw.Connection, err: Console) -> Iterator[None]:
    """Show how much of the replica is local while the block runs."""
    replica = file_of(connection, "main").replica
    if replica.hydration_file is None:
        yield
        return
    done = threading.Event()
    with _progress(err) as bar:
        task = bar.add_task("hydrating", total=100)

        def watch() -> None:
            while not done.wait(0.1):
                bar.update(task, completed=replica.hydration_progress)

        watcher = threading.Thread(target=watch, name="lazyreplica-progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
