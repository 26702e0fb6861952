"""``lazyreplica info``: a replica at a glance."""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lazyreplica.cli.arguments import add_command, add_json, add_url, open_replica
from lazyreplica.cli.listing import list_files, read_headers
from lazyreplica.cli.terminal import (
    format_count,
    format_duration,
    format_size,
    format_time,
    iso_time,
    print_facts,
    print_json,
    print_rows,
)
from lazyreplica.config import Options
from lazyreplica.errors import FileVanished
from lazyreplica.ltx.header import Header
from lazyreplica.ltx.name import format_txid
from lazyreplica.plan import Chain, plan
from lazyreplica.storage import LEVELS, SNAPSHOT_LEVEL, StoredFile

if TYPE_CHECKING:
    from rich.console import Console

_DAY = 86_400
_LIST_SECONDS = 10
"""A follower lists the path this often while nothing comes."""
_GET_PRICE, _LIST_PRICE = 0.0004, 0.005
"""US dollars for 1000 requests: S3 Standard in us-east-1."""
_MONTH = 30


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "info",
        run,
        summary="show a replica at a glance",
        description="Show a replica's database size, newest transaction, the times that can be restored, its files, "
        "and what following it costs: a process that has it open makes one GET in each poll interval "
        "(LITESTREAM_POLL_INTERVAL, 1 second by default) and one LIST in 10 seconds.",
        examples=["lazyreplica info s3://bucket/app", "lazyreplica info --json s3://bucket/app"],
    )
    add_url(parser)
    add_json(parser, "a JSON object")


@dataclass(frozen=True, slots=True)
class _Polling:
    """Requests a day of one process that follows a quiet replica."""

    gets: int
    lists: int

    @property
    def dollars(self) -> float:
        """A month, at the prices above."""
        return _MONTH * (self.gets * _GET_PRICE + self.lists * _LIST_PRICE) / 1000


def run(args: argparse.Namespace, out: Console, err: Console) -> int:
    with closing(open_replica(args.url)) as store:
        listing = list_files(store, err)
        chain = plan(listing.files)
        oldest = _oldest(listing.files)
        headers = read_headers(store, list({chain[-1], oldest}), err)
        url = store.url
    if not {chain[-1], oldest} <= headers.keys():
        raise FileVanished(f"{chain[-1]} or {oldest} of {url} vanished or cannot be read; look again")
    interval = Options.from_environment().poll_interval
    polling = _Polling(round(_DAY / interval), _DAY // _LIST_SECONDS) if interval else _Polling(0, 0)
    legacy = "generations" in listing.strangers
    last, first = (_dated(headers[file], file) for file in (chain[-1], oldest))
    if args.json:
        print_json(_as_object(url, listing.files, chain, first, last, polling, legacy))
        return 0
    lag = time.time() - last.timestamp_ms / 1000
    facts = [
        ("replica", url),
        ("database", f"{format_size(last.commit * last.page_size)}: {last.commit:,} pages of {last.page_size} bytes"),
        ("newest TXID", format_txid(last.max_txid)),
        ("written", f"{format_time(last.timestamp_ms / 1000)}, {format_duration(max(lag, 0.0))} ago"),
        ("restorable from", f"TXID {format_txid(first.max_txid)}, {format_time(first.timestamp_ms / 1000)}"),
        ("newest state", f"{format_count(len(chain), 'file')}, {format_size(sum(file.size for file in chain))}"),
        ("polling", _describe(polling, interval, dollars=url.startswith("s3:"))),
    ]
    if legacy:
        facts.append(("0.3 backup", "there is one too (generations/); only Litestream 0.3 reads it"))
    print_facts(out, facts)
    out.print()
    rows = [
        (level, len(sizes), format_size(sum(sizes)) if out.is_terminal else sum(sizes))
        for level in reversed(LEVELS)
        if (sizes := [file.size for file in listing.files if file.level == level])
    ]
    print_rows(out, ("level", "files", "size" if out.is_terminal else "bytes"), rows, "rrr")
    return 0


def _oldest(files: tuple[StoredFile, ...]) -> StoredFile:
    """The file that makes the oldest state: a snapshot, or where there is none yet the first whole file."""
    whole = [file for file in files if file.name.is_snapshot]
    return min(whole, key=lambda file: (file.level != SNAPSHOT_LEVEL, file.name.max_txid, -file.level))


def _dated(header: Header, file: StoredFile) -> Header:
    """The header, with the object's date where it has none of its own."""
    return header if header.timestamp_ms else replace(header, timestamp_ms=round(file.modified * 1000))


def _describe(polling: _Polling, interval: float, *, dollars: bool) -> str:
    if not polling.gets:
        return "none: LITESTREAM_POLL_INTERVAL is 0"
    text = f"{polling.gets:,} GET (one in {interval:g} s) and {polling.lists:,} LIST a day for each process"
    if dollars:
        text += (
            f"; ${polling.dollars:.2f} in {_MONTH} days at ${_GET_PRICE} and ${_LIST_PRICE} for 1000 "
            "(S3 Standard, us-east-1)"
        )
    return text


def _as_object(
    url: str, files: tuple[StoredFile, ...], chain: Chain, first: Header, last: Header, polling: _Polling, legacy: bool
) -> dict[str, object]:
    return {
        "url": url,
        "page_size": last.page_size,
        "pages": last.commit,
        "bytes": last.commit * last.page_size,
        "txid": format_txid(last.max_txid),
        "time": iso_time(last.timestamp_ms / 1000),
        "lag_seconds": round(time.time() - last.timestamp_ms / 1000, 3),
        "oldest_txid": format_txid(first.max_txid),
        "oldest_time": iso_time(first.timestamp_ms / 1000),
        "newest_state": {"files": len(chain), "bytes": sum(file.size for file in chain)},
        "levels": [
            {"level": level, "files": len(sizes), "bytes": sum(sizes)}
            for level in LEVELS
            if (sizes := [file.size for file in files if file.level == level])
        ],
        "polling": {"gets_a_day": polling.gets, "lists_a_day": polling.lists},
        "litestream_0_3_backup": legacy,
    }
