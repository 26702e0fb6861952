"""``lazyreplica query``: SQL against a replica."""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import apsw

from lazyreplica.cli.arguments import add_command, add_json, add_moment, add_options, add_url, connect
from lazyreplica.cli.terminal import print_json, progress_bar
from lazyreplica.results import as_objects, print_tables, print_tabs
from lazyreplica.results import run as run_sql
from lazyreplica_vfs.file import file_of

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "query",
        run,
        summary="run a query against a replica",
        description="Run SQL against a replica and print its rows, while the replica is hydrated.",
        examples=[
            "lazyreplica query s3://bucket/app 'select count(*) from users'",
            "lazyreplica query --txid 1 app.db 'select count(*) from users'",
            "lazyreplica query --json -o hydrate=no s3://bucket/app 'select * from users limit 3'",
        ],
    )
    add_url(parser)
    parser.add_argument("sql", metavar="SQL", help="one statement or several, separated by semicolons")
    add_moment(parser)
    add_json(parser, "a JSON array of objects")
    add_options(parser)


def run(args: argparse.Namespace, out: Console, err: Console) -> int:
    connection = connect(args)
    try:
        # Ctrl-C is noticed when Python code runs, which a long query on local pages may not need for minutes.
        connection.set_progress_handler(lambda: False, 50_000)
        with _hydration_bar(connection, err):
            results = run_sql(connection, args.sql)
    finally:
        connection.close()
    if args.json:
        print_json(as_objects(results))
    elif out.is_terminal:
        print_tables(results, out)
    else:
        print_tabs(results)
    return 0


@contextlib.contextmanager
def _hydration_bar(connection: apsw.Connection, err: Console) -> Iterator[None]:
    """Show how much of the replica is local while the block runs."""
    replica = file_of(connection, "main").replica
    if replica.hydration_file is None:
        yield
        return
    done = threading.Event()
    with progress_bar(err) as bar:
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
