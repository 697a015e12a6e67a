"""statics.s3: what is particular to S3, over a real server and a bad network."""

import hashlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError  # type: ignore[import-untyped,unused-ignore]

from statics import s3
from statics.errors import Conflict, Forbidden, NotFound, StaticsError, StoreUnavailable
from statics.s3 import S3Store
from statics.store import FolderStore, blob_key
from tests.statics.conftest import Front

Send = Callable[[socket.socket, bytes, int], None]
BIG = bytes(range(256)) * 2000


@pytest.fixture
def store(bucket: str, s3_endpoint: str) -> S3Store:
    return S3Store(bucket, endpoint=s3_endpoint)


@pytest.fixture(autouse=True)
def _one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "TRIES", 1)


def read(store: S3Store, key: str) -> bytes:
    with store.open(key) as chunks:
        return b"".join(chunks)


def test_s3_puts_under_the_prefix(bucket: str, s3_endpoint: str) -> None:
    S3Store(bucket, "/team/prod/", endpoint=s3_endpoint).put("channels/dev.json", b"x")
    assert S3Store(bucket, endpoint=s3_endpoint).read("team/prod/channels/dev.json", 1)[0] == b"x"


def test_s3_finds_its_endpoint_in_the_usual_variables(
    bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_endpoint)
    assert not S3Store(bucket).exists("channels/dev.json")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    with pytest.raises(StoreUnavailable):
        S3Store(bucket).exists("channels/dev.json")


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://store.example:9000", "http://store.example:9000/models/k"),
        (None, "https://models.s3.amazonaws.com/k"),
    ],
)
def test_s3_addresses_buckets(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, endpoint: str | None, url: str
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    store = S3Store("models", endpoint=endpoint)
    signed = store._client.generate_presigned_url("get_object", Params={"Bucket": "models", "Key": "k"})
    assert signed.split("?")[0].replace("s3.us-east-1.", "s3.") == url


def test_s3_asks_the_bucket_to_refuse_wrong_blobs(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    put = store._client.put_object

    def watched(**options: Any) -> Any:
        sent.append(options)
        return put(**options)

    monkeypatch.setattr(store._client, "put_object", watched)
    store.put(blob_key(hashlib.sha256(b"abc").hexdigest()), b"abc", if_absent=True)
    assert sent[0]["ChecksumSHA256"] == "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0="
    assert sent[0]["IfNoneMatch"] == "*"


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "AccessDenied", Forbidden),
        (403, "SignatureDoesNotMatch", Forbidden),
        (400, "ExpiredToken", Forbidden),
        (401, "Unauthorized", Forbidden),
        (404, "NoSuchBucket", NotFound),
        (409, "ConditionalRequestConflict", Conflict),
        (412, "PreconditionFailed", Conflict),
        (500, "InternalError", StoreUnavailable),
        (503, "SlowDown", StoreUnavailable),
        (301, "PermanentRedirect", StoreUnavailable),
    ],
)
def test_s3_names_what_the_server_says(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, status: int, code: str, kind: type[StaticsError]
) -> None:
    def refuse(**options: object) -> None:
        answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        raise ClientError(answer, "GetObject")

    monkeypatch.setattr(store._client, "get_object", refuse)
    with pytest.raises(kind, match=r"s3://.*/channels/dev.json"):
        store.read("channels/dev.json", 10)


def test_s3_has_nothing_in_a_missing_bucket(s3_endpoint: str) -> None:
    store = S3Store("no-such-bucket", endpoint=s3_endpoint)
    with pytest.raises(NotFound):
        store.read("channels/dev.json", 10)
    with pytest.raises(NotFound):
        store.put("channels/dev.json", b"x", if_match='"x"')


def test_s3_is_forbidden_without_credentials(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    code = "from statics.s3 import S3Store; S3Store('b', endpoint='http://127.0.0.1:1').read('k', 1)"
    # In a process of its own, because boto3 keeps the credentials it found for a whole process.
    home = Path(s3.__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=False
    )
    assert "Forbidden: forbidden: s3://b/k: found Unable to locate credentials" in ended.stderr


def test_s3_is_unavailable_where_nobody_listens(bucket: str) -> None:
    with pytest.raises(StoreUnavailable, match="EndpointConnectionError"):
        S3Store(bucket, endpoint="http://127.0.0.1:1").read("channels/dev.json", 10)


def test_s3_reads_through_a_plain_proxy(
    bucket: str, store: S3Store, bad_network: Callable[[Send], str]
) -> None:
    store.put("k", BIG)
    far = S3Store(bucket, endpoint=bad_network(lambda client, data, sent: client.sendall(data)))
    assert read(far, "k") == BIG


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("offset", [0, 1, 100_000, len(BIG), len(BIG) + 1])
def test_s3_begins_at_the_offset_whatever_the_server_makes_of_it(
    front: Callable[..., Front], tmp_path: Path, ranges: bool, offset: int
) -> None:
    FolderStore(tmp_path).put("k", BIG)
    server = front(tmp_path, ranges=ranges)
    with S3Store("bucket", endpoint=server.url).open("k", offset) as chunks:
        assert b"".join(chunks) == BIG[offset:]
    assert server.ranges_asked == ([f"bytes={offset}-"] if offset else [])


def test_s3_tries_again_by_itself_where_a_server_is_busy(
    front: Callable[..., Front], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = blob_key(hashlib.sha256(BIG).hexdigest())
    FolderStore(tmp_path).put(key, BIG)
    with pytest.raises(StoreUnavailable, match="HTTP 503 SlowDown"):
        read(S3Store("bucket", endpoint=front(tmp_path, busy=1).url), key)
    monkeypatch.setattr(s3, "TRIES", 2)
    assert read(S3Store("bucket", endpoint=front(tmp_path, busy=1).url), key) == BIG


def test_s3_is_unavailable_when_a_body_stalls(
    bucket: str, store: S3Store, bad_network: Callable[[Send], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stall(client: socket.socket, data: bytes, sent: int) -> None:
        client.sendall(data) if sent < 100_000 else time.sleep(10)

    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.4)

    store.put("k", BIG)
    far, begin = S3Store(bucket, endpoint=bad_network(stall)), time.monotonic()
    with pytest.raises(StoreUnavailable, match="ReadTimeout"):
        read(far, "k")
    assert time.monotonic() - begin < 5


def test_s3_never_takes_a_cut_body_for_a_whole_one(
    bucket: str, store: S3Store, bad_network: Callable[[Send], str]
) -> None:
    def cut(client: socket.socket, data: bytes, sent: int) -> None:
        if sent > 100_000:
            raise OSError
        client.sendall(data)

    store.put("k", BIG)
    far = S3Store(bucket, endpoint=bad_network(cut))
    with pytest.raises(StoreUnavailable):
        read(far, "k")


def test_s3_hands_on_what_drips_in(bucket: str, store: S3Store, bad_network: Callable[[Send], str]) -> None:
    """A reader must be able to look at the clock between drops that each come before the read timeout."""

    def drip(client: socket.socket, data: bytes, sent: int) -> None:
        for at in range(0, len(data), 64):
            client.sendall(data[at : at + 64])
            time.sleep(0.05)

    store.put("k", BIG)
    far, begin = S3Store(bucket, endpoint=bad_network(drip)), time.monotonic()
    with far.open("k") as chunks:
        first = next(chunks)
    assert 0 < len(first) < 1000
    assert time.monotonic() - begin < 5


def test_s3_is_unavailable_with_a_profile_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "staging")
    # boto3 keeps the profile that it found first for a whole process.
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with pytest.raises(StoreUnavailable, match=r"s3://b/prefix.*profile \(staging\)"):
        S3Store("b", "prefix")
