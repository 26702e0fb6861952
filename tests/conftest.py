"""Fixtures for every test: real servers started once a session, and a clean slate for each test."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from lazyreplica import naming
from support.litestream import find_litestream
from support.servers import S3Server, serve_rclone, serve_seaweed

# A busy machine takes its time; a test that hangs is ended by pytest's own timeout.
settings.register_profile("patient", deadline=None)
settings.register_profile("quick", settings.get_profile("patient"), max_examples=25)
settings.load_profile("patient")

# What a developer's shell may set and the library, botocore or a client would obey.
_STEERING = ("AWS_", "LITESTREAM_", "LAZYREPLICA_")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
_KEPT = ("LAZYREPLICA_LITESTREAM",)


# A job in a shell's background is started with SIGINT ignored, and would pass that on to the programs under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first, and the rest is done beside it."""
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """S3 whose objects are plain files. One for the session: take a bucket each with ``rclone.new_bucket()``."""
    with serve_rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """S3 that behaves and performs like a real store; seconds to start, so mark its tests slow."""
    with serve_seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture(scope="session")
def litestream() -> Path:
    """The real Litestream binary; a test that needs it fails, never skips, where it is missing."""
    return find_litestream()


@pytest.fixture
def file_replica_dir(tmp_path: Path) -> Path:
    """A directory for a replica in local files; not created yet, as Litestream would find it."""
    return tmp_path / "replica"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the developer's credentials, profiles, certificates or proxies."""
    for name in os.environ:
        if name in _PROXIES or (name.startswith(_STEERING) and name not in _KEPT):
            monkeypatch.delenv(name)
    # ... nor ~/.aws, nor the metadata service of the machine that runs the tests
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # ... nor what an earlier one has configured
    monkeypatch.setattr(naming, "_configured", {})
    # ... nor the silence that the fuzzer needs
    logging.disable(logging.NOTSET)


def _own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("lazyreplica")}


@pytest.fixture(autouse=True)
def _no_thread_survives() -> Iterator[None]:
    """What a test opened it closed, and closing joined the threads. Daemon threads count: they hide a missing join."""
    before = _own_threads()
    yield
    started = time.monotonic()
    while left := _own_threads() - before:
        waited = time.monotonic() - started
        if any(waited > _patience(thread) for thread in left):
            pytest.fail(f"still running after the test: {sorted(thread.name for thread in left)}")
        time.sleep(0.01)


def _patience(thread: threading.Thread) -> float:
    """Seconds that a thread may still be on its way out when the call that ended it has returned.

    Nobody waits for the threads that open a remote store: one may look up a host name, which cannot be interrupted.
    """
    return 15 if thread.name.startswith("lazyreplica-open") else 2
