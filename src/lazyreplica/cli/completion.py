"""``lazyreplica completion``: what a shell needs to complete command lines."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from lazyreplica.cli.arguments import UsageError, add_command

if TYPE_CHECKING:
    from rich.console import Console

_MISSING = "completion needs argcomplete: pip install 'lazyreplica[cli]'"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "completion",
        run,
        summary="print a shell's completion script",
        description="Print a script that makes a shell complete this command line. Put a line into its start-up file: "
        'eval "$(lazyreplica completion bash)" into ~/.bashrc, or the same with zsh into ~/.zshrc (after compinit); '
        "lazyreplica completion fish | source into ~/.config/fish/config.fish.",
        examples=[f"lazyreplica completion {shell}" for shell in ("bash", "zsh", "fish")],
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell to print it for")


def run(args: argparse.Namespace, out: Console, err: Console) -> int:  # noqa: ARG001 (every command has the two)
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError:
        raise UsageError(_MISSING) from None
    print(shellcode(["lazyreplica"], shell=args.shell))
    return 0


def answer_shell(parser: argparse.ArgumentParser) -> None:
    """Where a shell has called us to complete a line: answer it, and end the process."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
