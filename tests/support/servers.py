"""Real S3 servers on this machine.

rclone is up at once and keeps every object as a plain file that a test can touch, but hashes the whole object at
each request. SeaweedFS takes seconds to start and answers like a real store: use it where time or large objects matter.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from support.process import Process, clean_env, find_program

REGION = "us-east-1"
# rclone rejects shorter key ids.
ACCESS_KEY = "lazyreplica-access"
SECRET_KEY = "lazyreplica-secret"
# How long rclone believes what it read of a directory. Zero sounds right, but keeps it spinning in a timer that
# starves its requests: with 0 a restore took 0.3 s of CPU, and sometimes minutes, with 5ms 0.02 s.
_RCLONE_CACHE = "5ms"
# SeaweedFS listens for gRPC at each port plus this.
_GRPC_OFFSET = 10_000
# Kernels hand out ephemeral ports from 32768 (Linux) or 49152 (macOS) up. Below, only other listeners are in the way,
# and no outgoing connection takes the port between our look and the server's bind.
_PORTS = range(10_240, 32_768 - _GRPC_OFFSET)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_ports(count: int, *, grpc: bool = False) -> list[int]:
    """Ports nothing listens on; with ``grpc`` the port 10,000 above each is free as well."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        if _is_free(port) and (not grpc or _is_free(port + _GRPC_OFFSET)):
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free ports on 127.0.0.1")


def free_port() -> int:
    return free_ports(1)[0]


@dataclass
class S3Server:
    """One S3 endpoint. Buckets are cheap: take a new one for each test."""

    kind: str
    endpoint: str
    root: Path | None
    """rclone: the directory whose subdirectories are the buckets. None where objects are not plain files."""
    process: Process
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    region: str = REGION
    _names: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    @property
    def env(self) -> dict[str, str]:
        """Credentials as the environment variables that every AWS client reads."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def new_bucket(self) -> str:
        """Create an empty bucket with a name nobody had before."""
        name = f"test-{secrets.token_hex(4)}-{next(self._names)}"
        if self.root is not None:
            (self.root / name).mkdir()
            self.settle()
        else:
            self.client().create_bucket(Bucket=name)
        return name

    def settle(self) -> None:
        """Wait until the server notices files that were changed below ``root`` behind its back."""
        if self.root is not None:
            time.sleep(0.02)

    def url(self, bucket: str, path: str = "", *, endpoint: str | None = None) -> str:
        """A replica URL, the one that Litestream takes as well; ``endpoint`` overrides for a proxy in between."""
        query = urlencode({"endpoint": endpoint or self.endpoint, "region": self.region, "forcePathStyle": "true"})
        key = quote(path.strip("/"))
        return f"s3://{bucket}{'/' + key if key else ''}?{query}"

    def client(self) -> Any:
        """A botocore S3 client, to look at objects or damage them without going through the project's own code."""
        import botocore.session
        from botocore.config import Config

        config = Config(
            retries={"max_attempts": 0},
            connect_timeout=5,
            read_timeout=30,
            s3={"addressing_style": "path"},
            proxies={},
            # rclone answers a range with the checksum of the whole object
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            verify=False,  # plain HTTP; a CA bundle of the environment must not matter
            config=config,
        )

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """All keys below a prefix, sorted."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", []))


def _succeeds(attempt: Callable[[], object]) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        attempt()
    except (BotoCoreError, ClientError):
        return False
    return True


@contextlib.contextmanager
def serve_rclone(directory: Path, *, port: int | None = None) -> Iterator[S3Server]:
    """rclone over ``directory``/buckets. A test may change files there directly, then call ``settle()``."""
    root = directory / "buckets"
    root.mkdir(parents=True, exist_ok=True)
    port = free_port() if port is None else port
    address = f"127.0.0.1:{port}"
    command = [find_program("rclone"), "serve", "s3", "--config", "", "--addr", address]
    command += ["--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--dir-cache-time", _RCLONE_CACHE, "--poll-interval", "0"]
    with Process([*command, str(root)], log=directory / "rclone.log", env=clean_env()) as process:
        server = S3Server("rclone", f"http://{address}", root, process)
        client = server.client()
        process.wait_until(lambda: _succeeds(client.list_buckets), 20)
        yield server


@contextlib.contextmanager
def serve_seaweed(directory: Path) -> Iterator[S3Server]:
    """SeaweedFS with its data in ``directory``: master, volume server, filer and S3 gateway in one process."""
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    ports = free_ports(4, grpc=True)
    s3, master, volume, filer = ports
    command = [
        find_program("weed"),
        "-logtostderr=true",  # else it writes log files into the system's temporary directory
        "server",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        # A bucket takes volumes of its own: without these two, some 25 buckets fill the server.
        "-volume.max=1000",
        "-s3",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.port={s3}",
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
    ]
    environment = clean_env({"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"})
    process = Process(command, log=directory / "seaweed.log", env=environment, cwd=directory)
    try:
        server = S3Server("seaweed", f"http://127.0.0.1:{s3}", None, process)
        client = server.client()
        process.wait_until(lambda: _succeeds(client.list_buckets), 60, interval=0.1)
        # It lists buckets seconds before a volume takes the first object.
        bucket = server.new_bucket()
        process.wait_until(lambda: _succeeds(lambda: client.put_object(Bucket=bucket, Key="ready")), 60)
        client.delete_object(Bucket=bucket, Key="ready")
        yield server
    finally:
        # A polite end takes it 25 s, and nothing in it is worth keeping.
        process.kill()
        for port in ports:
            for number in (port, port + _GRPC_OFFSET):
                for leftover in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    leftover.unlink(missing_ok=True)
