"""YAML text -> sections that know the lines of their keys.

Values stay texts: ``access-key-id: 0123`` is four digits to Litestream, too, and no octal number. No message shows
a value of a key that may hold a secret, nor a line of the file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeGuard

from lazyreplica.errors import ConfigError

if TYPE_CHECKING:
    import yaml

log = logging.getLogger(__name__)

_NULL = "tag:yaml.org,2002:null"
_TRUE = frozenset({"true", "yes", "on", "y"})
_FALSE = frozenset({"false", "no", "off", "n", ""})
_QUOTED = re.compile(r"(['\"]).*\1", re.DOTALL)

_warned: set[str] = set()


class Section:
    """A mapping in the file. Keys that are absent, and those without a value, are empty texts."""

    def __init__(self, node: yaml.Node | None, path: str) -> None:
        """`node` is a mapping, or None for one without keys."""
        self._path = path
        self._line = node.start_mark.line + 1 if node else 1
        pairs = node.value if node else []
        self._nodes = {key.value: (value, key.start_mark.line + 1) for key, value in pairs if _is_text(key)}

    def where(self, key: str = "") -> str:
        """File and line, for messages."""
        return f"{self._path}:{self._nodes[key][1] if key in self._nodes else self._line}"

    def error(self, text: str, key: str = "") -> ConfigError:
        """An error that says where."""
        return ConfigError(f"{self.where(key)}: {text}")

    def warn(self, text: str, key: str = "") -> None:
        """The same as a warning, once a process: the file is read at every open."""
        message = f"{self.where(key)}: {text}"
        if message not in _warned:
            _warned.add(message)
            log.warning("%s", message)

    def warn_of_strangers(self, known: frozenset[str]) -> None:
        """Name the keys that Litestream does not know, and so passes over in silence."""
        for key in self._nodes:
            if key not in known:
                self.warn(f"{key!r} is no key that Litestream knows here: ignored", key)

    def text(self, key: str) -> str:
        """The scalar at `key`, as it is written."""
        node = self._node(key)
        if node is None:
            return ""
        if not _is_text(node):
            raise self.error(f"{key} must be a single value", key)
        if "\0" in node.value:
            raise self.error(f"{key} has a NUL character", key)
        return str(node.value)

    def flag(self, key: str) -> bool | None:
        """The boolean at `key`; None where there is none."""
        value = self.text(key).lower()
        if value not in _TRUE | _FALSE:
            raise self.error(f"{key} must be true or false", key)
        return None if value == "" else value in _TRUE

    def section(self, key: str) -> Section | None:
        """The mapping at `key`."""
        node = self._node(key)
        if node is None:
            return None
        if not _is_mapping(node):
            raise self.error(f"{key} must have keys below it", key)
        return Section(node, self._path)

    def sections(self, key: str) -> list[Section]:
        """The list of mappings at `key`."""
        node = self._node(key)
        if node is None:
            return []
        if _kind(node) != "sequence" or not all(map(_is_mapping, node.value)):
            raise self.error(f"{key} must be a list, each item with keys ('- path: ...')", key)
        return [Section(item, self._path) for item in node.value]

    def has_items(self, key: str) -> bool:
        """Whether something stands at `key` that is neither empty nor null."""
        node = self._node(key)
        return node is not None and bool(node.value)

    def _node(self, key: str) -> yaml.Node | None:
        node = self._nodes.get(key, (None, 0))[0]
        return None if node is None or node.tag == _NULL else node


def parse(text: str, path: str) -> Section:
    """The top of the file. Raises `ConfigError` for what is not YAML, or no mapping.

    YAML's own refusals quote the line that they are about, which may be a secret: only their place and kind is told.
    """
    import yaml  # 20 ms, for those who have such a file

    try:
        node = _compose(text)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        problem = _QUOTED.sub("(a text)", exc.problem or exc.context or "malformed")
        line = f":{mark.line + 1}" if mark else ""
    except yaml.YAMLError:
        line, problem = "", "it has a character that YAML does not allow"
    except RecursionError:
        line, problem = "", "it is nested too deeply"
    else:
        if node is not None and node.tag == _NULL:
            node = None
        if node is not None and not _is_mapping(node):
            raise ConfigError(f"{path}:1: expected keys such as 'dbs:' at the top, found a {_kind(node)}")
        return Section(node, path)
    raise ConfigError(f"{path}{line} is not YAML: {problem}; correct it there, Litestream reads it as well")


def _compose(text: str) -> yaml.Node | None:
    """The first document, with its merge keys (``<<``) resolved."""
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node: yaml.Node | None = loader.get_node() if loader.check_node() else None
        for mapping in _mappings(node):
            loader.flatten_mapping(mapping)
        return node
    finally:
        loader.dispose()


def _mappings(top: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """Every mapping, each once: aliases make one node appear in many places."""
    seen: set[int] = set()
    waiting = [] if top is None else [top]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if _is_mapping(node):
            yield node
            waiting += [each for pair in node.value for each in pair]
        elif _kind(node) == "sequence":
            waiting += node.value


def _kind(node: yaml.Node) -> str:
    """scalar, sequence or mapping."""
    return str(getattr(node, "id", ""))


def _is_text(node: yaml.Node) -> TypeGuard[yaml.ScalarNode]:
    return _kind(node) == "scalar"


def _is_mapping(node: yaml.Node) -> TypeGuard[yaml.MappingNode]:
    return _kind(node) == "mapping"
