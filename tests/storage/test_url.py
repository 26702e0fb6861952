"""Replica URLs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyreplica.errors import ConfigError
from lazyreplica.storage.url import S3URL, FileURL, parse_replica_url, quote_key


def s3(url: str, **environ: str) -> S3URL:
    parsed = parse_replica_url(url, environ)
    assert isinstance(parsed, S3URL)
    return parsed


def test_full() -> None:
    url = s3("s3://bucket/a/b?endpoint=http://127.0.0.1:9000&region=eu-north-1&forcePathStyle=true")
    assert url == S3URL("bucket", "a/b", "http://127.0.0.1:9000", "eu-north-1", path_style=True)
    assert url.base_url == "http://127.0.0.1:9000/bucket"
    assert str(url) == "s3://bucket/a/b?endpoint=http://127.0.0.1:9000&region=eu-north-1"


def test_aws() -> None:
    assert s3("s3://bucket/p").base_url == "https://bucket.s3.us-east-1.amazonaws.com"
    assert s3("s3://bucket/p", AWS_DEFAULT_REGION="eu-west-1", AWS_REGION="").region == "eu-west-1"
    assert s3("s3://bucket/p", AWS_REGION="eu-west-2", AWS_DEFAULT_REGION="eu-west-1").region == "eu-west-2"
    assert s3("s3://bucket/p?region=eu-west-3", AWS_REGION="eu-west-2").region == "eu-west-3"
    assert s3("s3://my.bucket/p?region=eu-west-3").base_url == "https://s3.eu-west-3.amazonaws.com/my.bucket"
    assert s3("s3://bucket/p?forcePathStyle=1").base_url == "https://s3.us-east-1.amazonaws.com/bucket"
    assert s3("s3://bucket/p?region=cn-north-1").base_url == "https://bucket.s3.cn-north-1.amazonaws.com.cn"


@pytest.mark.parametrize(
    ("endpoint", "normal"),
    [
        ("http://LOCALHOST:9000/", "http://localhost:9000"),
        ("https://s3.example.com:443", "https://s3.example.com"),
        ("http://s3.example.com:80/base/path/", "http://s3.example.com/base/path"),
        ("s3.example.com", "https://s3.example.com"),
        ("minio:9000", "https://minio:9000"),
        ("127.0.0.1:9000", "http://127.0.0.1:9000"),
        ("10.1.2.3:9000", "http://10.1.2.3:9000"),
        ("192.168.1.2", "http://192.168.1.2"),
        ("localhost:9000", "http://localhost:9000"),
        ("nas.local:9000", "http://nas.local:9000"),
        ("http://[::1]:9000", "http://[::1]:9000"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
    ],
)
def test_endpoints(endpoint: str, normal: str) -> None:
    url = s3(f"s3://bucket/p?endpoint={endpoint}", AWS_REGION="eu-west-1")
    assert (url.endpoint, url.path_style, url.region) == (normal, True, "us-east-1")
    assert url.base_url == f"{normal}/bucket"


def test_virtual_hosted_endpoint() -> None:
    url = s3("s3://bucket/p?endpoint=https://s3.example.com:8443&force-path-style=false")
    assert url.base_url == "https://bucket.s3.example.com:8443"


def test_endpoint_of_the_environment() -> None:
    tigris = {"AWS_ENDPOINT_URL_S3": "https://fly.storage.tigris.dev", "AWS_REGION": "auto"}
    url = s3("s3://bucket/p", AWS_ENDPOINT_URL="http://other", **tigris)
    assert (url.base_url, url.region) == ("https://bucket.fly.storage.tigris.dev", "auto")
    assert s3("s3://bucket/p", AWS_ENDPOINT_URL="http://127.0.0.1:9000").base_url == "http://127.0.0.1:9000/bucket"
    assert s3("s3://bucket/p?endpoint=http://h", **tigris).endpoint == "http://h"
    assert s3(str(url)) == url


@pytest.mark.parametrize(
    ("host", "base", "region"),
    [
        ("bucket.localhost:9000", "http://localhost:9000/bucket", "us-east-1"),
        ("bucket.s3.us-west-004.backblazeb2.com", "https://s3.us-west-004.backblazeb2.com/bucket", "us-west-004"),
        ("bucket.s3.filebase.com", "https://s3.filebase.com/bucket", "us-east-1"),
        ("bucket.fra1.digitaloceanspaces.com", "https://bucket.fra1.digitaloceanspaces.com", "fra1"),
        ("bucket.s3.fr-par.scw.cloud", "https://bucket.s3.fr-par.scw.cloud", "fr-par"),
        ("bucket.s3.amazonaws.com", "https://bucket.s3.us-east-1.amazonaws.com", "us-east-1"),
        ("bucket.s3.eu-west-1.amazonaws.com", "https://bucket.s3.eu-west-1.amazonaws.com", "eu-west-1"),
    ],
)
def test_providers(host: str, base: str, region: str) -> None:
    url = s3(f"s3://{host}/p", AWS_REGION="elsewhere")
    assert (url.bucket, url.base_url, url.region) == ("bucket", base, region)
    assert s3(str(url)) == url


@pytest.mark.parametrize(
    "same",
    [
        [
            "s3://b/a/c",
            "S3://b/a/c/",
            "s3://b//a/./x/../c",
            "s3://b/%61/c?region=us-east-1",
            "s3://b/a/c?skipVerify=no",
        ],
        ["s3://b", "s3://b/", "s3://b/.", "s3://b/?signPayload=true&requireContentMD5=false"],
        ["s3://b/p?endpoint=https://s3.eu-west-1.amazonaws.com", "s3://b/p?region=eu-west-1"],
        ["s3://b/p?endpoint=http://H:80", "s3://b/p?endpoint=http://h/&forcePathStyle=true"],
        ["s3://b/a+b%20c", "s3://b/a%2Bb c"],
        ["file:///a/b", "file:///a//b/", "file://localhost/a/./b", "file:///a/c/../b", "file:/a/b", "file:////a/b"],
        ["file:///a%20%C3%A9", "file:///a é"],
    ],
)
def test_spellings_are_equal(same: list[str]) -> None:
    values = {parse_replica_url(url, {}) for url in same}
    assert len(values) == 1
    assert len({str(value) for value in values}) == 1


def test_different_replicas_differ() -> None:
    urls = ["s3://b/p", "s3://b/P", "s3://c/p", "s3://b/p?endpoint=http://h", "s3://b/p?region=x", "file:///b/p"]
    assert len({str(parse_replica_url(url, {})) for url in urls}) == len(urls)


def test_percent_encoding() -> None:
    assert s3("s3://b/a%20b+c/%C3%A9%25x").path == "a b+c/é%x"
    assert parse_replica_url("file:///a%20b%3Fc%25", {}) == FileURL(Path("/a b?c%"))


@settings(deadline=None)  # a busy machine is no failure
@given(
    bucket=st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True),
    path=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30),
    endpoint=st.sampled_from([None, "http://127.0.0.1:9000", "https://s3.example.com"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_canonical_form_round_trips(
    bucket: str, path: str, endpoint: str | None, flags: tuple[bool, bool, bool]
) -> None:
    path = "/".join(part for part in path.split("/") if part not in {"", ".", ".."})
    url = S3URL(bucket, path, endpoint, "eu-west-1", *flags)
    assert parse_replica_url(str(url), {}) == url
    file = FileURL(Path("/" + path))
    assert parse_replica_url(str(file), {}) == file


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/p", r"scheme 'gs'; supported are s3://.*file:///"),
        ("bucket/p", "no scheme; write s3://"),
        ("", "no scheme"),
        ("s3:bucket", "has no bucket"),
        ("s3://", "no bucket; write s3://bucket/path"),
        ("s3:///path", "no bucket"),
        ("s3://buc ket/p", "'buc ket' is not a bucket name"),
        ("s3://bucket:9000/p", r"port 9000 where the bucket goes; write s3://bucket/path\?endpoint=http://bucket:9000"),
        ("s3://arn:aws:s3:eu-west-1:1:accesspoint/x/p", "access point"),
        ("s3://b/p?Endpoint=x", "'Endpoint' is unknown; known are endpoint, region, forcePathStyle"),
        ("s3://b/p?region=a&region=b", "'region' is given twice"),
        ("s3://b/p?skipVerify=a&skip-verify=b", "'skipVerify' is given twice"),
        ("s3://b/p?region=us east", "region is 'us east'"),
        ("s3://b/p?forcePathStyle=maybe", "forcePathStyle is 'maybe'; write true or false"),
        ("s3://b/p?endpoint=ftp://h", "endpoint 'ftp://h' is not an address"),
        ("s3://b/p?endpoint=http://", "endpoint 'http://' is not an address"),
        ("s3://b/p?endpoint=http://h:x", "is not an address"),
        ("s3://b/p?endpoint=[", "is not an address"),
        ("s3://b/p#x", "write %23"),
        ("s3://b/%FF", "not UTF-8"),
        ("s3://b/a\nb", "control character"),
        ("file:///var/lib/\udcaf", "is not UTF-8"),
        ("s3://bucket.localhost.s3.eu-west-1.amazonaws.com/app", "'bucket.localhost' cannot be told from a host name"),
        ("file://dir/sub", r"relative directory 'dir/sub'; write an absolute one with three slashes: file:///"),
        ("file:dir", "relative directory 'dir'"),
        ("file:///a?x=1", "file:// URLs take none"),
        ("file:///a%00", "%00"),
    ],
)
def test_errors(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_replica_url(url, {})


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:TOPSECRET@bucket/p",
        "s3://user:TOP/SECRET@bucket/p",
        "s3://user:12/TOPSECRET@bucket/p",
        "s3://TOPSECRET@bucket/p#x",
        "gs://user:TOPSECRET@bucket/p",
        "file://user:TOPSECRET@host/p",
        "s3://b/p?endpoint=http://user:TOPSECRET@h",
        "s3://b/p?endpoint=user:TOPSECRET@h:x",
        "s3://b/p?secretAccessKey=TOPSECRET",
        "user:TOPSECRET@bucket/p",
    ],
)
def test_secrets_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_replica_url(url, {})
    assert "SECRET" not in str(caught.value).replace("AWS_SECRET_ACCESS_KEY", "")
    assert "TOP" not in str(caught.value)
    assert caught.value.__cause__ is None


ARN = "arn:aws:s3:eu-west-1:123456789012:accesspoint/reports"


def test_access_points() -> None:
    url = s3(f"s3://{ARN}/a%20b?region=us-east-1", AWS_REGION="us-east-2")
    assert (url.bucket, url.path, url.region) == (ARN, "a b", "eu-west-1")
    assert url.base_url == "https://reports-123456789012.s3-accesspoint.eu-west-1.amazonaws.com"
    assert s3(str(url)) == url == s3(f"s3://{ARN}/a b")
    china = s3("s3://arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/x")
    assert (china.base_url, china.path) == ("https://x-123456789012.s3-accesspoint.cn-north-1.amazonaws.com.cn", "")
    outpost = s3(f"s3://{ARN}/p?endpoint=https://s3.example.com:8443")
    assert outpost.base_url == "https://reports-123456789012.s3.example.com:8443"
    assert s3(str(outpost)) == outpost


SSE = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
SSE_MD5 = "KYvwGXoFFJ42a2u2GDWhwQ=="  # as Litestream sends it


@pytest.mark.parametrize(
    "query",
    [
        f"sse-customer-key={SSE}",
        f"sseCustomerKey={SSE}&sseCustomerAlgorithm=AES256&sseCustomerKeyMD5={SSE_MD5}",
        f"sse-customer-key={SSE}&sse-customer-algorithm=AES256&sse-customer-key-md5={SSE_MD5}&endpoint=10.0.0.1:9000",
    ],
)
def test_customer_keys(query: str) -> None:
    url = s3(f"s3://b/p?{query}")
    assert url.customer_key is not None
    assert url.customer_key.headers == {
        "x-amz-server-side-encryption-customer-algorithm": "AES256",
        "x-amz-server-side-encryption-customer-key": SSE,
        "x-amz-server-side-encryption-customer-key-md5": SSE_MD5,
    }
    assert not any(secret in repr(url) + str(url) + repr(url.customer_key) for secret in (SSE, SSE_MD5))


def test_what_concerns_writers_names_nothing() -> None:
    url = s3(
        "s3://b/p?sse-kms-key-id=arn:aws:kms:x&storageClass=STANDARD_IA&sign-payload=true&require-content-md5=false"
        "&concurrency=2&part-size=5MB"
    )
    assert (url.upload.kms_key, url.upload.storage_class) == ("arn:aws:kms:x", "STANDARD_IA")
    assert url == s3("s3://b/p?partSize=1&sseKmsKeyId=k") and str(url) == "s3://b/p?region=us-east-1"


ACCOUNT = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("host", "written"),
    [
        (f"b.{ACCOUNT}.r2.cloudflarestorage.com", f"s3://b/path?endpoint=https://{ACCOUNT}.r2.cloudflarestorage.com&"),
        (f"{ACCOUNT}.eu.r2.cloudflarestorage.com", f"s3://bucket/path?endpoint=https://{ACCOUNT}.eu.r2.cloud"),
        ("b.fly.storage.tigris.dev", "s3://b/path?endpoint=https://fly.storage.tigris.dev&region=auto"),
        ("b.us-east-1.linodeobjects.com", "endpoint=https://us-east-1.linodeobjects.com&region=us-east-1"),
        ("b.fsn1.your-objectstorage.com", "endpoint=https://fsn1.your-objectstorage.com&region=fsn1"),
        ("b.s3.eu-central-1.wasabisys.com", "endpoint=https://s3.eu-central-1.wasabisys.com&region=eu-central-1"),
        ("b.s3.oss-cn-hangzhou.aliyuncs.com", "https://s3.oss-cn-hangzhou.aliyuncs.com&region=oss-cn-hangzhou"),
        ("b.ewr1.vultrobjects.com", "endpoint=https://ewr1.vultrobjects.com&region=ewr1"),
    ],
)
def test_hosts_in_a_buckets_place(host: str, written: str) -> None:
    """Litestream 0.5.17 takes them for buckets of AWS."""
    with pytest.raises(ConfigError) as caught:
        s3(f"s3://{host}/p")
    assert written in str(caught.value)
    s3(str(caught.value).rpartition("write ")[2])


# As Litestream's guides write them: litestream.io/guides/s3-compatible, /tigris, /s3
GUIDES = {
    "s3://mybkt.litestream.io/db": "https://s3.us-east-1.amazonaws.com/mybkt.litestream.io",
    "s3://mybkt.nyc3.digitaloceanspaces.com/db": "https://mybkt.nyc3.digitaloceanspaces.com",
    "s3://mybucket/db?endpoint=s3.us-west-1.wasabisys.com": "https://s3.us-west-1.wasabisys.com/mybucket",
    "s3://mybucket/db?endpoint=localhost:9000": "http://localhost:9000/mybucket",
    "s3://mybucket/db?endpoint=fly.storage.tigris.dev&region=auto": "https://fly.storage.tigris.dev/mybucket",
    "s3://mybucket/db?endpoint=https://minio.example.com:9000": "https://minio.example.com:9000/mybucket",
    "s3://mybucket/db?endpoint=https://x.supabase.co/storage/v1/s3&region=eu-central-1": (
        "https://x.supabase.co/storage/v1/s3/mybucket"
    ),
    "s3://mybucket/db?endpoint=n.compat.objectstorage.us-phoenix-1.oraclecloud.com": (
        "https://n.compat.objectstorage.us-phoenix-1.oraclecloud.com/mybucket"
    ),
}


@pytest.mark.parametrize("url", GUIDES)
def test_urls_of_the_guides(url: str) -> None:
    assert s3(url).base_url == GUIDES[url]
    assert s3(str(s3(url))) == s3(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://arn:aws:s3::123456789012:accesspoint/x.mrap/p", "not the ARN of an access point in one region"),
        ("s3://arn:aws:s3-outposts:eu-west-1:123456789012:accesspoint/x/p", "not the ARN of an access point"),
        ("s3://arn:aws:s3:eu-west-1:123456789012:bucket/x", "not the ARN of an access point"),
        (f"s3://{ARN}/p?forcePathStyle=true", "an access point has no path style"),
        (f"s3://b/p?sse-customer-key={SSE}&sse-customer-algorithm=AES128", "sse-customer-algorithm must be AES256"),
        (f"s3://b/p?sse-customer-key={SSE[:-4]}", "sse-customer-key is not 32 bytes in base64"),
        (f"s3://b/p?sse-customer-key={SSE}&sse-customer-key-md5=x", "is not the MD5 of sse-customer-key; leave it out"),
        (f"s3://b/p?sse-customer-key={SSE}&sse-kms-key-id=k", "both sse-customer-key and sse-kms-key-id"),
        (f"s3://b/p?sse-customer-key={SSE}&endpoint=http://h.example", "needs an endpoint with https://"),
        ("s3://b/p?storage-class=A%0d%0aX-Evil:1", "storage-class is 'A.*expected visible ASCII"),
    ],
)
def test_errors_of_access_points_and_encryption(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_replica_url(url, {})
    assert SSE[:20] not in str(caught.value) and caught.value.__cause__ is None


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12))
def test_any_key_prefix_has_a_url(path: str) -> None:
    assert s3(f"s3://b/{quote_key(path)}").path == path


PIECES = st.sampled_from(
    f"s3:// file:// arn:aws:s3: eu-west-1 :123456789012 :accesspoint/ .localhost b / ? & = endpoint region {SSE} "
    "http:// sse-customer-key forcePathStyle : @ [ ] % 9 # é".split()
)


@settings(deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=30).map("s3://b/p?endpoint={}".format))
def test_any_text_is_a_url_or_a_configuration_error(text: str) -> None:
    try:
        parsed = parse_replica_url(text, {})
    except ConfigError as exc:
        assert SSE not in str(exc) or SSE in text.partition("?")[0]
    else:
        assert parse_replica_url(str(parsed), {}) == parsed


@pytest.mark.parametrize(
    "url",
    [
        "s3://b{}/a?x",
        "s3://b_{}!/a",
        "s3://b/a?region={}!",
        "s3://b/a?skipVerify={}",
        "file://{}",
        "x{}://b/a",
        "s3://b/{}\t",
    ],
)
def test_a_message_quotes_no_url_of_any_length(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_replica_url(url.format("a" * 50_000), {})
    assert len(str(caught.value)) < 1500
