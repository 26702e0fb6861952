"""Imports point one way: down the list in docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
ENGINE = PROJECT / "src" / "lazyreplica"

# Top to bottom; a name stands for a module or a package of the engine.
ORDER = [
    "__init__",
    "cli",
    "results",
    "verify",
    "publish",
    "copies",
    "standby",
    "restore",
    "unfinished",
    "rollback",
    "registry",
    "export",
    "naming",
    "litestream_yml",
    "replica",
    "crawl",
    "damage",
    "gather",
    "opening",
    "hydration",
    "hydrator",
    "attachment",
    "bulkfilling",
    "filling",
    "follower",
    "fetcher",
    "relocate",
    "history",
    "boundary",
    "bulk",
    "cache",
    "readahead",
    "prefetch",
    "trees",
    "btree",
    "spans",
    "head",
    "layers",
    "extents",
    "local",
    "snapshot",
    "pagemap",
    "plan",
    "storage",
    "ltx",
    "stats",
    "readcounters",
    "listeners",
    "events",
    "config",
    "moments",
    "dbheader",
    "clock",
    "errors",
]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "lazyreplica":
                yield from (f"lazyreplica.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    return path.relative_to(ENGINE).parts[0].removesuffix(".py")


def test_every_module_has_a_place() -> None:
    assert {part(path) for path in ENGINE.rglob("*.py")} == set(ORDER)


def test_the_engine_imports_downwards_only() -> None:
    for path in ENGINE.rglob("*.py"):
        here = part(path)
        for module in imports(path):
            if module.startswith("lazyreplica."):
                there = module.split(".")[1]
                allowed = there == here or ORDER.index(there) > ORDER.index(here)
                assert allowed, f"{path.name} imports {module}, which stands above it"


def test_only_the_entrances_know_the_vfs() -> None:
    for path in ENGINE.rglob("*.py"):
        if any(module.split(".")[0] == "lazyreplica_vfs" for module in imports(path)):
            assert part(path) in {"__init__", "cli"}, path


def test_the_vfs_knows_no_bytes_no_network_and_no_threads() -> None:
    for path in (PROJECT / "vfs").rglob("*.py"):
        for module in imports(path):
            assert not module.startswith(("lazyreplica.storage", "http", "socket")), f"{path.name}: {module}"
            assert module not in {"lazyreplica.ltx.decoder", "lazyreplica.ltx.encoder", "lazyreplica.ltx.frame"}, path
            assert module != "threading", f"{path.name} has threads of its own"
