"""What the commands' parsers have in common: help with examples, replica URLs, ``-o NAME=VALUE``, ``--json``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lazyreplica.config import OPTION_NAMES
from lazyreplica.errors import LTXError
from lazyreplica.ltx.name import parse_txid
from lazyreplica.storage import LEVELS

if TYPE_CHECKING:
    from rich.console import Console


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
    parser.add_argument("url", metavar="URL", help="the replica: s3://bucket/path or file:///dir")


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
