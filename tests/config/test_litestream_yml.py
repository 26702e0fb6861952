"""litestream.yml: which replica and which keys a database has. Expectations were tried against Litestream 0.5.17."""

from __future__ import annotations

import logging
import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyreplica import litestream_yml
from lazyreplica.errors import ConfigError
from lazyreplica.litestream_yml import document
from lazyreplica.naming import configure, replica_of, resolve
from lazyreplica.storage.credentials import CredentialSource
from lazyreplica.storage.url import S3URL, parse_replica_url

SSE = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
SECRET = "TOPSECRETtopsecret0123456789"
DB = "dbs:\n  - path: /data/app.db\n    replica: "

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Put a litestream.yml in place."""
    path = tmp_path / "litestream.yml"
    monkeypatch.setenv("LITESTREAM_CONFIG", str(path))
    monkeypatch.setattr(document, "_warned", set())

    def write(text: str) -> Path:
        path.write_text(text)
        return path

    return write


def url_of(name: str) -> str:
    return replica_of(name)[0]


def keys_of(name: str) -> tuple[str, str] | None:
    credentials = replica_of(name)[1]
    found = credentials.get() if credentials else None
    return (found.access_key, found.secret_key) if found else None


# -- replicas --


@pytest.mark.parametrize(
    ("replica", "url"),
    [
        ("{url: 's3://bkt/app'}", "s3://bkt/app"),
        ("{url: 's3://bkt/app', region: eu-west-1}", "s3://bkt/app?region=eu-west-1"),
        ("{url: 's3://bkt.nyc3.digitaloceanspaces.com/app'}", "s3://bkt.nyc3.digitaloceanspaces.com/app"),
        # a key of the file goes over the URL's parameter
        (
            "{url: 's3://bkt/a?region=r-1&endpoint=http://h', region: r-2, endpoint: 'http://g'}",
            "s3://bkt/a?region=r-2&endpoint=http://g&forcePathStyle=true",
        ),
        # ... without a scheme it is https there, and http in the URL, for local hosts
        ("{url: 's3://bkt/a', endpoint: '10.0.0.1:9000'}", "s3://bkt/a?endpoint=https://10.0.0.1:9000"),
        ("{url: 's3://bkt/a?endpoint=10.0.0.1:9000'}", "s3://bkt/a?endpoint=http://10.0.0.1:9000"),
        ("{url: 's3://bkt/a?skipVerify=false&endpoint=https://h', skip-verify: yes}", "s3://bkt/a?endpoint=https://h"),
        ("{url: 's3://bkt/a?endpoint=https://h', skip-verify: on}", "s3://bkt/a?endpoint=https://h&skipVerify=true"),
        ("{type: s3, bucket: bkt, path: a/b}", "s3://bkt/a/b"),
        ("{type: s3, bucket: bkt}", "s3://bkt"),
        (
            "{type: s3, bucket: bkt, path: a, endpoint: s3.us-west-1.wasabisys.com, region: us-west-1}",
            "s3://bkt/a?endpoint=https://s3.us-west-1.wasabisys.com&region=us-west-1",
        ),
        (
            "{type: s3, bucket: bkt, path: a, endpoint: 'https://h', force-path-style: false}",
            "s3://bkt/a?endpoint=https://h&forcePathStyle=false",
        ),
        ("{path: /backup/app}", "file:///backup/app"),
        ("{type: file, path: '/backup/a b%20'}", "file:///backup/a%20b%2520"),
        ("{path: /backup/./x/../app}", "file:///backup/app"),
        # its file URLs are not decoded
        ("{url: 'file:///backup/a%20b'}", "file:///backup/a%2520b"),
        ("{url: 'file:///backup/a b?x=1'}", "file:///backup/a%2520b"),
        ("{url: 'file:///backup/a#b'}", "file:///backup/a%23b"),
    ],
)
@pytest.mark.parametrize("form", ["replica: {}", "replicas: [{}]"])
def test_where_a_replica_is(write: Write, replica: str, url: str, form: str) -> None:
    write("dbs:\n  - path: /data/app.db\n    " + form.replace("{}", replica))
    assert parse_replica_url(url_of("/data/app.db"), {}) == parse_replica_url(url, {})
    assert url_of("app.db") == url_of("/data/app.db")


@pytest.mark.parametrize(
    ("path", "prefix"), [("/db", "/db"), ("db/", "db/"), ("a//b", "a//b"), ("../x", "../x"), ("d.b/.", "d.b/.")]
)
def test_a_key_prefix_is_taken_as_it_is_written(write: Write, path: str, prefix: str) -> None:
    """Litestream cleans the paths of URLs, but not this one."""
    write(f"{DB}{{type: s3, bucket: bkt, path: '{path}'}}")
    parsed = parse_replica_url(url_of("app.db"), {})
    assert isinstance(parsed, S3URL) and parsed.path == prefix
    assert parse_replica_url(str(parsed), {}) == parsed


def test_defaults_at_the_top(write: Write) -> None:
    write(
        "bucket: bkt\nregion: r-1\nendpoint: http://h\naccess-key-id: top\nsecret-access-key: topsecret\n"
        "dbs:\n"
        "- path: /a.db\n  replica: {type: s3, path: a}\n"
        "- path: /b.db\n  replica: {type: s3, path: b, bucket: other, access-key-id: '0123', secret-access-key: no}\n"
        "- path: /c.db\n  replica: {path: /c}\n"
    )
    assert url_of("a.db") == "s3://bkt/a?endpoint=http://h&region=r-1"
    assert keys_of("a.db") == ("top", "topsecret")
    assert url_of("b.db") == "s3://other/b?endpoint=http://h&region=r-1"
    assert keys_of("b.db") == ("0123", "no"), "the replica's go first, and are texts"
    assert replica_of("c.db") == ("file:///c", None)


def test_merge_keys_and_anchors(write: Write) -> None:
    write(
        "x: &common {access-key-id: a, secret-access-key: s, region: r-1}\n"
        "dbs: [{path: /a.db, replica: {<<: *common, url: 's3://b/p'}}]"
    )
    assert (url_of("a.db"), keys_of("a.db")) == ("s3://b/p?region=r-1", ("a", "s"))


def test_half_a_key_pair_is_passed_over_as_litestream_does(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    write(f"{DB}{{url: 's3://b/p', secret-access-key: {SECRET}}}")
    assert replica_of("app.db") == ("s3://b/p", None)
    assert "without the other" in caplog.text and SECRET not in caplog.text


def test_variables(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "bkt")
    monkeypatch.setenv("KEYS", f"access-key-id: ak\nsecret-access-key: {SECRET}\n")
    text = "${KEYS}" + DB + "{url: 's3://${BUCKET}/$NOT_SET/a'}"
    write(text)
    assert (url_of("app.db"), keys_of("app.db")) == ("s3://bkt//a", ("ak", SECRET))
    write(DB + "{url: 's3://$NOT_SET/a'}")
    with pytest.raises(ConfigError, match=r"litestream\.yml:3: .*no bucket.*\(not set, .*: NOT_SET\)"):
        replica_of("app.db")
    monkeypatch.setenv("LITESTREAM_NO_EXPAND_ENV", "true")
    write(DB + "{path: '/$BUCKET'}")
    assert url_of("app.db") == "file:///%24BUCKET"


def test_encryption(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "key").write_text(f" {SSE}\n")
    s3 = "type: s3, bucket: b, path: p"
    for setting in (f"sse-customer-key: {SSE}", f"sse-customer-key-path: {tmp_path / 'key'}, sse-customer-key: x"):
        write(f"{DB}{{{s3}, {setting}}}")
        url, credentials = replica_of("app.db")
        assert isinstance(credentials, CredentialSource) and credentials.customer_key is not None
        assert credentials.customer_key.headers["x-amz-server-side-encryption-customer-key"] == SSE
        assert SSE not in url + repr(credentials)
    write(f"{DB}{{{s3}, sse-kms-key-id: kid, storage-class: STANDARD_IA}}")
    parsed = parse_replica_url(url_of("app.db"), {})
    assert isinstance(parsed, S3URL) and (parsed.upload.kms_key, parsed.upload.storage_class) == ("kid", "STANDARD_IA")
    # 0.5.17 takes no key from a URL in the file, and so writes in the clear
    write(f"{DB}{{url: 's3://b/p?sse-customer-key={SSE}&colour=red'}}")
    assert replica_of("app.db") == ("s3://b/p", None)
    assert "'sse-customer-key'" in caplog.text and "'colour'" in caplog.text and SSE not in caplog.text


# -- which database --


def test_names(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = pwd.getpwuid(os.getuid()).pw_dir
    monkeypatch.chdir(tmp_path)
    write("dbs:\n- path: sqlite://sub/../a.db\n  replica: {path: /a}\n- path: ~/h.db\n  replica: {path: ~/h}\n")
    for name in ("a.db", str(tmp_path / "a.db"), "./a.db", "x/../a.db"):
        assert url_of(name) == "file:///a"
    for name in ("h.db", f"{home}/h.db"):
        assert url_of(name) == parse_replica_url(f"file://{home}/h", {}).__str__()
    for name in ("b.db", "/a.db", "", "a", "../a.db"):
        with pytest.raises(ConfigError, match=rf"does not list '{name}'; .* lists {tmp_path}/a\.db, {home}/h\.db"):
            replica_of(name)


def test_an_ambiguous_base_name(write: Write) -> None:
    write("dbs: [{path: /one/app.db, replica: {path: /1}}, {path: /two/app.db, replica: {path: /2}}]")
    with pytest.raises(ConfigError, match=r"lists 2 databases called 'app.db': /one/app.db and /two/app.db; write the"):
        resolve("app.db", {})
    assert resolve("/two/app.db", {}).url == "file:///2"


def test_directories(write: Write) -> None:
    write(
        "dbs:\n"
        "- {dir: /t, pattern: '*.db', recursive: true, replica: {url: 's3://b/base?region=r-1'}}\n"
        "- {dir: /flat, pattern: '[a-c].sqlite', watch: true, replicas: [{type: s3, bucket: b, path: /x//y/}]}\n"
        "- {dir: /files, pattern: 'f?', replica: {path: /out}}\n"
        "- {dir: /fileurl, pattern: 'u*', replica: {url: 'file:///out%20'}}\n"
        "- {path: /t/listed.db, replica: {path: /listed}}\n"
    )
    assert url_of("/t/a.db") == "s3://b/base/a.db?region=r-1"
    assert url_of("/t/sub/deep/é 1.db") == "s3://b/base/sub/deep/%C3%A9%201.db?region=r-1"
    assert url_of("any.db") == "s3://b/base/any.db?region=r-1"
    assert url_of("/flat/b.sqlite") == "s3://b/%2Fx%2Fy%2Fb%2Esqlite"
    assert url_of("f1") == "file:///out/f1"
    assert url_of("/fileurl/u 1") == "file:///out%2520/u%25201"
    assert url_of("/t/listed.db") == url_of("listed.db") == "file:///listed", "path goes before dir"
    for name in ("/flat/sub/a.sqlite", "/flat/d.sqlite", "/t/a.sqlite", "/t", "/tt/a.db", "d.sqlite", "/t/../a.db"):
        with pytest.raises(ConfigError, match="does not list"):
            replica_of(name)
    write("dbs: [{dir: /1, pattern: '*', replica: {path: /x}}, {dir: /2, pattern: '*', replica: {path: /y}}]")
    with pytest.raises(ConfigError, match=r"/1/a\.db and /2/a\.db"):
        replica_of("a.db")


# -- which file, and what goes before it --


def test_the_first_file_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    etc, named = tmp_path / "etc.yml", tmp_path / "named.yml"
    monkeypatch.setattr(litestream_yml, "_USUAL", ("litestream.yml", str(etc)))
    with pytest.raises(ConfigError, match=r"there is no litestream.yml \(\$LITESTREAM_CONFIG, ./litestream.yml or"):
        replica_of("app.db")
    with pytest.raises(ConfigError, match=r"no replica is configured for 'app\.db'.*litestream\.yml"):
        resolve("app.db", {})
    for path in (etc, Path("litestream.yml"), named):
        path.write_text(f"{DB}{{path: /{path.stem}}}")
        if path == named:
            monkeypatch.setenv("LITESTREAM_CONFIG", str(path))
        assert url_of("app.db") == f"file:///{path.stem}"
    monkeypatch.setenv("LITESTREAM_CONFIG", "/no/such.yml")
    with pytest.raises(ConfigError, match=r"LITESTREAM_CONFIG is '/no/such\.yml', which is not a file"):
        replica_of("app.db")


def test_it_is_the_last_resort(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write(f"{DB}{{path: /yml}}")
    name = "/data/app.db"
    assert resolve(name, {"cache_size": "1k"}).options.cache_size == 1024
    assert resolve(name, {}).url == "file:///yml"
    monkeypatch.setenv("LITESTREAM_REPLICA_URL", "file:///env")
    assert resolve(name, {}).url == "file:///env"
    configure(name, "file:///configured")
    assert resolve(name, {}).url == "file:///configured"
    assert resolve(name, {"replica_url": "file:///explicit"}).url == "file:///explicit"
    write("dbs: [")
    assert resolve(name, {}).url == "file:///configured", "it is not even read"


# -- mistakes --


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dbs: [", r"yml:1 is not YAML: "),
        ("a: b: c", r"yml:1 is not YAML: mapping values are not allowed here"),
        (f"a: 1\nsecret-access-key: *{SECRET}", r"yml:2 is not YAML: found undefined alias \(a text\)"),
        (f"a: 1\nsecret-access-key: %{SECRET}", r"yml:2 is not YAML: found character"),
        (f"x: {SECRET}\t\0", "a character that YAML does not allow"),
        pytest.param("[" * 5000, "nested too deeply", id="deep"),
        ("- a", "yml:1: expected keys such as 'dbs:' at the top, found a sequence"),
        (SECRET, "yml:1: expected keys such as 'dbs:' at the top, found a scalar"),
        ("\n\ndbs: {}", "yml:3: dbs must be a list"),
        (f"dbs: [{SECRET}]", "yml:1: dbs must be a list, each item with keys"),
        ("dbs: [{}]", "yml:1: a database needs either path or dir"),
        ("dbs: [{path: /a, dir: /b}]", "needs either path or dir"),
        ("dbs: [{dir: /b}]", r"yml:1: dir needs a pattern, such as '\*\.db'"),
        ("dbs: [{dir: /b, pattern: '[a'}]", r"pattern '\[a' is malformed: a '\[' is not closed"),
        ("dbs: [{dir: /b, pattern: '*', recursive: maybe}]", "recursive must be true or false"),
        ('dbs: [{path: "/a\\0b"}]', "path has a NUL character"),
        ("dbs: [{path: [a]}]", "path must be a single value"),
        ("dbs: [{path: /data/app.db}]", "yml:1: has no replica"),
        (f"{DB}x", "yml:3: replica must have keys below it"),
        (f"{DB}{{path: /a}}\n    replicas: [{{path: /b}}]", "yml:4: has both replica and replicas"),
        (f"{DB}{{path: /a, url: 'file:///b'}}", "yml:3: has both url and path"),
        (f"bucket: b\n{DB}{{url: 's3://b/a'}}", "has both url and bucket"),
        (f"{DB}{{path: 's3://b/a'}}", "path is a URL; write it as url"),
        (f"{DB}{{type: s3, path: a}}", "an s3 replica needs a bucket"),
        (f"{DB}{{type: file}}", "a file replica needs a path"),
        (f"{DB}{{url: 'gs://b/a'}}", "the replica's type is 'gs', supported are s3 and file"),
        (f"{DB}{{type: sftp, host: h, password: {SECRET}}}", "type is 'sftp'"),
        (f"{DB}{{path: /a, age: {{recipients: [x]}}}}", "encrypted with age, which Litestream 0.5 refuses"),
        (f"{DB}{{type: s3, bucket: b, region: a b}}", "yml:3: replica URL .*region is 'a b'"),
        (f"{DB}{{type: s3, bucket: b, force-path-style: perhaps}}", "yml:3: force-path-style must be true or false"),
        (f"{DB}{{type: s3, bucket: b, sse-customer-key: {SECRET}}}", "yml:3: sse-customer-key is not 32 bytes"),
        (f"{DB}{{type: s3, bucket: b, sse-customer-key: {SSE}, sse-kms-key-id: k}}", "has both sse-customer-key"),
        (f"{DB}{{type: s3, bucket: b, sse-customer-key: {SSE}, endpoint: 'http://h.example'}}", "https://"),
        (f"{DB}{{type: s3, bucket: b, sse-customer-key-path: /no/such}}", "'/no/such' cannot be read: No such file"),
        (f"{DB}{{url: 's3://key:{SECRET}@b/a'}}", "carries credentials"),
        (f"{DB}{{url: 's3://b/a', endpoint: 'http://k:{SECRET}@h'}}", "the endpoint carries credentials"),
    ],
)
def test_mistakes(write: Write, text: str, message: str) -> None:
    write(text)
    with pytest.raises(ConfigError, match=message) as caught:
        replica_of("app.db" if "app.db" in text else "a")
    assert SECRET not in str(caught.value) and SSE not in str(caught.value)
    cause = caught.value.__cause__ or (None if caught.value.__suppress_context__ else caught.value.__context__)
    assert cause is None or isinstance(cause, OSError)


def test_not_utf8(write: Write) -> None:
    write("").write_bytes(b"a: \xff" + SECRET.encode())
    with pytest.raises(ConfigError, match=r"litestream\.yml is not UTF-8 text") as caught:
        replica_of("a")
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("text", ["", "# nothing", "dbs:", "dbs: []", "---\n...\n", "~"])
def test_an_empty_file_lists_nothing(write: Write, text: str) -> None:
    write(text)
    with pytest.raises(ConfigError, match=r"does not list 'a'; .* lists no database"):
        replica_of("a")


def test_strangers_are_warned_about_once(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    write(
        f"colour: {SECRET}\nlevels: [{{interval: 1s}}]\nlogging: {{level: info}}\ndbs:\n"
        "- path: /a.db\n  access-key-id: x\n  meta-path: /m\n  replicas:\n"
        "  - path: /x\n    sync-interval: 1s\n    regoin: y\n  - path: /y\n"
    )
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        assert url_of("a.db") == "file:///x"
    messages = [record.getMessage().partition("litestream.yml:")[2] for record in caplog.records]
    assert messages == [
        "1: 'colour' is no key that Litestream knows here: ignored",
        "6: 'access-key-id' is no key that Litestream knows here: ignored",
        "8: has more than one replica, which Litestream 0.5 refuses: the first is read",
        "11: 'regoin' is no key that Litestream knows here: ignored",
    ]


WORDS = st.sampled_from(
    f"dbs path dir pattern replica replicas url type bucket endpoint age sse-customer-key << {SSE} s3 file true /a.db "
    "a.db s3://b/p file:///x http://h * [ $X".split()
)
NODES = st.recursive(
    WORDS | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=12,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NODES)
def test_any_structure_is_read_or_refused(write: Write, node: object) -> None:
    import yaml

    for text in (yaml.safe_dump(node), yaml.safe_dump({"dbs": [{"path": "/a.db", "replica": node}]})):
        write(text)
        try:
            url, _ = replica_of("a.db")
        except ConfigError:
            continue
        assert parse_replica_url(str(parse_replica_url(url))) == parse_replica_url(url)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("ab:/-*&!%{}[]#|>'\"\\\n\t $~.,<")) | st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_read_or_refused(write: Write, text: str) -> None:
    write(text)
    with pytest.raises(ConfigError):
        replica_of("no such database.db")
