"""``lazyreplica verify``: is a replica sound?"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

import apsw

from lazyreplica.cli.arguments import UsageError, add_command, add_json, add_url, open_replica
from lazyreplica.cli.primary import Compared, compare
from lazyreplica.cli.terminal import (
    format_count,
    format_size,
    format_time,
    iso_time,
    print_json,
    print_rows,
    progress_bar,
)
from lazyreplica.ltx.name import format_txid
from lazyreplica.storage import Store
from lazyreplica.verify import Problem, ReplicaChecked, verify

if TYPE_CHECKING:
    from rich.console import Console


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "verify",
        run,
        summary="check every file of a replica, and the database they make",
        description="Read a whole replica. Checked are: each file's structure and checksum, its name against its "
        "header, page sizes, gaps and overlaps in the history since the oldest snapshot, and that the newest state has "
        "every page. The newest state is also rebuilt in a temporary directory (TMPDIR; it needs the database's size), "
        "where SQLite's integrity_check looks at it.\n\n"
        "With --against, the newest state is compared with the live primary, page by page at one TXID. Where the "
        "replica's newest transaction says at which place of the primary's write-ahead log it ends (Litestream's do), "
        "the primary's pages at that very place are compared, every byte, while a read transaction holds them; writers "
        "go on. Else (a published replica) a copy by SQLite's backup is compared, without bytes 24-27, 40-43 and "
        "92-99 of page 1 (change counter, schema cookie, version-valid-for, SQLite's version), which a backup may "
        "change.\n\n"
        "Exit status: 0 sound, 1 problems found (or nothing could be read), 2 a command line that makes no sense.",
        examples=[
            "lazyreplica verify s3://bucket/app",
            "lazyreplica verify --json --no-integrity-check s3://bucket/app",
            "lazyreplica verify --against app.db --wait 30 s3://bucket/app",
        ],
    )
    add_url(parser)
    parser.add_argument("--no-integrity-check", action="store_true", help="do not run PRAGMA integrity_check")
    parser.add_argument("--against", metavar="DB", help="the primary's database file, which may be in use")
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=_seconds,
        default=10.0,
        help="with --against: how long the replica may take to catch up (default 10)",
    )
    add_json(parser, "the result as a JSON object")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 to 86400")
    return seconds


def run(args: argparse.Namespace, out: Console, err: Console) -> int:
    if args.against is not None and not Path(args.against).is_file():
        raise UsageError(f"--against: {args.against!r} is not a file; name the primary's SQLite database")
    needs_state = args.against is not None or not args.no_integrity_check
    with (
        closing(open_replica(args.url)) as store,
        tempfile.TemporaryDirectory(prefix="lazyreplica-verify-") as directory,
    ):
        path = Path(directory) / "newest.db"
        with path.open("x+b", buffering=0) as state:
            checked = _read(store, state if needs_state else None, err)
            integrity = None
            if checked.rebuilt and not args.no_integrity_check:
                with err.status("PRAGMA integrity_check"):
                    integrity = check_integrity(path)
            compared = None
            if checked.rebuilt and checked.last is not None and args.against is not None:
                with err.status("comparing with the primary"):
                    compared = compare(Path(args.against), store, state, checked.last, args.wait)
        sound = not checked.problems and integrity in (None, ["ok"]) and (compared is None or compared.same)
        if args.json:
            print_json(_as_object(store.url, sound, checked, integrity, compared))
        else:
            _print(out, store.url, sound, checked, integrity, compared)
    return 0 if sound else 1


def _read(store: Store, state: BinaryIO | None, err: Console) -> ReplicaChecked:
    with progress_bar(err) as bar:
        task = bar.add_task("verifying", total=None)
        for report in verify(store, state, lambda done, total: bar.update(task, completed=done, total=total)):
            if isinstance(report, ReplicaChecked):
                return report
            if report.problem is not None and err.is_terminal:
                bar.console.print(f"[red]{report.problem.kind}[/red]: {report.file}", highlight=False)
    raise AssertionError("verify() ends with what the files make together")


def check_integrity(path: Path) -> list[str]:
    """What ``PRAGMA integrity_check`` says about a database that nobody else uses; nothing is written."""
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    connection = apsw.Connection(f"file:{quote(str(path))}?immutable=1&vfs=unix", flags=flags)
    try:
        connection.set_progress_handler(lambda: False, 50_000)  # Ctrl-C is noticed where Python code runs
        return [str(line) for (line,) in connection.execute("pragma integrity_check")]
    except apsw.Error as exc:
        return [str(exc)]
    finally:
        connection.close()


def _as_object(
    url: str, sound: bool, checked: ReplicaChecked, integrity: list[str] | None, compared: Compared | None
) -> dict[str, object]:
    last = checked.last
    return {
        "url": url,
        "sound": sound,
        "files": checked.files,
        "bytes": checked.size,
        "vanished": checked.vanished,
        "txid": format_txid(last.max_txid) if last else None,
        "time": iso_time(last.timestamp_ms / 1000) if last and last.timestamp_ms else None,
        "page_size": last.page_size if last else None,
        "pages": last.commit if last else None,
        "chain": [{"level": file.level, "name": str(file.name)} for file in checked.chain],
        "problems": [_problem(problem) for problem in checked.problems],
        "integrity_check": integrity,
        "against": compared
        and {
            "same": compared.same,
            "txid": format_txid(compared.txid),
            "every_byte": compared.exact,
            "pages_compared": compared.pages,
            "replica_pages": compared.replica_commit,
            "primary_pages": compared.primary_commit,
            "differing_pages": compared.differing,
            "first_differing": list(compared.first),
            "lag": compared.lag or None,
        },
    }


def _problem(problem: Problem) -> dict[str, object]:
    file = problem.file
    return {
        "kind": problem.kind,
        "text": problem.text,
        "file": {"level": file.level, "name": str(file.name)} if file else None,
    }


def _print(
    out: Console,
    url: str,
    sound: bool,
    checked: ReplicaChecked,
    integrity: list[str] | None,
    compared: Compared | None,
) -> None:
    from rich.text import Text

    last = checked.last
    problems = [(problem.kind, problem.text) for problem in checked.problems]
    if integrity not in (None, ["ok"]):
        problems += [("integrity", line) for line in integrity or ()]
    if compared is not None and not compared.same:
        problems.append(("primary", describe(compared)))
    if problems:
        print_rows(out, ("problem", "what was found"), problems)
    gone = f" ({checked.vanished} more vanished meanwhile, as compaction does)" if checked.vanished else ""
    lines = [Text(f"{format_count(checked.files, 'file')}, {format_size(checked.size)} read{gone}")]
    if last is not None:
        when = f", {format_time(last.timestamp_ms / 1000)}" if last.timestamp_ms else ""
        state = f"newest state: TXID {format_txid(last.max_txid)}{when}, {last.commit} pages of {last.page_size} bytes"
        lines.append(Text(f"{state}, from {format_count(len(checked.chain), 'file')}"))
    if integrity == ["ok"]:
        lines.append(Text("integrity_check: ok"))
    if compared is not None and compared.same:
        lines.append(Text(describe(compared)))
    verdict = ("sound", "green") if sound else (format_count(len(problems), "problem"), "red")
    lines.append(Text.assemble(f"{url}: ", verdict))
    for line in lines:
        out.print(line, soft_wrap=True)


def describe(compared: Compared) -> str:
    """The comparison in a line."""
    at = f"at TXID {format_txid(compared.txid)}"
    if compared.same:
        how = "every byte" if compared.exact else "all but the counters in page 1"
        return f"equal to the primary {at}: {compared.pages} pages, {how}"
    if not compared.pages:
        return f"could not be compared with the primary {at}: {compared.lag}"
    sizes = (
        ""
        if compared.replica_commit == compared.primary_commit
        else (f"the replica has {compared.replica_commit} pages, the primary {compared.primary_commit}; ")
    )
    first = ", ".join(map(str, compared.first))
    more = ", ..." if compared.differing > len(compared.first) else ""
    pages = f"{compared.differing} of {compared.pages} pages differ from the primary {at}"
    return f"{sizes}{pages}{f': {first}{more}' if first else ''}{f' ({compared.lag})' if compared.lag else ''}"
