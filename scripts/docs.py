"""Writes docs/cli.md from the parsers of the ``lazyreplica`` command, or with --check says whether it is up to date.

argparse words its own usage lines differently in each version of Python; so they are put together here.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from lazyreplica.cli import build_parser

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
ABOUT = """# Command line

Written by `scripts/docs` from the command's own help: change that instead.

`pip install 'lazyreplica[cli]'` brings the `lazyreplica` command. Tables are drawn for terminals; a pipe gets
tab-separated lines, and `--json` a JSON document. Progress is shown on standard error, where that is a terminal. Errors
are one line on standard error. Exit status: 0 done, 1 an error (or problems found), 2 a command line that makes no
sense, 130 Ctrl-C.
"""


def document() -> str:
    """The whole of docs/cli.md."""
    return "\n".join([ABOUT, *(line for parser in commands() for line in section(parser))])


def commands() -> Iterator[argparse.ArgumentParser]:
    """Each command's parser, in the order of the help."""
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def section(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A command: usage, description, arguments, examples."""
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    yield f"## {parser.prog}\n"
    yield f"```\n{parser.prog} {' '.join(map(usage, sorted(actions, key=lambda a: not a.option_strings)))}\n```\n"
    for paragraph in (parser.description or "").split("\n\n"):
        yield textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False) + "\n"
    if actions:
        yield "| argument | meaning |"
        yield "|---|---|"
        for action in actions:
            names = ", ".join(action.option_strings)
            shown = " ".join(filter(None, (names, value(action))))
            yield f"| `{shown.replace('|', chr(92) + '|')}` | {action.help or ''} |"
        yield ""
    _, *lines = (parser.epilog or "").split("\n")
    yield "```sh"
    yield from (line.strip() for line in lines)
    yield "```\n"


def usage(action: argparse.Action) -> str:
    """An argument as a usage line shows it."""
    if action.option_strings:
        return f"[{' '.join(filter(None, (action.option_strings[0], value(action))))}]"
    return value(action) if action.nargs != "?" else f"[{value(action)}]"


def value(action: argparse.Action) -> str:
    """What stands for the value; empty for a switch."""
    if action.nargs == 0:
        return ""
    if action.metavar is None and action.choices is not None:
        return "|".join(map(str, action.choices))
    return str(action.metavar or action.dest.upper())


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if TARGET.read_text() != document():
            sys.exit("docs/cli.md is not what the command's help says: run scripts/docs")
    else:
        TARGET.write_text(document())
