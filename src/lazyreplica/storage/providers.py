"""Host names of S3's providers that hold a bucket, as in ``s3://bucket.nyc3.digitaloceanspaces.com/path``. Pure.

Litestream 0.5.17 knows those of `_HOSTS`. Other providers' hosts it takes for the name of a bucket on AWS; those are
refused here, with the URL to write instead, which both read alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DEFAULT_REGION = "us-east-1"

AWS_HOST = re.compile(r"s3(?:[.-](?P<region>[a-z0-9-]+))?\.amazonaws\.com(?:\.cn)?")

# Not compiled before one is looked for: together that takes 2 ms.
_HOSTS = (
    # Pattern, endpoint, path-style addressing.
    (r"(?P<bucket>.+)\.localhost", "http://localhost", True),
    (
        r"(?P<bucket>.+)\.s3\.(?P<region>[^.]+)\.backblazeb2\.com",
        "https://s3.{region}.backblazeb2.com",
        True,
    ),
    (r"(?P<bucket>.+)\.s3\.filebase\.com", "https://s3.filebase.com", True),
    (
        r"(?P<bucket>.+)\.(?P<region>[^.]+)\.digitaloceanspaces\.com",
        "https://{region}.digitaloceanspaces.com",
        False,
    ),
    (
        r"(?P<bucket>.+)\.s3\.(?P<region>[^.]+)\.scw\.cloud",
        "https://s3.{region}.scw.cloud",
        False,
    ),
    (rf"(?P<bucket>.+)\.{AWS_HOST.pattern}", None, False),
)
_OTHERS = (
    # Pattern, and the region to write.
    (r"(?:(?P<bucket>.+)\.)?(?P<host>[0-9a-f]{32}(?:\.[a-z]+)?\.r2\.cloudflarestorage\.com)", "auto"),
    (r"(?:(?P<bucket>.+)\.)?(?P<host>fly\.storage\.tigris\.dev|t3\.storage\.dev)", "auto"),
    (r"(?:(?P<bucket>.+)\.)?(?P<host>(?P<region>[^.]+)\.linodeobjects\.com)", "{region}"),
    (r"(?:(?P<bucket>.+)\.)?(?P<host>(?P<region>[^.]+)\.your-objectstorage\.com)", "{region}"),
    (r"(?:(?P<bucket>.+)\.)?(?P<host>(?P<region>[^.]+)\.vultrobjects\.com)", "{region}"),
    (r"(?:(?P<bucket>.+)\.)?(?P<host>s3\.(?P<region>[^.]+)\.wasabisys\.com)", "{region}"),
    (r"(?:(?P<bucket>.+)\.)?(?P<host>s3\.oss-(?P<region>[^.]+)\.aliyuncs\.com)", "oss-{region}"),
    (r"(?:(?P<bucket>.+)\.)?(?P<host>[^.]+\.compat\.objectstorage\.[^.]+\.oraclecloud\.com)", "us-east-1"),
    (r"(?:(?P<bucket>.+)\.)?(?P<host>storage\.googleapis\.com)", "auto"),
)


@dataclass(frozen=True, slots=True)
class BucketHost:
    """What a host name with a bucket in it tells."""

    bucket: str
    endpoint: str | None
    """None for AWS."""
    region: str
    path_style: bool


def bucket_in_host(host: str) -> BucketHost | None:
    """The bucket in a host name of one of the providers that Litestream knows by their names."""
    if "." not in host:
        return None
    for pattern, endpoint, path_style in _HOSTS:
        if match := re.fullmatch(pattern, host):
            region = match.groupdict().get("region")
            address = endpoint.format(region=region) if endpoint else None
            return BucketHost(match["bucket"], address, region or DEFAULT_REGION, path_style)
    return None


def misplaced(host: str) -> str | None:
    """The URL to write where another provider's host stands in a bucket's place."""
    if "." not in host:
        return None
    for pattern, region in _OTHERS:
        if match := re.fullmatch(pattern, host):
            groups = match.groupdict()
            where = region.format(region=groups.get("region"))
            return f"s3://{groups['bucket'] or 'bucket'}/path?endpoint=https://{groups['host']}&region={where}"
    return None
