"""What Go's standard library makes of a text, where Litestream lets it. Pure.

https://pkg.go.dev/os#Expand, https://pkg.go.dev/path/filepath#Match, https://pkg.go.dev/net/url#URL.EscapedPath
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from urllib.parse import quote

_REFERENCE = re.compile(
    r"""\$(?:
        (?P<plain>[A-Za-z0-9_*\#$@!?-])     # a special character, or where a word begins
      | \{(?P<braced>[^}]*)\}
      | (?P<open>\{)                        # never closed
    )""",
    re.VERBOSE,
)
_WORD = frozenset(string.ascii_letters + string.digits + "_")
_SPECIAL = frozenset("*#$@!?-0123456789")
_VALID_PATH = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/\[\]]|%[0-9A-Fa-f]{2})*", re.ASCII)


def expand(text: str, value_of: Callable[[str], str]) -> str:
    """``os.Expand``: ``$NAME`` and ``${NAME}`` replaced by their values; bad syntax such as ``${}`` is eaten."""
    parts: list[str] = []
    position = 0
    while match := _REFERENCE.search(text, position):
        parts.append(text[position : match.start()])
        position = match.end()
        if match["braced"] is not None:
            parts.append(value_of(match["braced"]) if match["braced"] else "")
        elif match["plain"] is not None:
            if match["plain"] not in _SPECIAL:
                while position < len(text) and text[position] in _WORD:
                    position += 1
            parts.append(value_of(text[match.start() + 1 : position]))
    return "".join(parts) + text[position:]


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """``filepath.Match`` on a file name, as a regular expression. Raises `ValueError` for a malformed pattern."""
    parts: list[str] = []
    rest = pattern
    while rest:
        char, rest = rest[0], rest[1:]
        if char == "*":
            parts.append("[^/]*")
        elif char == "?":
            parts.append("[^/]")
        elif char == "[":
            members, rest = _members(rest)
            parts.append(members)
        else:
            if char == "\\":
                char, rest = _character(char + rest)
            parts.append(re.escape(char))
    return re.compile("".join(parts), re.DOTALL)


def _members(rest: str) -> tuple[str, str]:
    """What stands after a ``[``: as a lookahead and a character, and the rest of the pattern."""
    negated = rest.startswith("^")
    rest = rest[negated:]
    ranges: list[str] = []
    while not (ranges and rest.startswith("]")):
        if rest[:1] in {"", "-", "]"}:
            raise ValueError("a '[' is not closed, or holds an empty range")
        low, rest = _character(rest)
        high = low
        if rest.startswith("-"):
            if rest[1:2] in {"", "-", "]"}:
                raise ValueError("a range has no end")
            high, rest = _character(rest[1:])
        ranges.append(f"{re.escape(low)}-{re.escape(high)}" if low <= high else "")
    members = "".join(ranges)
    if not members:  # only ranges that run backwards: nothing is in them
        return ("[^/]" if negated else "(?!)"), rest[1:]
    return f"(?!/)[{'^' if negated else ''}{members}]", rest[1:]


def _character(rest: str) -> tuple[str, str]:
    if rest.startswith("\\"):
        rest = rest[1:]
    if not rest:
        raise ValueError("a '\\' stands at the end")
    return rest[0], rest[1:]


def escaped_path(path: str) -> str:
    """``URL.EscapedPath`` of a path as written in a URL: itself where that is valid, else encoded once more."""
    return path if _VALID_PATH.fullmatch(path) else quote(_unescape(path), safe="$&+,/:;=@")


def _unescape(path: str) -> bytes:
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda match: bytes([int(match[1], 16)]), path.encode())
