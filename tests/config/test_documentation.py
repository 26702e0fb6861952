"""docs/configuration.md says what is so: its examples run, and its table of URLs is looked up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import apsw
import pytest

from lazyreplica.litestream_yml import keys
from lazyreplica.naming import replica_of
from lazyreplica.storage.url import S3URL, canonical_parameter, parse_replica_url

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
FORMS = re.findall(r"^\| `(s3://[^`]*)` \| `([^`]*)` \|$", TEXT, re.MULTILINE)
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| ")]


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"BACKUP_KEY": "bk", "BACKUP_SECRET": "bs", "AUDIT_KEY": "ak", "AUDIT_SECRET": "as"}
    for name, value in {"LITESTREAM_CONFIG": str(tmp_path / "litestream.yml"), **secrets}.items():
        monkeypatch.setenv(name, value)
    opened: list[str] = []
    # The buckets of the examples are nobody's: what they open is looked at, and not opened.
    monkeypatch.setattr(apsw, "Connection", opened.append)
    names: dict[str, Any] = {}
    kinds = [kind for kind, _ in BLOCKS]
    assert kinds == ["yaml", "python", "python"]
    for kind, block in BLOCKS:
        if kind == "yaml":
            (tmp_path / "litestream.yml").write_text(block)
        else:
            exec(compile(block, "configuration.md", "exec"), names)
    assert opened == ["file:/var/lib/app.db?vfs=litestream"]
    for name, pair in {"/var/lib/app.db": ("bk", "bs"), "audit.db": ("ak", "as")}.items():
        credentials = replica_of(name)[1]
        found = credentials.get() if credentials else None
        assert found is not None and (found.access_key, found.secret_key) == pair


@pytest.mark.parametrize(("url", "base"), FORMS)
def test_forms_of_urls(url: str, base: str) -> None:
    parsed = parse_replica_url(url, {})
    assert isinstance(parsed, S3URL) and (parsed.base_url, parsed.path) == (base, "app")


def test_every_form_and_key_is_known() -> None:
    assert len(FORMS) == 17
    listed = {row[0]: set(re.findall(r"`([a-z-]+)`", row[1])) for row in ROWS if len(row) == 2}
    assert listed["`dbs`"] <= keys.DATABASE and listed["replica"] - {"s3", "file"} <= keys.REPLICA
    parameters = [row[:2] for row in ROWS if len(row) == 3 and canonical_parameter(row[0].strip("`").partition("`")[0])]
    assert len(parameters) == 9
    assert all(canonical_parameter(name) for row in parameters for cell in row for name in re.findall(r"`(.+?)`", cell))
