"""Real SQLite databases in memory, with what SQLite itself says of their b-trees (the dbstat virtual table)."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import apsw

from lazyreplica.trees import Trees


@dataclass
class Tree:
    """One b-tree, according to dbstat."""

    levels: list[list[int]] = field(default_factory=list)
    """Page numbers in key order: the root, its children, ..., the leaves."""
    chains: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Overflow pages of a cell, by (page, number of the cell), in the order of the pages' paths."""

    @property
    def root(self) -> int:
        return self.levels[0][0]

    @property
    def leaves(self) -> list[int]:
        return self.levels[-1]

    @property
    def interiors(self) -> list[int]:
        return [pgno for level in self.levels[:-1] for pgno in level]


class Database:
    """A database made by SQL statements, its pages and its trees by name.

    The statements may use a table `temp.n` of the numbers `i` = 1, 2, ..., 9999, and `noise(i, size)`: that many
    characters that no other number has, the same at each run.
    """

    def __init__(self, statements: Iterable[str], page_size: int = 512) -> None:
        self.con = apsw.Connection(":memory:")
        self.page_size = page_size
        self.con.execute(f"PRAGMA page_size={page_size}; PRAGMA temp_store=MEMORY")
        self.con.execute("CREATE TEMP TABLE n(i INTEGER PRIMARY KEY)")
        self.con.executemany("INSERT INTO n VALUES (?)", ((i,) for i in range(1, 10_000)))
        self.con.create_scalar_function("noise", noise, 2, deterministic=True)
        for statement in statements:
            self.con.execute(statement)
        self.data = bytes(self.con.serialize("main"))
        self.trees = _trees(self.con)

    @property
    def commit(self) -> int:
        return len(self.data) // self.page_size

    def page(self, pgno: int) -> bytes:
        return self.data[(pgno - 1) * self.page_size : pgno * self.page_size]

    def column(self, sql: str) -> list[int]:
        return [value for (value,) in self.con.execute(sql)]

    def known(self, unknown: Iterable[int] = ()) -> Trees:
        """What is known when all interior pages but the `unknown` ones, and the schema, were seen."""
        trees, unknown = Trees(self.page_size), set(unknown)
        for tree in self.trees.values():
            for pgno in tree.interiors:
                if pgno not in unknown:
                    assert trees.learn(pgno, self.page(pgno)) is not None
        trees.learn_schema({pgno: self.page(pgno) for pgno in self.trees["sqlite_schema"].leaves}, self.data[56:60])
        return trees


def noise(*args: object) -> str:
    key, size = args
    assert isinstance(key, int)
    assert isinstance(size, int)
    return random.Random(key).randbytes(size // 2 + 1).hex()[:size]


def _trees(con: apsw.Connection) -> dict[str, Tree]:
    """From the path of each page: `/` is the root, `/00a/` its child 10, `/00a/003+000000` a chain of its cell 3."""
    found: dict[str, list[tuple[list[int], int]]] = {}
    trees: dict[str, Tree] = {}
    rows = list(con.execute("SELECT name, path, pageno, pagetype FROM dbstat"))
    for name, path, pgno, kind in rows:
        if kind != "overflow":
            found.setdefault(name, []).append(([int(step, 16) for step in path.split("/")[1:-1]], pgno))
    for name, pages in found.items():
        tree = trees[name] = Tree()
        for steps, pgno in sorted(pages):
            while len(tree.levels) <= len(steps):
                tree.levels.append([])
            tree.levels[len(steps)].append(pgno)
    by_path = {(name, path): pgno for name, path, pgno, kind in rows if kind != "overflow"}
    for name, path, pgno, kind in sorted(rows):
        if kind == "overflow":
            page, cell = path.split("+")[0].rsplit("/", 1)
            trees[name].chains.setdefault((by_path[name, page + "/"], int(cell, 16)), []).append(pgno)
    return trees
