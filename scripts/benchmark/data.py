"""The data sets, built once and kept below .cache/bench: replicas as Litestream leaves them, and what they restore to.

A social set goes through the real Litestream, transaction by transaction, so its level-0 files carry true WAL
positions. The levels above are merged here, as compaction would: Litestream itself does that by the clock, and an hour
is long. The real ``litestream restore`` then makes the database that every answer is compared with.
"""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from benchmark.huge import write_huge
from lazyreplica.ltx import DecodedFile, FileName, Header, decode_file, encode_file
from support.data import build_social, text
from support.databases import assert_same_files
from support.litestream import replicating, restore

FORMAT = 3
"""Part of the cache's directory names: raise it when what is built changes."""
RANGE_ROWS = 835
RANGE = "SELECT user_id, created FROM posts WHERE user_id BETWEEN ? AND ?"
"""Answered by the index alone, as the peer's figures were taken."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything, for a full and for a quick run."""

    posts: int
    """Of "social"; a tenth as many users, as many likes."""
    big: int
    """"big" is so many times "social"."""
    huge_pages: int
    group: int
    """Transactions that become one level-1 file."""


FULL = Size(posts=300_000, big=5, huge_pages=2_600_000, group=4)
QUICK = Size(posts=10_000, big=3, huge_pages=50_000, group=1)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A replica as local files, and what is known about it."""

    name: str
    replica: Path
    """Its levels are ``ltx/<level>/`` below."""
    database: Path | None
    """What `litestream restore` makes of it; None for "huge", which would be 10 GB."""
    facts: dict[str, Any]
    """What the workloads' queries need, and what the report tells."""

    @property
    def files(self) -> Iterator[tuple[int, Path]]:
        """(level, file), as a writer uploads them."""
        for level in sorted((self.replica / "ltx").iterdir(), key=lambda path: int(path.name)):
            for file in sorted(level.iterdir()):
                yield int(level.name), file


def dataset(name: str, size: Size, cache: Path, say: Say) -> Dataset:
    """The data set `name` ("social", "big" or "huge"), out of the cache or built now."""
    key = f"{size.huge_pages}" if name == "huge" else f"{size.posts * (size.big if name == 'big' else 1)}-{size.group}"
    directory = cache / f"{name}-{key}-v{FORMAT}"
    replica, database, facts = directory / "replica", directory / "native.db", directory / "facts.json"
    if not facts.is_file():
        say(f"building data set {name!r} in {directory}: once, it is kept")
        shutil.rmtree(directory, ignore_errors=True)
        replica.mkdir(parents=True)
        if name == "huge":
            path = _place(replica, 9, FileName(1, 1))
            found = write_huge(path, size.huge_pages)
        else:
            posts = size.posts * (size.big if name == "big" else 1)
            found = _build_social(directory, replica, database, posts, size.group)
        found["files"] = sum(1 for _ in Dataset(name, replica, None, {}).files)
        found["ltx_bytes"] = sum(path.stat().st_size for _, path in Dataset(name, replica, None, {}).files)
        facts.write_text(json.dumps(found, indent=1))  # last: a set without it is built again
    return Dataset(name, replica, None if name == "huge" else database, json.loads(facts.read_text()))


def _place(replica: Path, level: int, name: FileName) -> Path:
    path = replica / "ltx" / str(level) / str(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# The chain


@dataclass(frozen=True, slots=True)
class _Plan:
    """How many transactions end up in each level's part of the chain, in the order of the chain.

    Below the files of a chain lie the smaller ones that they were made of: those stay as well, as they do for hours
    in a real replica.
    """

    group: int
    """Level-0 files in one of level 1; 3 of those make one of level 2, 2 of those one of level 3."""

    @property
    def level1(self) -> int:
        return self.group

    @property
    def level2(self) -> int:
        return 3 * self.group

    @property
    def level3(self) -> int:
        return 6 * self.group

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """Transactions in the snapshot, and covered by two files each of levels 3, 2 and 1; then level 0 alone."""
        return 4 * self.group, 2 * self.level3, 2 * self.level2, 2 * self.level1, 32

    @property
    def total(self) -> int:
        return sum(self.counts)


def _build_social(directory: Path, replica: Path, database: Path, posts: int, group: int) -> dict[str, Any]:
    users = posts // 10
    plan = _Plan(group)
    primary, raw = directory / "primary.db", directory / "raw"
    build_social(primary, posts, users, posts)
    hot = _scatter_a_range(primary, users, posts)
    idle = "24h"
    with (
        replicating(
            primary, raw, levels=(idle,) * 3, snapshot_interval=idle, l0_retention=idle, sync_interval="50ms"
        ) as writer,
        closing(sqlite3.connect(primary, isolation_level=None)) as connection,
    ):
        rng = random.Random(posts)
        txid = writer.wait_synced(300)
        while txid < plan.total:
            _transaction(connection, rng, posts, users, hot)
            txid = writer.wait_synced(300)
    written = sorted((raw / "ltx" / "0").glob("*.ltx"))
    _compact(written, replica, plan)
    restore(replica, database, timeout=600)
    assert_same_files(primary, database)
    with closing(sqlite3.connect(database)) as connection:
        ((rows,),) = connection.execute("SELECT count(*) FROM posts WHERE user_id BETWEEN ? AND ?", hot)
        ((pages,),) = connection.execute("PRAGMA page_count")
    shutil.rmtree(raw)
    for path in directory.glob("primary.db*"):
        path.unlink()
    shutil.rmtree(directory / ".primary.db-litestream", ignore_errors=True)
    low, high = hot
    return {
        "posts": posts,
        "users": users,
        "range_low": low,
        "range_high": high,
        "range_rows": rows,
        "range_pages": _pages_of_range(database, low, high),
        "pages": pages,
    }


def _scatter_a_range(path: Path, users: int, posts: int) -> tuple[int, int]:
    """Neighbouring users with about `RANGE_ROWS` posts, whose part of the index is no longer as CREATE INDEX packed it.

    Posts that come later split the leaves, the new halves lie at the end of the file, and posts that go leave room: so
    the range is spread over some ten pages here and there, as ranges are in a database that has been in use.
    """
    wanted = min(RANGE_ROWS, posts // 20)
    rng = random.Random(wanted)
    with closing(sqlite3.connect(path)) as connection, connection:
        count, low, high = 0, users // 2, users // 2
        query = "SELECT user_id, count(*) FROM posts WHERE user_id >= ? GROUP BY user_id ORDER BY user_id"
        for user, written in connection.execute(query, (low,)):
            count, high = count + written, user
            if count >= wanted:
                break
        for _ in range(wanted):
            _post(connection, rng, rng.randint(low, high))
        connection.execute("DELETE FROM posts WHERE id > ?", (posts,))
    return low, high


def _pages_of_range(path: Path, low: int, high: int) -> int:
    """How many pages SQLite reads for `RANGE`, once the schema is known."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    before, _ = connection.status(apsw.SQLITE_DBSTATUS_CACHE_MISS)
    connection.execute(RANGE, (low, high)).fetchall()
    after, _ = connection.status(apsw.SQLITE_DBSTATUS_CACHE_MISS)
    connection.close()
    return after - before


def _post(connection: sqlite3.Connection, rng: random.Random, author: int) -> None:
    post = (author, 1_750_000_000, text(rng, 30), text(rng, 200))
    connection.execute("INSERT INTO posts(user_id, created, title, body) VALUES (?, ?, ?, ?)", post)


def _transaction(
    connection: sqlite3.Connection, rng: random.Random, posts: int, users: int, hot: tuple[int, int]
) -> None:
    """A small one, as an application makes them: some changes here and there, one more post, one more like.

    The users of the index range write nothing now: their index pages shall be read from the snapshot, not from a small
    file that a reader may have had whole.
    """
    author = rng.randint(1, users)
    connection.execute("BEGIN IMMEDIATE")
    for _ in range(3):
        change = (rng.randint(1_700_000_000, 1_800_000_000), rng.randint(1, posts))
        connection.execute("UPDATE posts SET created = ? WHERE id = ?", change)
    connection.execute("UPDATE users SET bio = ? WHERE id = ?", (text(rng, 60), rng.randint(1, users)))
    if not hot[0] - 50 <= author <= hot[1] + 50:
        _post(connection, rng, author)
    like = (rng.randint(1, posts), author)
    connection.execute("INSERT INTO likes(post_id, user_id, created) VALUES (?, ?, 1750000000)", like)
    connection.execute("COMMIT")


def _compact(written: Sequence[Path], replica: Path, plan: _Plan) -> None:
    """Lay the level-0 files out as hours of compaction would have left them."""
    snapshot, high, middle, low, _ = plan.counts
    first = decode_file(written[0].read_bytes())
    files = [first, *(decode_file(path.read_bytes()) for path in written[1:])]
    _merge(files[:snapshot], replica, 9)
    for level, size, end in (
        (3, plan.level3, snapshot + high),
        (2, plan.level2, snapshot + high + middle),
        (1, plan.level1, snapshot + high + middle + low),
    ):
        for start in range(snapshot, end, size):
            _merge(files[start : start + size], replica, level)
    # The last level-0 files that are in level 1 already are younger than the retention.
    for path in written[snapshot + high + middle :]:
        shutil.copyfile(path, _place(replica, 0, _name(path)))


def _name(path: Path) -> FileName:
    name = FileName.parse(path.name)
    assert name is not None, f"Litestream wrote {path.name}"
    return name


def _merge(files: Sequence[DecodedFile], replica: Path, level: int) -> None:
    """One file of several: of each page the last version, less the pages above the last file's commit."""
    last = files[-1].header
    newest = {pgno: file for file in files for pgno in file.index.pgnos if pgno <= last.commit}
    wal = (last.wal_offset, last.wal_size, last.wal_salt1, last.wal_salt2) if level == 9 else (0, 0, 0, 0)
    header = Header(
        last.flags,
        last.page_size,
        last.commit,
        files[0].header.min_txid,
        last.max_txid,
        last.timestamp_ms,
        0,
        *wal,
    )
    data = encode_file(header, ((pgno, newest[pgno].page(pgno)) for pgno in sorted(newest)))
    _place(replica, level, header.name).write_bytes(data)
