"""Where credentials come from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import botocore.credentials
import botocore.exceptions
import botocore.session
import pytest

from lazyreplica.errors import AccessDenied, ConfigError
from lazyreplica.storage.credentials import Credentials, find_credentials

AWS = {"AWS_ACCESS_KEY_ID": "aws-id", "AWS_SECRET_ACCESS_KEY": "aws-secret"}
LITESTREAM = {"LITESTREAM_ACCESS_KEY_ID": "ls-id", "LITESTREAM_SECRET_ACCESS_KEY": "ls-secret"}


def test_environment() -> None:
    assert find_credentials(AWS | LITESTREAM).get() == Credentials("aws-id", "aws-secret")
    assert find_credentials(AWS | {"AWS_SESSION_TOKEN": "t"}).get() == Credentials("aws-id", "aws-secret", "t")
    source = find_credentials(LITESTREAM | {"AWS_ACCESS_KEY_ID": "", "AWS_SESSION_TOKEN": "t"})
    assert source.get() == Credentials("ls-id", "ls-secret")
    assert source.description == "LITESTREAM_ACCESS_KEY_ID in the environment"


def test_half_a_pair() -> None:
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID is set but AWS_SECRET_ACCESS_KEY is not"):
        find_credentials({"AWS_ACCESS_KEY_ID": "x"})
    with pytest.raises(ConfigError, match="LITESTREAM_SECRET_ACCESS_KEY is set but LITESTREAM_ACCESS_KEY_ID is not"):
        find_credentials({"LITESTREAM_SECRET_ACCESS_KEY": "x"})


def test_secrets_are_not_shown() -> None:
    source = find_credentials(AWS | {"AWS_SESSION_TOKEN": "the-token"})
    shown = f"{source!r} {source.get()!r} {source.get()}"
    assert "aws-secret" not in shown
    assert "the-token" not in shown


def test_anonymous() -> None:
    source = find_credentials(AWS, anonymous=True)
    assert source.get() is None
    assert "anonymous=true" in source.advice


@pytest.mark.parametrize(
    ("environ", "hint"),
    [({}, ""), ({"AWS_PROFILE": "p"}, "for AWS_PROFILE install lazyreplica[aws]")],
)
def test_without_botocore(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environ: dict[str, str], hint: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    source = find_credentials(environ)
    assert source.get() is None
    assert "set AWS_ACCESS_KEY_ID" in source.advice
    assert hint in source.advice
    assert ("lazyreplica[aws]" in source.advice) == bool(hint)
    (tmp_path / ".aws").mkdir()
    assert "lazyreplica[aws]" in find_credentials(environ).advice


@pytest.fixture
def aws_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*AWS, "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return tmp_path


def test_profile(aws_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (aws_home / "credentials").write_text("[other]\naws_access_key_id=pid\naws_secret_access_key=psecret\n")
    monkeypatch.setenv("AWS_PROFILE", "other")
    source = find_credentials({})
    assert source.get() == Credentials("pid", "psecret")
    monkeypatch.setenv("AWS_PROFILE", "missing")
    with pytest.raises(ConfigError, match="missing"):
        find_credentials({}).get()


def test_nothing_is_found_and_asked_again(aws_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_credentials({})
    assert source.get() is None
    (aws_home / "credentials").write_text("[default]\naws_access_key_id=pid\naws_secret_access_key=psecret\n")
    assert source.get() is None, "looking each time would be slow"
    monkeypatch.setattr("lazyreplica.storage.credentials.time.monotonic", lambda: 1e12)
    assert source.get() == Credentials("pid", "psecret")


def test_role_refreshes(aws_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Role:
        count = 0

        def get_frozen_credentials(self) -> botocore.credentials.ReadOnlyCredentials:
            self.count += 1
            if self.count == 3:
                raise botocore.exceptions.CredentialRetrievalError(provider="p", error_msg="gone")
            return botocore.credentials.ReadOnlyCredentials(f"id{self.count}", "s", "t")

    role = Role()
    monkeypatch.setattr(botocore.session.Session, "get_credentials", lambda self: role)
    source = find_credentials({})
    assert source.get() == Credentials("id1", "s", "t")
    assert source.get() == Credentials("id2", "s", "t")
    with pytest.raises(AccessDenied, match="could not be refreshed"):
        source.get()


def test_environment_is_read_again_when_asked_for() -> None:
    environ = dict(AWS)
    source = find_credentials(environ)
    old = source.get()
    assert old is not None
    assert not source.renew(old)
    environ["AWS_SESSION_TOKEN"] = "new"
    assert source.get() == old, "the environment may be changed for another replica"
    assert source.renew(old)
    assert source.get() == Credentials("aws-id", "aws-secret", "new")
    assert source.renew(old), "another thread's request was signed with the old ones"
    environ.clear()
    assert source.renew(old)
    assert source.get() == Credentials("aws-id", "aws-secret", "new")
    assert not source.renew(Credentials("aws-id", "aws-secret", "new"))


def test_profile_is_read_again_when_asked_for(aws_home: Path) -> None:
    text = "[default]\naws_access_key_id={}\naws_secret_access_key=psecret\n"
    (aws_home / "credentials").write_text(text.format("old"))
    source = find_credentials({})
    old = source.get()
    assert old == Credentials("old", "psecret")
    (aws_home / "credentials").write_text(text.format("new"))
    assert source.get() == old
    assert source.renew(old)
    assert source.get() == Credentials("new", "psecret")
    assert source.renew(old)
    assert not source.renew(Credentials("new", "psecret"))


def test_nothing_else_can_be_renewed() -> None:
    assert not find_credentials(AWS, anonymous=True).renew(Credentials("x", "y"))
