"""B-tree pages as SQLite writes them, against its own account of them (dbstat and SQL), and bytes that are none."""

from __future__ import annotations

import ctypes
import random
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lazyreplica import btree

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
# At both sides of every length of a variable-length number, and of an integer in a record.
ROWIDS = sorted(
    {0, 1, -1, INT64_MIN, INT64_MAX}
    | {(1 << bits) + n for bits in range(7, 63, 7) for n in (-1, 0)}
    | {sign * ((1 << bits - 1) + n) for sign in (1, -1) for bits in (8, 16, 24, 32, 48) for n in (-1, 0, 1)}
    | {random.Random(bits).randrange(-(1 << bits), 1 << bits) for bits in range(2, 64) for _ in range(4)}
    | set(range(1000, 1200))
)

LONG_NAME = "n" * 70_000
"""On overflow pages, whatever the page size."""

# index: its columns and where they come from
INDEXES = {
    "by_text": "s",
    "by_integer": "a",
    "by_rare": "rare",
    "by_two": "s, a",
    "by_falling": "a DESC, s",
    "by_long_text": "long, a",
    "by_key_of_rowid_size": "a % 2",
}


@dataclass(frozen=True)
class Stat:
    """One row of dbstat."""

    pgno: int
    cells: int
    is_leaf: bool


@dataclass
class Tree:
    """A b-tree according to dbstat, by path: `/` is the root, `/00a/` its child 10."""

    pages: dict[str, Stat] = field(default_factory=dict)
    chains: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Overflow pages of a cell, by (page, number of the cell)."""

    def children(self, path: str) -> list[str]:
        return [f"{path}{n:03x}/" for n in range(self.pages[path].cells + 1)]

    def cells(self, *, of_table: bool, path: str = "/") -> Iterator[tuple[int, int]]:
        """Every entry in key order, as (page, number of the cell)."""
        page = self.pages[path]
        if page.is_leaf:
            yield from ((page.pgno, n) for n in range(page.cells))
            return
        for n, child in enumerate(self.children(path)):
            yield from self.cells(of_table=of_table, path=child)
            if n < page.cells and not of_table:
                yield page.pgno, n


class Database:
    """A file, with what SQLite says is in it."""

    def __init__(self, path: Path, page_size: int, reserved: int, encoding: str) -> None:
        self.page_size, self.usable, self.encoding = page_size, page_size - reserved, encoding
        self.con = apsw.Connection(str(path))
        number = ctypes.c_int(reserved)
        assert self.con.file_control("main", apsw.SQLITE_FCNTL_RESERVE_BYTES, ctypes.addressof(number))
        self.con.execute(f"PRAGMA page_size={page_size}; PRAGMA encoding='{encoding}'; PRAGMA synchronous=OFF; BEGIN")
        self._fill()
        self.con.execute("COMMIT")
        self.data = path.read_bytes()
        assert int.from_bytes(self.data[16:18]) == page_size & 0xFFFF or page_size == 65536
        assert self.data[20] == reserved
        self.trees: dict[str, Tree] = {}
        for name, place, pgno, kind, cells in self.con.execute(
            "SELECT name, path, pageno, pagetype, ncell FROM dbstat ORDER BY path"
        ):
            tree = self.trees.setdefault(name, Tree())
            if kind != "overflow":
                tree.pages[place] = Stat(pgno, cells, kind == "leaf")
        for name, place, pgno in self.con.execute(
            "SELECT name, path, pageno FROM dbstat WHERE pagetype = 'overflow' ORDER BY path"
        ):
            tree = self.trees[name]
            page, cell = place.split("+")[0].rsplit("/", 1)
            tree.chains.setdefault((tree.pages[page + "/"].pgno, int(cell, 16)), []).append(pgno)

    def _fill(self) -> None:
        row = self.page_size // 12
        self.con.execute("CREATE TABLE t(a INT, s TEXT, rare INT, long TEXT, padding BLOB)")
        shuffled = random.Random(7).sample(ROWIDS, len(ROWIDS))
        self.con.executemany(
            "INSERT INTO t(rowid, a, s, rare, long, padding) VALUES (?, ?, ?, ?, ?, zeroblob(?))",
            (
                (
                    rowid,
                    rowid * 7919 % 211 - 100,
                    f"ключ {n * 37 % 101}",
                    n if n % 5 == 0 else None,
                    "x" * (n % 40 * self.page_size // 80),
                    row,
                )
                for n, rowid in enumerate(shuffled)
            ),
        )
        for name, columns in INDEXES.items():
            self.con.execute(f"CREATE INDEX {name} ON t({columns})")
        many = [f"c{n}" for n in range(140)]
        self.con.execute(f"CREATE TABLE wide({', '.join(many)}); CREATE INDEX by_many ON wide({', '.join(many)})")
        self.con.execute(f"INSERT INTO wide(rowid, c0) VALUES {', '.join(f'({n * n}, {n})' for n in range(30))}")

        # Lengths whose serial types, of several bytes, end in a byte that looks like an integer's (section 2.1).
        self.con.execute("CREATE TABLE w(k TEXT PRIMARY KEY, v TEXT) WITHOUT ROWID")
        self.con.executemany(
            "INSERT INTO w VALUES (?, ?)", ((f"{n:0{row}}", "v" * (58 + n % 5)) for n in range(2, 150))
        )
        # Chains; and byte by byte where payloads begin to spill, of the table and of its index, with none or one
        # overflow page full (section 1.6: X, and K <= X).
        self.con.execute("CREATE TABLE blobs(b BLOB)")
        bounds = self.usable - 35, (self.usable - 12) * 64 // 255 - 23
        sizes = [self.usable * n // 3 for n in range(25)]
        sizes += [bound + more - n for bound in bounds for more in (0, self.usable - 4) for n in range(-2, 20)]
        self.con.executemany(
            "INSERT INTO blobs(rowid, b) VALUES (?, zeroblob(?))",
            ((-n if n % 3 else n, size) for n, size in enumerate(sizes, 1)),
        )
        self.con.execute("CREATE INDEX blobs_b ON blobs(b)")

        for n in range(25):
            self.con.execute(f'CREATE TABLE "täble 表 😀 {n}"(a, b UNIQUE)')
            self.con.execute(f"CREATE TABLE c{n}(a /* {'x' * (n * 61 % 2000)} */)")
        self.con.execute(f'CREATE TABLE "{LONG_NAME}"(a)')
        self.con.execute("CREATE VIEW v AS SELECT 1; CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END")
        self.con.execute("CREATE VIRTUAL TABLE search USING fts5(a)")

    def page(self, pgno: int) -> bytes:
        return self.data[(pgno - 1) * self.page_size : pgno * self.page_size]

    def args(self, pgno: int) -> tuple[bytes, int, int]:
        return self.page(pgno), pgno, self.usable

    def is_table(self, name: str) -> bool:
        if name in {"sqlite_schema", "t", "wide", "blobs"}:
            return True
        assert name in {"w", "by_many", "blobs_b", *INDEXES}
        return False

    def column(self, sql: str) -> list[Any]:
        return [value for (value,) in self.con.execute(sql)]


NAMES = ["sqlite_schema", "t", "wide", "blobs", "w", "by_many", "blobs_b", *INDEXES]


@pytest.fixture(
    scope="module",
    params=[
        # Reserved bytes with which the divisions of section 1.6 leave a large remainder, ...
        (512, 30, "UTF-8"),
        (512, 32, "UTF-16le"),  # ... or the fewest usable ones that there can be.
        (1024, 8, "UTF-16be"),
        (4096, 0, "UTF-8"),
        (4096, 20, "UTF-16le"),
        (65536, 0, "UTF-8"),
        (65536, 37, "UTF-16le"),
    ],
    ids=lambda param: "-".join(map(str, param)),
)
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    database = Database(tmp_path_factory.mktemp("btree") / "db", *request.param)
    yield database
    database.con.close()


# -- against SQLite --


def test_kinds_and_children_are_those_of_dbstat(database: Database) -> None:
    interiors = 0
    for name in NAMES:
        tree, is_table = database.trees[name], database.is_table(name)
        for path, stat in tree.pages.items():
            leaf, inner = (
                (btree.LEAF_TABLE, btree.INTERIOR_TABLE) if is_table else (btree.LEAF_INDEX, btree.INTERIOR_INDEX)
            )
            assert btree.kind(database.page(stat.pgno), stat.pgno) == (leaf if stat.is_leaf else inner)
            found = btree.interior(*database.args(stat.pgno))
            if stat.is_leaf:
                assert found is None
                continue
            assert found
            interiors += 1
            assert list(found.children) == [tree.pages[child].pgno for child in tree.children(path)]
            assert (found.is_table, found.children.typecode, found.keys.typecode) == (is_table, "I", "q")
            assert len(found.keys) == (stat.cells if is_table else 0)
    assert interiors > 6
    # Page 1 is among them, unless there is room for the whole schema.
    root = database.trees["sqlite_schema"].pages["/"]
    assert root.pgno == 1
    assert not root.is_leaf or database.page_size == 65536


def test_keys_lead_to_the_leaf_of_each_rowid(database: Database) -> None:
    for name in ("t", "blobs", "wide"):
        tree = database.trees[name]
        rowids = database.column(f"SELECT rowid FROM {name} ORDER BY rowid")
        leaf_of = {
            rowid: pgno for rowid, (pgno, _) in zip(rowids, tree.cells(of_table=True), strict=True)
        }  # in order, as many as dbstat counts on each leaf
        found = {stat.pgno: btree.interior(*database.args(stat.pgno)) for stat in tree.pages.values()}
        for rowid, leaf in leaf_of.items():
            pgno = tree.pages["/"].pgno
            while page := found[pgno]:
                pgno = page.child_for(rowid)
            assert pgno == leaf
        for path, stat in tree.pages.items():
            if page := found[stat.pgno]:
                # Nothing was deleted, so a key is the greatest rowid below its child.
                greatest = [
                    max(rowid for rowid in rowids if leaf_of[rowid] in leaves)
                    for child in tree.children(path)[:-1]
                    for leaves in [{pgno for pgno, _ in tree.cells(of_table=True, path=child)}]
                ]
                assert list(page.keys) == greatest
    assert len(database.trees["t"].pages) > 20


@pytest.mark.parametrize("index", [*INDEXES, "by_many", "blobs_b"])
def test_index_entries_point_to_the_rowids_in_order_of_the_key(database: Database, index: str) -> None:
    table = {"by_many": "wide", "blobs_b": "blobs"}.get(index, "t")
    columns = {"by_many": "c0", "blobs_b": "b"}.get(index) or INDEXES[index]
    rowids = database.column(f"SELECT rowid FROM {table} INDEXED BY {index} ORDER BY {columns}, rowid")
    tree = database.trees[index]
    expected: dict[int, list[int]] = {stat.pgno: [] for stat in tree.pages.values()}
    # Of 141 columns, the types alone are more than a small page keeps of a record.
    types_spill = index == "by_many" and database.page_size == 512
    left_out = 0
    for rowid, (pgno, cell) in zip(rowids, tree.cells(of_table=False), strict=True):
        # The end of a record that spills is on an overflow page, unless 0 or 1, which take no bytes.
        if (pgno, cell) in tree.chains and (types_spill or rowid not in {0, 1}):
            left_out += 1
        else:
            expected[pgno].append(rowid)
    for pgno, of_page in expected.items():
        found = btree.index_rowids(*database.args(pgno))
        assert (list(found), found.typecode) == (of_page, "q")
    assert (left_out > 0) == (index in {"by_long_text", "blobs_b"} or types_spill)


def test_overflow_chains_are_those_of_dbstat(database: Database) -> None:
    longest = 0
    for name in NAMES:
        tree = database.trees[name]
        for stat in tree.pages.values():
            chains = [tree.chains[stat.pgno, n] for n in range(stat.cells) if (stat.pgno, n) in tree.chains]
            found = btree.overflow_pages(*database.args(stat.pgno))
            assert (list(found), found.typecode) == ([chain[0] for chain in chains], "I")
            with_lengths = [(chain[0], len(chain)) for chain in chains]
            assert btree.overflow_chains(*database.args(stat.pgno)) == with_lengths
            for chain in chains:
                assert [btree.next_overflow(database.page(pgno)) for pgno in chain] == [*chain[1:], 0]
                longest = max(longest, len(chain))
    assert longest >= 7
    assert all(database.trees[name].chains for name in ("blobs", "blobs_b", "sqlite_schema", "by_long_text"))


def test_schema_rows_are_those_of_sqlite(database: Database) -> None:
    rows = list(database.con.execute("SELECT type, name, tbl_name, rootpage FROM sqlite_schema ORDER BY rowid"))
    tree = database.trees["sqlite_schema"]
    expected: dict[int, list[btree.SchemaRow]] = {stat.pgno: [] for stat in tree.pages.values()}
    for row, (pgno, _) in zip(rows, tree.cells(of_table=True), strict=True):
        if row[0] in {"table", "index"} and row[3] and row[1] != LONG_NAME:
            expected[pgno].append(btree.SchemaRow(*row))
    for pgno, of_page in expected.items():
        assert btree.schema_rows(*database.args(pgno), database.encoding.lower()) == of_page
    found = {row.name: row for of_page in expected.values() for row in of_page}
    assert {"t", "by_text", "täble 表 😀 24", "c24", "search_data"} <= found.keys()
    # The root page tells a WITHOUT ROWID table.
    kinds = [btree.kind(database.page(found[name].root), found[name].root) for name in ("t", "w")]
    assert kinds == [btree.INTERIOR_TABLE, btree.INTERIOR_INDEX]


def test_a_table_without_rowids_yields_none(database: Database) -> None:
    for stat in database.trees["w"].pages.values():
        assert list(btree.index_rowids(*database.args(stat.pgno))) == []


# -- made by hand --


def varint(value: int) -> bytes:
    """As SQLite writes it (section 1.6, "varint")."""
    value &= (1 << 64) - 1
    if value >= 1 << 56:
        return bytes(0x80 | value >> shift & 0x7F for shift in range(57, 7, -7)) + bytes((value & 0xFF,))
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.insert(0, 0x80 | value & 0x7F)
    return bytes(digits)


def a_page(kind: int, cells: list[bytes], *, right: int = 99, pgno: int = 2, page_size: int = 4096) -> bytes:
    """A page with these cells in this order, and nothing but them."""
    page, at, places = bytearray(page_size), page_size, []
    for cell in cells:
        at -= len(cell)
        page[at : at + len(cell)] = cell
        places.append(at)
    header = struct.pack(">BHHHB", kind, 0, len(cells), at & 0xFFFF, 0)
    header += struct.pack(">I", right) if kind in {btree.INTERIOR_INDEX, btree.INTERIOR_TABLE} else b""
    header += struct.pack(f">{len(places)}H", *places)
    first = 100 if pgno == 1 else 0
    page[first : first + len(header)] = header
    return bytes(page)


PGNOS = st.integers(3, (1 << 32) - 1)


@given(
    st.lists(
        st.tuples(PGNOS, st.integers(0, 63).flatmap(lambda n: st.integers(-(1 << n), (1 << n) - 1))), max_size=200
    ),
    PGNOS,
    st.sampled_from([1, 2]),
)
@example([], 9, 1)
@example([(7 + n, n) for n in range(400)], 9, 2)
@example([(7, INT64_MIN)], 9, 2)
def test_any_rowids_and_children_are_read_back(cells: list[tuple[int, int]], right: int, pgno: int) -> None:
    raw = [struct.pack(">I", child) + varint(rowid) for child, rowid in cells]
    found = btree.interior(a_page(btree.INTERIOR_TABLE, raw, right=right, pgno=pgno), pgno, 4096)
    assert found == btree.Interior(
        True, array("I", [*(child for child, _ in cells), right]), array("q", [rowid for _, rowid in cells])
    )


def test_child_for_is_the_child_of_the_first_key_that_is_not_less() -> None:
    found = btree.Interior(True, array("I", [10, 20, 30]), array("q", [-5, 100]))
    children = {INT64_MIN: 10, -5: 10, -4: 20, 100: 20, 101: 30, INT64_MAX: 30}
    assert {rowid: found.child_for(rowid) for rowid in children} == children


GOOD = a_page(btree.INTERIOR_TABLE, [struct.pack(">IB", 10 + n, n) for n in range(3)])


@pytest.mark.parametrize(
    ("page", "pgno", "usable"),
    [
        (GOOD[:4095], 2, 4096),
        (GOOD[:100], 2, 4096),
        (b"", 2, 4096),
        (b"", 1, 4096),
        (GOOD, 1, 4096),  # its b-tree would begin after the database header
        (GOOD, 2, 4090),  # cells in the reserved bytes
        (GOOD, 2, 479),
        (GOOD, 2, 4),
        (GOOD, 2, 0),
        (GOOD, 2, -4096),
        (GOOD, 99, 4096),  # its own child
        (GOOD, 11, 4096),
        (b"\x0d" + GOOD[1:], 2, 4096),
        (b"\x03" + GOOD[1:], 2, 4096),
        (GOOD[:3] + b"\xff\xff" + GOOD[5:], 2, 4096),  # cells
        (GOOD[:3] + b"\x02\xac" + GOOD[5:], 2, 4096),  # 684 cells: more than can be
        (GOOD[:12] + b"\xff\xff" + GOOD[14:], 2, 4096),  # a pointer past the end
        (GOOD[:12] + b"\x0f\xfd" + GOOD[14:], 2, 4096),  # ... of which only the first bytes are on the page
        (GOOD[:8] + bytes(4) + GOOD[12:], 2, 4096),  # no right-most child
        (a_page(btree.INTERIOR_TABLE, [bytes(5)]), 2, 4096),  # child 0
    ],
)
def test_an_implausible_interior_page_is_none(page: bytes, pgno: int, usable: int) -> None:
    assert btree.interior(GOOD, 2, 4096) is not None
    assert btree.interior(page, pgno, usable) is None


def test_a_kind_is_one_of_four() -> None:
    for kind in range(256):
        page = bytes((kind,)) + bytes(99) + bytes((kind ^ 7,))
        assert btree.kind(page, 2) == (kind if kind in {2, 5, 10, 13} else 0)
        assert btree.kind(page, 1) == (kind ^ 7 if kind ^ 7 in {2, 5, 10, 13} else 0)
    assert btree.kind(page[:100], 1) == btree.kind(b"", 2) == 0


@pytest.mark.parametrize(
    ("entry", "rowids"),
    [
        ("05  03 01 01  05 fe", [-2]),
        ("80808080 80808080 05  03 01 01  05 fe", [-2]),  # 5, in more bytes than it takes
        ("07  808005 01 01  05 fe", [-2]),
        ("04  03 01 08  05", [0]),
        ("04  03 01 09  05", [1]),
        ("04  03 01 00  05", []),  # NULL
        ("04  03 01 0a  05", []),  # reserved
        ("0c  03 01 07  05 4000000000000000", []),  # 2.0
        ("3e  04 01 8101  05" + "41" * 58, []),  # type 129: a text
        ("8405  03 01 01  05 fe", []),  # announces 517 bytes
        ("02  02 02", []),  # no room for its value
        ("02  00 01", []),  # no header
        ("02  01 01", []),  # no column
        ("02  03 01 08", []),  # a header longer than the record
    ],
)
def test_entries_made_by_hand(entry: str, rowids: list[int]) -> None:
    cell = bytes.fromhex(entry)
    for kind, child in ((btree.LEAF_INDEX, b""), (btree.INTERIOR_INDEX, b"\0\0\0\7")):
        page = a_page(kind, [bytes(100), child + cell])
        assert list(btree.index_rowids(page, 2, 4096)) == rowids


@pytest.mark.parametrize(("columns", "rowids"), [(35, []), (34, [1]), (33, [1])])
def test_a_rowid_of_no_bytes_is_known_if_its_type_is_on_the_page(columns: int, rowids: list[int]) -> None:
    # 480 usable bytes keep at least 35 of a payload that spills; this one keeps just that
    header = bytes((columns + 1,)) + b"\1" * (columns - 1) + b"\x09"
    size = 35 + 476
    local = (header + bytes(35))[:35]
    # behind them the overflow page, whose number ends like the type
    cell = varint(size) + local + b"\x09\x09\x09\x09"
    page = a_page(btree.LEAF_INDEX, [cell], page_size=480)
    assert list(btree.index_rowids(page, 2, 480)) == rowids
    assert list(btree.overflow_pages(page, 2, 480)) == [0x09090909]
    # no room for the number of the overflow page
    assert list(btree.overflow_pages(a_page(btree.LEAF_INDEX, [cell[:-1]], page_size=480), 2, 480)) == []
    assert list(btree.overflow_pages(a_page(btree.LEAF_INDEX, [cell + b"\1"], page_size=481), 2, 480)) != []


@pytest.mark.parametrize(("size", "chains"), [((1 << 31) - 1, [(7, 524_800)]), (1 << 31, [])])
def test_no_chain_is_longer_than_sqlite_can_make_it(size: int, chains: list[tuple[int, int]]) -> None:
    # 4096 usable bytes keep 489 (M) and what the full overflow pages leave over, of 2 GiB - 1 byte: 2047
    local = 489 + (size - 489) % 4092
    page = a_page(btree.LEAF_TABLE, [varint(size) + b"\1" + bytes(local) + b"\0\0\0\7"])
    assert local < 4061
    assert btree.overflow_chains(page, 2, 4096) == chains


TEXTS = [(23, b"table"), (15, b"n"), (15, b"t")]
ROOT = (1, b"\7")


@pytest.mark.parametrize(
    ("columns", "root"),
    [
        ([*TEXTS, ROOT], 7),
        ([*TEXTS, (1, b"\2")], 2),
        ([*TEXTS, (1, b"\1")], None),  # of the schema itself
        ([*TEXTS, (8, b"")], None),  # a virtual table's
        ([*TEXTS, (0, b"")], None),
        ([*TEXTS, (1, b"\xfe")], None),  # -2
        ([*TEXTS, (4, b"\xff\xff\xff\xfe")], None),
        ([*TEXTS, (5, b"\0\0\xff\xff\xff\xff")], 0xFFFF_FFFF),
        ([*TEXTS, (5, b"\0\1\0\0\0\0")], None),
        ([*TEXTS, (7, b"\0\0\0\0\0\0\0\7")], None),  # a float
        ([*TEXTS, (15, b"\7")], None),  # a text
        ([*TEXTS, (10, b"")], None),
        ([*TEXTS, (1, b"")], None),  # past the end of the record
        ([(13, b""), *TEXTS[1:], ROOT], None),
        ([TEXTS[0], (13, b""), TEXTS[2], ROOT], 7),  # a table may have no name
        ([TEXTS[0], (12, b""), TEXTS[2], ROOT], None),  # but a blob is none
        ([TEXTS[0], (14, b"n"), TEXTS[2], ROOT], None),
        ([TEXTS[0], (1, b"n"), TEXTS[2], ROOT], None),
        ([TEXTS[0], (0, b""), TEXTS[2], ROOT], None),
        ([TEXTS[0], (1013, b"n"), TEXTS[2], ROOT], None),  # past the end of the record
        ([(21, b"view"), *TEXTS[1:], ROOT], None),
        ([(23, b"INDEX"), *TEXTS[1:], ROOT], None),
    ],
)
def test_schema_rows_made_by_hand(columns: list[tuple[int, bytes]], root: int | None) -> None:
    serials = b"".join(varint(serial) for serial, _ in columns)
    record = bytes((len(serials) + 1,)) + serials + b"".join(value for _, value in columns)
    page = a_page(btree.LEAF_TABLE, [b"\7" * 50, bytes((len(record), 1)) + record])
    found = btree.schema_rows(page, 2, 4096)
    assert found == ([btree.SchemaRow("table", columns[1][1].decode(), "t", root)] if root else [])


def test_next_overflow_of_less_than_a_number_is_the_end() -> None:
    assert [btree.next_overflow(b"\0\0\1\2"[:n]) for n in range(5)] == [0, 0, 0, 0, 258]


def test_cells_on_top_of_one_another_do_not_multiply_the_text() -> None:
    name = b"n" * 60_000
    serials = b"".join(varint(2 * len(text) + 13) for text in (b"table", name, b"t")) + b"\1\0"
    record = bytes((len(serials) + 1,)) + serials + b"table" + name + b"t\7"
    page = bytearray(a_page(btree.LEAF_TABLE, [varint(len(record)) + b"\1" + record], page_size=65536))
    (row,) = btree.schema_rows(bytes(page), 2, 65536)
    assert row == btree.SchemaRow("table", name.decode(), "t", 7)
    page[3:5] = struct.pack(">H", 2000)
    page[8:4008] = page[8:10] * 2000
    assert btree.schema_rows(bytes(page), 2, 65536) == [row]


# -- any bytes --


def check_bounds(page: bytes, pgno: int, usable: int) -> None:
    """Nothing raises, and nothing is larger than a page can make it."""
    most_cells = max(0, usable) // 6
    found = btree.interior(page, pgno, usable)
    if found:
        assert 1 <= len(found.children) <= most_cells + 1
        assert len(found.keys) == (len(found.children) - 1 if found.is_table else 0)
        assert 0 not in found.children
        assert pgno not in found.children
        assert {found.child_for(rowid) for rowid in (INT64_MIN, 0, INT64_MAX)} <= set(found.children)
    assert len(btree.index_rowids(page, pgno, usable)) <= most_cells
    firsts = btree.overflow_pages(page, pgno, usable)
    assert len(firsts) <= most_cells
    assert 0 not in firsts
    assert all(0 < length < 5_000_000 for _, length in btree.overflow_chains(page, pgno, usable))
    for encoding in ("utf-8", "utf-16le", "utf-16be"):
        rows = btree.schema_rows(page, pgno, usable, encoding)
        assert len(rows) <= most_cells
        assert sum(len(row.type + row.name + row.table) for row in rows) <= max(0, usable)
        assert all(row.type in {"table", "index"} and 1 < row.root < 1 << 32 for row in rows)
    assert 0 <= btree.next_overflow(page) < 1 << 32


KINDS = st.sampled_from([btree.INTERIOR_INDEX, btree.INTERIOR_TABLE, btree.LEAF_INDEX, btree.LEAF_TABLE])


RANDOM = st.integers(0, 1 << 32).map(random.Random)


@settings(max_examples=100)
@given(RANDOM, KINDS, st.sampled_from([512, 4096, 65536]), st.sampled_from([1, 2]))
def test_random_bytes_behind_a_plausible_header(rng: random.Random, kind: int, page_size: int, pgno: int) -> None:
    header = 100 if pgno == 1 else 0
    cells = rng.choice([0, 1, 2, 20, (page_size - header - 12) // 6])
    page = bytearray(rng.choice([rng.randbytes(page_size), b"\xff" * page_size, bytes(page_size)]))
    places = [rng.randrange(rng.choice([0, page_size - 8]), page_size - 3) for _ in range(cells)]
    first = header + (12 if kind in {btree.INTERIOR_INDEX, btree.INTERIOR_TABLE} else 8)
    page[first : first + 2 * cells] = struct.pack(f">{cells}H", *places)
    page[header : header + 5] = struct.pack(">BHH", kind, 0, cells)
    check_bounds(bytes(page), pgno, page_size)


@given(
    st.binary(max_size=200)
    | st.builds(lambda kind, rest: bytes((kind,)) + rest, KINDS, st.binary(min_size=470, max_size=600)),
    st.integers(-10, 700),
    st.sampled_from([1, 2]),
)
def test_any_bytes_and_sizes(page: bytes, usable: int, pgno: int) -> None:
    check_bounds(page, pgno, usable)
    check_bounds(page, pgno, len(page))


@settings(max_examples=20)
@given(RANDOM)
def test_real_pages_with_damage(database: Database, rng: random.Random) -> None:
    for name in NAMES:
        stat = rng.choice(list(database.trees[name].pages.values()))
        page = bytearray(database.page(stat.pgno))
        start = 100 if stat.pgno == 1 else 0
        for _ in range(rng.choice([1, 4, 50])):
            # half of them in the header and the pointers, where each counts
            at = rng.randrange(start, rng.choice([start + 40, len(page)]))
            page[at] = rng.choice([0, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        check_bounds(bytes(page), stat.pgno, database.usable)
        check_bounds(bytes(page[: rng.randrange(len(page))]), stat.pgno, database.usable)


@pytest.mark.parametrize("kind", [btree.INTERIOR_INDEX, btree.INTERIOR_TABLE, btree.LEAF_INDEX, btree.LEAF_TABLE])
def test_a_cell_that_runs_past_the_end(kind: int) -> None:
    # The second may be the size of a payload that spills.
    for tail in (b"\xff\xff\xff\xff", b"\x81\xff\xff\xff"):
        for more in range(30):
            check_bounds(a_page(kind, [tail + tail[-1:] * more], page_size=512), 2, 512)
