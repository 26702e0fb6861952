"""The ``lazyreplica`` command: one module a command, each named in `COMMANDS`.

A command's module has ``add(commands)``, which adds its parser (see `arguments.add_command`), and the function that
runs it: ``run(args, out, err) -> exit status``, with a console for what was asked for and one for progress.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence

import apsw

import lazyreplica
from lazyreplica.cli.arguments import UsageError
from lazyreplica.cli.completion import answer_shell
from lazyreplica.errors import LazyReplicaError

COMMANDS = (
    *("query", "shell", "info", "ltx", "timeline", "dump_file", "verify"),
    *("restore", "hydrate", "export", "cache", "publish", "completion"),
)
"""Modules of this package, in the order in which the help shows them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 1 after an error, 2 for a command line that makes no sense, 130 when
    it was interrupted."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:  # also while the commands' modules are imported, half of what a start takes
        return 130


def _main(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    answer_shell(parser)
    args = parser.parse_args(arguments)
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
        return _fail("the lazyreplica command needs its extra: pip install 'lazyreplica[cli]'")
    try:
        status: int = args.run(args, Console(), Console(stderr=True))
        sys.stdout.flush()  # here, where a reader that has left is expected
    except UsageError as exc:
        return _fail(str(exc), 2)
    except (LazyReplicaError, apsw.Error) as exc:
        return _fail(str(exc))
    except UnicodeDecodeError as exc:
        return _fail(f"a text value is not UTF-8 ({exc}): select it as cast(... as blob)")
    except UnicodeEncodeError as exc:
        return _fail(f"the command line is not valid text: {exc}")
    except BrokenPipeError:
        # The reader of our output has left. What is still buffered must not be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as exc:  # a local file that the command line names, or a full disk
        return _fail(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc))
    return status


def _fail(text: str, status: int = 1) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="lazyreplica",
        description="Instant read replicas of SQLite databases, from their Litestream backups.",
    )
    parser.add_argument("--version", action="version", version=f"lazyreplica {lazyreplica.__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what the library logs")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"lazyreplica.cli.{name}").add(commands)
    return parser
