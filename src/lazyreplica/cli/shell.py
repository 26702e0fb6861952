"""``lazyreplica shell``: SQL at a prompt."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import apsw.shell

from lazyreplica.cli.arguments import add_command, add_moment, add_options, add_url, connect
from lazyreplica_vfs.pragmas import PRAGMAS

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "shell",
        run,
        summary="open an SQL shell on a replica",
        description="Open APSW's shell, which is much like SQLite's, on a replica: the newest state, which it follows, "
        "or one of the past. The prompt shows the TXID; .help lists commands (.mode json, .schema, .dump). With SQL or "
        "dot commands as arguments it runs those and ends.",
        examples=[
            "lazyreplica shell s3://bucket/app '.mode json' 'select count(*) from users'",
            "lazyreplica shell --txid 1 app.db 'pragma litestream_txid'",
        ],
    )
    add_url(parser)
    parser.add_argument("sql", metavar="SQL", nargs="*", help="statements or dot commands to run, instead of a prompt")
    add_moment(parser)
    add_options(parser)


def run(args: argparse.Namespace, out: Console, err: Console) -> int:  # noqa: ARG001 (every command has the two)
    with closing(connect(args)) as connection:
        shell: Any = ReplicaShell(stdin=sys.stdin, stdout=sys.stdout, stderr=sys.stderr, db=connection)
        try:
            if not args.sql:
                shell.cmdloop(f'{args.url}\nEnter ".help" for instructions\n')
                return 0
            for text in args.sql:
                shell.process_complete_line(text)
        except SystemExit as exc:  # .exit
            return int(exc.code or 0)
    return 0


class ReplicaShell(apsw.shell.Shell):
    """APSW's shell; it knows our pragmas, and its prompt shows what is read."""

    def __init__(self, **given: Any) -> None:
        pragmas: Any = {**apsw.shell.Shell._pragmas, **PRAGMAS}
        self._pragmas = pragmas
        self._completion_cache = None
        super().__init__(**given)

    def get_line(self, prompt: str = "") -> str | None:
        """The next line of input; the main prompt gets the TXID, as far as it is known without waiting."""
        if prompt == self.prompt == "sqlite> ":
            prompt = f"{self._txid()}> "
        base: Any = super()  # has no types
        line: str | None = base.get_line(prompt)
        return line

    def _txid(self) -> str:
        try:
            txid = str(self.db.pragma("litestream_txid"))
        except (apsw.Error, TypeError):  # storage does not answer, or .open has opened something else
            return "sqlite"
        return txid.lstrip("0") or "0"
