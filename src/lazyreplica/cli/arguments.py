"""What the commands' parsers have in common: help with examples, replica URLs, ``-o NAME=VALUE``, ``--json``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

import apsw

import lazyreplica
from lazyreplica.config import OPTION_NAMES, Options
from lazyreplica.errors import ConfigError, LTXError
from lazyreplica.ltx.name import format_txid, parse_txid
from lazyreplica.moments import AtTime, AtTXID, Moment, parse_time
from lazyreplica.naming import adopted, replica_of
from lazyreplica.storage import LEVELS, Store, open_store

if TYPE_CHECKING:
    from rich.console import Console

    from lazyreplica.storage.credentials import CredentialSource


class UsageError(Exception):
    """The command line makes no sense: exit status 2."""


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace, Console, Console], int],
    *,
    summary: str,
    description: str,
    examples: Sequence[str],
) -> argparse.ArgumentParser:
    """A command's parser. `summary` stands in the list of commands, `description` and `examples` in its own help.

    Examples are whole command lines, which the tests run: on the database ``app.db``, the replica ``s3://bucket/app``.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog="\n  ".join(("examples:", *examples)),
        formatter_class=_Formatter,
    )
    parser.set_defaults(run=run)
    return parser


class _Formatter(argparse.HelpFormatter):
    """Wraps paragraphs, and keeps the lines of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return "\n\n".join(super(_Formatter, self)._fill_text(part, width, indent) for part in text.split("\n\n"))


def add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url",
        metavar="URL",
        help="the replica: s3://bucket/path or file:///dir; or a database's path or base name in litestream.yml",
    )


def is_url(name: str) -> bool:
    """Whether `name` is a replica's URL, and not a database that litestream.yml lists."""
    return "://" in name


def replica_named(name: str) -> tuple[str, CredentialSource | None]:
    """The URL of the replica that a command line names, and the keys that come with it (None: the environment's).

    Raises `ConfigError` for what is neither a URL nor a database that litestream.yml lists.
    """
    return (name, None) if is_url(name) else replica_of(name)


def open_replica(name: str) -> Store:
    """The store of the replica that a command line names. Raises `ConfigError`."""
    return open_store(*replica_named(name))


def connect(args: argparse.Namespace) -> apsw.Connection:
    """A connection to the replica that the command line names, with its ``-o`` and its moment, if there is one."""
    given = options(args)
    moment: dict[str, str] = {}
    if getattr(args, "time", None) is not None:
        moment["time"] = args.time
    if getattr(args, "txid", None) is not None:
        moment["txid"] = format_txid(args.txid)
    if is_url(args.url):
        return lazyreplica.connect(args.url, **moment, **given)
    Options().updated(given, "-o")
    query = urlencode({"vfs": "litestream", **moment, **given}, quote_via=quote)
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    with adopted(args.url):
        return apsw.Connection(f"file:{quote(args.url)}?{query}", flags=flags)


def add_moment(parser: argparse.ArgumentParser) -> None:
    """``--time`` and ``--txid``, of which one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--time",
        metavar="T",
        help="the newest state written before that time: 2026-11-22T10:00:00Z, '5 minutes ago', yesterday",
    )
    group.add_argument("--txid", type=txid, metavar="N", help="the state right after that transaction (16 hex digits)")


def moment(args: argparse.Namespace) -> Moment | None:
    """The moment that the command line names; None: the newest state. Raises `UsageError`."""
    if args.txid is not None:
        return AtTXID(args.txid)
    if args.time is None or args.time.strip().lower() == "latest":
        return None
    try:
        return AtTime(parse_time(args.time, time.time_ns() // 1_000_000))
    except ConfigError as exc:
        raise UsageError(f"--time: {exc}") from exc


def add_level(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--level", type=int, choices=LEVELS, metavar="N", help=f"{what}: 0 to {LEVELS[-1]}")


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what}")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"an option of the replica: {', '.join(OPTION_NAMES)}",
    )


def options(args: argparse.Namespace) -> dict[str, object]:
    """What ``-o`` was given. Raises `UsageError` for anything but NAME=VALUE with the name of an option."""
    found: dict[str, object] = {}
    for given in args.option:
        name, equals, value = given.partition("=")
        if not equals or name not in OPTION_NAMES:
            raise UsageError(f"{given!r} is not NAME=VALUE with NAME one of {', '.join(OPTION_NAMES)}")
        found[name] = value
    return found


def txid(text: str) -> int:
    """A TXID as an argument: 16 hexadecimal digits as Litestream writes them, or a plain number."""
    if len(text) < 16 and text.isascii() and text.isdigit():
        return int(text)
    try:
        return parse_txid(text)
    except LTXError as exc:
        raise argparse.ArgumentTypeError(f"{exc}, or a number") from exc
