"""The code in a guide of docs/, run block after block as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import apsw

from lazyreplica import naming

DOCS = Path(__file__).resolve().parents[2] / "docs"


def text_of(guide: str) -> str:
    return (DOCS / guide).read_text()


def blocks(guide: str, language: str = "python") -> list[str]:
    """The code blocks in that language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(guide), re.MULTILINE | re.DOTALL)


def run_guide(guide: str, names: dict[str, Any], *, expect: int) -> dict[str, Any]:
    """Run the guide's Python, `expect` blocks of it, with `names` as its global ones; what these are afterwards.

    Connections are closed, and what was configured is forgotten.
    """
    code = blocks(guide)
    assert len(code) == expect, f"docs/{guide} has {len(code)} blocks of Python"
    before = dict(naming._configured)
    try:
        for number, block in enumerate(code, 1):
            exec(compile(block, f"docs/{guide}, block {number}", "exec"), names)
    finally:
        naming._configured.clear()
        naming._configured.update(before)
        for value in names.values():
            if isinstance(value, apsw.Connection):
                value.close()
    return names
