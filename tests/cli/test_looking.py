"""``info``, ``ltx`` and ``dump-file``: what they say is what is there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from cli_helpers import Bank, Run

import lazyreplica
from lazyreplica.ltx import Compression, FileName, Header, decode_file, encode_file
from support.data import build_social
from support.litestream import ltx_files, replicate_once
from support.servers import S3Server

pytestmark = pytest.mark.slow


def newest(replica: Path, level: int = 0) -> Path:
    return max((replica / "ltx" / str(level)).glob("*.ltx"))


# -- ltx --


def test_the_list_is_the_one_that_litestream_gives(bank: Bank, run: Run) -> None:
    expected = [(f.level, f"{f.min_txid:016x}", f"{f.max_txid:016x}", f.size) for f in ltx_files(bank.replica)]
    for more in ([], ["--headers"]):
        rows = run("ltx", "--json", *more, bank.url).json
        assert [(row["level"], row["min_txid"], row["max_txid"], row["size"]) for row in rows] == expected
    done = run("ltx", "--level", "1", bank.url)
    names, *lines = done.out.splitlines()
    assert names.split("\t") == ["level", "min_txid", "max_txid", "size", "created"]
    assert [line.split("\t")[:3] for line in lines] == [[str(row[0]), *row[1:3]] for row in expected if row[0] == 1]


def test_headers_have_the_primarys_time(bank: Bank, run: Run) -> None:
    for row in run("ltx", "--json", "--headers", bank.url).json:
        name = FileName(int(row["min_txid"], 16), int(row["max_txid"], 16))
        header = Header.parse((bank.replica / "ltx" / str(row["level"]) / str(name)).read_bytes())
        milliseconds = f"{header.timestamp_ms % 1000:03d}"
        assert row["created"].endswith(f".{milliseconds}Z") and row["pages"] == header.commit


# -- info --


def test_info(bank: Bank, run: Run) -> None:
    report = run("info", "--json", bank.url).json
    header = Header.parse(newest(bank.replica).read_bytes())
    assert (report["page_size"], report["pages"], report["bytes"]) == (4096, header.commit, 4096 * header.commit)
    assert report["txid"] == f"{header.max_txid:016x}"
    assert 0 < report["lag_seconds"] < 3600
    snapshots = [FileName.parse(path.name) for path in (bank.replica / "ltx" / "9").iterdir()]
    assert report["oldest_txid"] == f"{min(name.max_txid for name in snapshots if name):016x}"
    assert report["oldest_time"] < report["time"]
    sizes = {level["level"]: (level["files"], level["bytes"]) for level in report["levels"]}
    for level in (0, 1, 2, 9):
        paths = list((bank.replica / "ltx" / str(level)).glob("*.ltx"))
        assert sizes[level] == (len(paths), sum(path.stat().st_size for path in paths))
    assert report["polling"] == {"gets_a_day": 86_400, "lists_a_day": 8640}
    assert report["litestream_0_3_backup"] is False
    text = run("info", bank.url).out
    assert f"{header.commit} pages of 4096 bytes" in text and report["txid"] in text and "$" not in text


def test_what_polling_costs(rclone: S3Server, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)
    url = rclone.url(rclone.new_bucket(), "app")
    lazyreplica.publish(build_social(tmp_path / "app.db", posts=50), url)
    # 30 days of 86,400 GET at $0.0004 and 8,640 LIST at $0.005 for a thousand
    text = run("info", url).out
    assert "$2.33 in 30 days" in text and "$0.0004" in text and "$0.005" in text and "us-east-1" in text
    monkeypatch.setenv("LITESTREAM_POLL_INTERVAL", "10")
    assert run("info", "--json", url).json["polling"] == {"gets_a_day": 8640, "lists_a_day": 8640}
    monkeypatch.setenv("LITESTREAM_POLL_INTERVAL", "0")
    assert "polling          none" in run("info", url).out


def test_a_litestream_0_3_backup_is_named(bank: Bank, run: Run, tmp_path: Path) -> None:
    old = tmp_path / "old"
    (old / "generations" / "0123456789abcdef").mkdir(parents=True)
    for command in ("info", "ltx", "timeline", "verify"):
        done = run(command, f"file://{old}")
        assert (done.status, done.out) == (1, "") and "Litestream 0.3" in done.err and done.err.count("\n") == 1
    shutil.copytree(bank.replica / "ltx", old / "ltx")
    assert run("info", "--json", f"file://{old}").json["litestream_0_3_backup"] is True
    assert "0.3 backup" in run("info", f"file://{old}").out


def test_nothing_there_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in ("info", "ltx", "timeline", "verify"):
        for url, text in ((f"file://{tmp_path}/empty", "no LTX files"), (f"file://{tmp_path}/x", "does not exist")):
            done = run(command, url)
            assert (done.status, done.out) == (1, "") and text in done.err
            assert done.err.startswith("error: ") and done.err.count("\n") == 1


# -- dump-file --


def test_dump_file(bank: Bank, run: Run) -> None:
    for level in (0, 1, 9):
        path = newest(bank.replica, level)
        file = decode_file(path.read_bytes())
        local = run("dump-file", "--json", "--pages", path)
        assert (local.status, local.err) == (0, "")
        report = local.json
        assert report["sound"] and report["size"] == path.stat().st_size
        assert report["header"]["commit"] == file.header.commit
        assert report["header"]["wal_offset"] == file.header.wal_offset
        assert report["header"]["max_txid"] == f"{file.header.max_txid:016x}"
        assert int(report["trailer"]["file_checksum"], 16) == file.trailer.file_checksum
        assert [(p["pgno"], p["offset"], p["size"]) for p in report["pages"]] == [
            *file.index.frames(0, len(file.index))
        ]
        assert {p["compression"] for p in report["pages"]} == {"LZ4 block"}
        remote = run("dump-file", "--json", "--pages", "--level", str(level), bank.url, path.name)
        assert remote.json == report
        text = run("dump-file", path).out
        assert f"{file.header.commit} pages of 4096 bytes" in text and report["trailer"]["file_checksum"] in text
        assert "pgno" not in text
        lines = run("dump-file", "--pages", path).out.splitlines()
        assert len(lines[lines.index("pgno\toffset\tsize\tcompression") + 1 :]) == len(file.index)


def test_both_compressions_are_told_apart(run: Run, tmp_path: Path) -> None:
    for compression in Compression:
        path = tmp_path / f"{compression.value}.ltx"
        path.write_bytes(encode_file(Header(2, 512, 2, 1, 1, 0), [(1, bytes(512)), (2, bytes(512))], compression))
        assert f"2 as LZ4 {compression.value};" in run("dump-file", path).out
        assert "not set" in run("dump-file", path).out


def test_a_damaged_file_is_status_1_and_says_what_can_be_told(bank: Bank, run: Run, tmp_path: Path) -> None:
    path = Path(shutil.copy(newest(bank.replica), tmp_path))
    with path.open("r+b") as file:
        file.seek(-20, os.SEEK_END)
        file.write(b"\xff\xff")
    done = run("dump-file", path)
    assert done.status == 1 and "transactions" in done.out and "damaged" in done.out
    report = run("dump-file", "--json", path).json
    assert not report["sound"] and report["error"] and report["header"]["page_size"] == 4096
    path.write_text("no LTX file")
    done = run("dump-file", "--json", path)
    assert done.status == 1 and done.json["header"] is None


def test_files_of_a_replica_in_s3(rclone: S3Server, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)
    url = rclone.url(rclone.new_bucket(), "app")
    replicate_once(build_social(tmp_path / "app.db", posts=100), url, env=rclone.env)
    name = str(FileName(1, 1))
    assert run("dump-file", "--json", "--level", "0", url, name).json["sound"]
    assert "no level 3 file" in run("dump-file", "--level", "3", url, name).err
    assert run("verify", "--against", tmp_path / "app.db", url).status == 0
    (row,) = run("ltx", "--headers", "--json", url).json
    assert row["page_size"] == 4096


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["URL"],
        ["URL", "name.ltx"],
        ["--level", "0", "URL"],
        ["--level", "12", "URL", str(FileName(1, 1))],
        ["--level", "0", "/some/file"],
        ["/some/file", str(FileName(1, 1))],
    ],
)
def test_what_names_no_file_is_status_2(bank: Bank, run: Run, arguments: list[str]) -> None:
    done = run("dump-file", *(bank.url if word == "URL" else word for word in arguments), "--json")
    assert (done.status, done.out) == (2, "") and done.err


def test_a_local_file_that_is_not_there(run: Run, tmp_path: Path) -> None:
    done = run("dump-file", tmp_path / "nowhere.ltx")
    assert (done.status, done.out) == (1, "")
    assert done.err == f"error: {tmp_path}/nowhere.ltx: No such file or directory\n"
    assert run("dump-file", tmp_path).err == f"error: {tmp_path}: Is a directory\n"
