"""Sample databases, the same bytes of content at every run.

Text is cut from one pool of made-up words at random places: as fast as slicing, and LZ4 brings a page of it
down about as far as it does with real posts (1.6:1).
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_SYLLABLES = [c + v + e for c in "bcdfghjklmnpqrstvwz" for v in "aeiouy" for e in ("", "n", "r", "st")]
_POOL_WORDS = 60_000
_VOCABULARY = 165


@cache
def _pool() -> str:
    rng = random.Random(20240229)
    words = ["".join(rng.choices(_SYLLABLES, k=rng.choice((2, 3, 3, 4)))) for _ in range(_VOCABULARY)]
    return " ".join(rng.choices(words, k=_POOL_WORDS))


def text(rng: random.Random, size: int) -> str:
    """``size`` characters of plausible text; ``size`` of a few thousand at most."""
    pool = _pool()
    start = int(rng.random() * (len(pool) - size))
    return pool[start : start + size]


@contextlib.contextmanager
def created(path: Path, page_size: int, journal_mode: str) -> Iterator[sqlite3.Connection]:
    """A new database to fill: written in one transaction without a WAL, left in ``journal_mode``."""
    con = sqlite3.connect(path, isolation_level=None)
    try:
        con.execute(f"PRAGMA page_size = {page_size}")
        con.execute("PRAGMA journal_mode = OFF")
        con.execute("PRAGMA synchronous = OFF")
        con.execute("PRAGMA cache_size = -64000")
        con.execute("BEGIN")
        yield con
        con.execute("COMMIT")
        con.execute(f"PRAGMA journal_mode = {journal_mode}")
    finally:
        con.close()


def build_social(
    path: Path,
    posts: int = 3000,
    users: int = 300,
    likes: int = 3000,
    page_size: int = 4096,
    journal_mode: str = "wal",
) -> Path:
    """Users, posts and likes with their indexes. 300,000 / 30,000 / 300,000 make about 116 MB."""
    rng = random.Random(posts * 7 + users * 3 + likes)
    rand = rng.random
    day = 86_400
    with created(path, page_size, journal_mode) as con:
        con.execute("CREATE TABLE users(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, bio TEXT, joined INTEGER)")
        con.execute(
            "CREATE TABLE posts(id INTEGER PRIMARY KEY, user_id INTEGER NOT NULL REFERENCES users(id),"
            " created INTEGER NOT NULL, title TEXT NOT NULL, body TEXT NOT NULL)"
        )
        con.execute(
            "CREATE TABLE likes(id INTEGER PRIMARY KEY, post_id INTEGER NOT NULL REFERENCES posts(id),"
            " user_id INTEGER NOT NULL REFERENCES users(id), created INTEGER NOT NULL)"
        )
        con.executemany(
            "INSERT INTO users VALUES (?, ?, ?, ?)",
            ((i, f"user{i:06d}", text(rng, 20 + int(rand() * 100)), i * day // 9) for i in range(1, users + 1)),
        )
        con.executemany(
            "INSERT INTO posts VALUES (?, ?, ?, ?, ?)",
            (
                # skewed: some users write much more than others
                (
                    i,
                    1 + int(rand() ** 2 * users),
                    1_700_000_000 + i * 31,
                    text(rng, 12 + int(rand() * 36)),
                    text(rng, 60 + int(rand() * 365)),
                )
                for i in range(1, posts + 1)
            ),
        )
        con.executemany(
            "INSERT INTO likes VALUES (?, ?, ?, ?)",
            (
                (i, 1 + int(rand() * posts), 1 + int(rand() * users), 1_700_000_000 + i * 37)
                for i in range(1, likes + 1)
            ),
        )
        con.execute("CREATE INDEX posts_by_user ON posts(user_id, created)")
        con.execute("CREATE INDEX posts_by_time ON posts(created)")
        con.execute("CREATE INDEX likes_by_post ON likes(post_id)")
        con.execute("CREATE INDEX likes_by_user ON likes(user_id)")
        con.execute("ANALYZE")
    return path


def build_varied(path: Path, page_size: int = 4096, journal_mode: str = "wal", rows: int = 400) -> Path:
    """One of everything that lays out pages differently: WITHOUT ROWID, FTS5, overflow chains, freelist, views..."""
    rng = random.Random(rows)
    with created(path, page_size, journal_mode) as con:
        con.execute(
            "CREATE TABLE dictionary(word TEXT, lang TEXT, meaning TEXT, PRIMARY KEY (word, lang)) WITHOUT ROWID"
        )
        con.executemany(
            "INSERT INTO dictionary VALUES (?, ?, ?)",
            ((f"{text(rng, 12)}{i}", rng.choice(("de", "en", "日本")), text(rng, 80)) for i in range(rows)),
        )
        con.execute("CREATE VIRTUAL TABLE notes USING fts5(title, body)")
        con.executemany("INSERT INTO notes VALUES (?, ?)", ((text(rng, 30), text(rng, 400)) for _ in range(rows)))
        # From a few bytes inline to chains of many overflow pages, with random bytes that LZ4 cannot shrink.
        con.execute("CREATE TABLE blobs(id INTEGER PRIMARY KEY, data BLOB)")
        sizes = [0, 1, page_size - 40, page_size, page_size + 1, 10 * page_size, 40 * page_size, 300_000]
        con.executemany("INSERT INTO blobs VALUES (?, ?)", ((i, rng.randbytes(size)) for i, size in enumerate(sizes)))
        con.execute(
            "CREATE TABLE kinds(a, b REAL, c NUMERIC, d TEXT COLLATE NOCASE, e AS (c * 2) VIRTUAL, f AS (c + 1) STORED)"
        )
        values = [None, 0, 1, 1.0, -(2**63), 2**63 - 1, 0.1, "", "ümläut \N{SNOWMAN}", b"", b"\0\xff", "1e3"]
        con.executemany("INSERT INTO kinds(a, b, c, d) VALUES (?, ?, ?, ?)", ((v, v, v, v) for v in values))
        con.execute("CREATE INDEX kinds_by_d ON kinds(d) WHERE a IS NOT NULL")
        con.execute("CREATE INDEX kinds_by_expression ON kinds(length(d), b DESC)")
        con.execute("CREATE VIEW long_notes AS SELECT title, length(body) AS size FROM notes WHERE size > 100")
        con.execute("CREATE TABLE log(id INTEGER PRIMARY KEY AUTOINCREMENT, what TEXT)")
        con.execute(
            "CREATE TRIGGER logged AFTER INSERT ON blobs BEGIN INSERT INTO log(what) VALUES ('blob ' || new.id); END"
        )
        con.execute("INSERT INTO blobs VALUES (1000, zeroblob(50000))")
        # pages that belong to nobody
        con.execute("CREATE TABLE gone AS SELECT * FROM dictionary")
        con.execute("DROP TABLE gone")
        con.execute('CREATE TABLE "odd ""name"" \N{SNOWMAN}"("a b" TEXT, "select" INT)')
        con.execute('INSERT INTO "odd ""name"" \N{SNOWMAN}" VALUES (\'x\', 1)')
    return path
