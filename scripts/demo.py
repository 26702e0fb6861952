"""The main job, start to end: a database, its replica, and queries that begin before anything is downloaded."""

from __future__ import annotations

import random
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

import lazyreplica

ROWS = 300_000
QUERIES = {
    "open, read the schema": "select count(*) from sqlite_schema",
    "one post by its key": "select title from posts where id = 123456",
    "an index range": "select count(*), sum(score) from posts where user_id = 4242",
    "aggregate a table of 300,000 rows": "select user_id % 10, count(*), avg(score) from posts group by 1",
    "the same again": "select user_id % 10, count(*), avg(score) from posts group by 1",
}

console = Console(highlight=False)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="lazyreplica-demo-") as directory:
        database, replica = Path(directory) / "app.db", Path(directory) / "replica"
        with console.status("building a sample database ..."):
            build(database)
        console.print(f"[bold]1.[/] a SQLite database: {ROWS:,} posts, {database.stat().st_size / 1e6:.0f} MB")
        publish(database, replica)
        show(database, replica)


def build(path: Path) -> None:
    rng = random.Random(1)
    words = [f"{rng.randbytes(3).hex()}{suffix}" for suffix in ("", "ing", "ed", "er") for _ in range(500)]

    def rows() -> Iterator[tuple[int, int, str, str, int]]:
        for number in range(ROWS):
            at = rng.randrange(len(words) - 40)
            body = " ".join(words[at : at + 34]) + rng.randbytes(20).hex()
            yield number + 1, rng.randrange(30_000), " ".join(words[at : at + 3]), body, rng.randrange(1000)

    connection = sqlite3.connect(path)
    connection.execute("pragma journal_mode = wal")
    connection.execute(
        "create table posts (id integer primary key, user_id integer, title text, body text, score integer)"
    )
    connection.executemany("insert into posts values (?, ?, ?, ?, ?)", rows())
    connection.execute("create index posts_by_user on posts (user_id)")
    connection.commit()
    connection.execute("pragma wal_checkpoint(truncate)")
    connection.close()


def publish(database: Path, replica: Path) -> None:
    with Progress(TextColumn("   publishing"), BarColumn(), console=console, transient=True) as bar:
        task = bar.add_task("publish", total=None)
        result = lazyreplica.publish(
            database, replica.as_uri(), lambda done, total: bar.update(task, completed=done, total=total)
        )
    console.print(
        f"[bold]2.[/] published as a replica in Litestream's layout: {result.pages:,} pages, {result.size / 1e6:.0f} MB"
    )


def show(database: Path, replica: Path) -> None:
    console.print("[bold]3.[/] opened through the VFS, queried while the hydrator makes it local:")
    table = Table("query", "replica", "local file", "hydrated")
    started: float | None = time.perf_counter()  # the first query's time includes the opening
    connection = lazyreplica.connect(replica.as_uri())
    local = apsw.Connection(str(database), flags=apsw.SQLITE_OPEN_READONLY)
    with Progress(
        TextColumn("   hydrating"), BarColumn(), TextColumn("{task.percentage:.0f} %"), console=console
    ) as bar:
        task = bar.add_task("hydrate", total=100)
        for name, sql in QUERIES.items():
            answer, seconds = timed(connection, sql, started)
            expected, local_seconds = timed(local, sql)
            if answer != expected:
                raise SystemExit(f"{name}: the replica answered {answer}, the file {expected}")
            progress = hydration(connection)
            bar.update(task, completed=progress)
            table.add_row(name, f"{seconds * 1e3:.1f} ms", f"{local_seconds * 1e3:.1f} ms", f"{progress:.0f} %")
            started = None
        while hydration(connection) < 100:
            time.sleep(0.05)
            bar.update(task, completed=hydration(connection))
        bar.update(task, completed=100)
    sql = QUERIES["the same again"]
    seconds, local_seconds = timed(connection, sql)[1], timed(local, sql)[1]
    table.add_row("and once all is local", f"{seconds * 1e3:.1f} ms", f"{local_seconds * 1e3:.1f} ms", "100 %")
    console.print(table)
    connection.close()
    local.close()
    console.print("[bold]4.[/] with a database that Litestream backs up to S3, the whole program is:\n")
    console.print("     import apsw, lazyreplica")
    console.print('     db = apsw.Connection("file:app.db?vfs=litestream")', style="bold", end="")
    console.print("    # LITESTREAM_REPLICA_URL=s3://bucket/app\n")


def hydration(connection: apsw.Connection) -> float:
    return float(connection.pragma("litestream_hydration_progress"))


def timed(connection: apsw.Connection, sql: str, started: float | None = None) -> tuple[object, float]:
    started = time.perf_counter() if started is None else started
    return connection.execute(sql).fetchall(), time.perf_counter() - started


if __name__ == "__main__":
    main()
