"""A store in an S3 bucket; the only module that imports boto3."""

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped,unused-ignore]
from botocore.config import Config  # type: ignore[import-untyped,unused-ignore]
from botocore.exceptions import (  # type: ignore[import-untyped,unused-ignore]
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from urllib3.exceptions import HTTPError

from statics import disk
from statics.errors import Forbidden, NotFound, StaticsError, StoreUnavailable
from statics.store import blob_key, conflict, not_found

CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 3.0  # between two pieces of an answer
TRIES = 3

BLOBS = blob_key("")


class _PastTheEnd(StoreUnavailable):
    """The server's way to say that an object ends before the offset asked for."""


class S3Store:
    """`endpoint` defaults to AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL; credentials and region are boto3's to find.

    Other stores than AWS are addressed by path. Threads may share one.
    """

    def __init__(self, bucket: str, prefix: str = "", *, endpoint: str | None = None) -> None:
        named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        endpoint = endpoint or named or None
        self.bucket, self.prefix = bucket, prefix.strip("/")
        with self._errors(""):  # a profile that is not there, a configuration that cannot be read
            self._client: Any = boto3.client(
                "s3",
                endpoint_url=endpoint,
                config=Config(
                    connect_timeout=CONNECT_TIMEOUT_S,
                    read_timeout=READ_TIMEOUT_S,
                    retries={"mode": "standard", "total_max_attempts": TRIES},
                    s3={"addressing_style": "path" if endpoint else "auto"},
                    # boto3's checksums miss changed bytes (ranged parts, objects stored without one), and some
                    # stores reject them; every byte that counts is held against a SHA-256 of ours instead.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )

    @contextmanager
    def open(self, key: str, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with self._get(key, offset) as (chunks, _):
            yield chunks

    def read(self, key: str, limit: int) -> tuple[bytes, str | None]:
        with self._get(key) as (chunks, token):
            return disk.collect(chunks, self._part(key), limit), token

    def exists(self, key: str) -> bool:
        try:
            with self._errors(key):
                self._client.head_object(Bucket=self.bucket, Key=self._key(key))
        except NotFound:
            return False
        return True

    def put(
        self, key: str, source: bytes | Path, *, if_absent: bool = False, if_match: str | None = None
    ) -> None:
        options: dict[str, str] = {}
        if if_absent:
            options["IfNoneMatch"] = "*"
        if if_match is not None:
            options["IfMatch"] = if_match
        if key.startswith(BLOBS):
            # The key is the digest: let the bucket refuse a blob that does not deserve its name.
            options["ChecksumSHA256"] = base64.b64encode(bytes.fromhex(key.removeprefix(BLOBS))).decode()
        if isinstance(source, bytes):
            self._put(key, source, options)
        else:
            with open(source, "rb") as file:
                self._put(key, file, options)

    def keys(self, prefix: str) -> Iterator[tuple[str, int, datetime]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self._key(prefix)
        )
        with self._errors(prefix):
            for page in pages:
                for found in page.get("Contents", ()):
                    key = found["Key"].removeprefix(self._key(""))
                    yield key, found["Size"], found["LastModified"]

    def delete(self, key: str) -> None:
        with self._errors(key):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def _put(self, key: str, body: Any, options: dict[str, str]) -> None:
        try:
            with self._errors(key):
                self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=body, **options)
        except NotFound as error:
            if "IfMatch" in options and "NoSuchBucket" not in str(error.__cause__):
                raise conflict(key, found="nothing", expected=f"version {options['IfMatch']}") from error
            raise

    @contextmanager
    def _get(self, key: str, offset: int = 0) -> Iterator[tuple[Iterator[bytes], str | None]]:
        # One request for all that is wanted, never boto3's parallel parts: those have returned changed bytes
        # without an error.
        options = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            with self._errors(key):
                answer = self._client.get_object(Bucket=self.bucket, Key=self._key(key), **options)
        except _PastTheEnd:
            yield iter(()), None
            return
        body = answer["Body"]
        try:
            chunks = self._chunks(key, body, answer.get("ContentLength"))
            if not str(answer.get("ContentRange", "")).startswith(f"bytes {offset}-"):
                chunks = _without(chunks, offset)  # the whole object: this server knows no ranges
            yield chunks, answer.get("ETag")
        finally:
            body.close()

    def _chunks(self, key: str, body: Any, length: int | None) -> Iterator[bytes]:
        seen = 0
        while True:
            with self._errors(key):
                # `body.read(n)` returns when n bytes came, however slowly; `read1` returns what is there, so
                # the reader sees its deadline pass. Content-Encoding is ignored: we hash what is stored.
                chunk: bytes = body._raw_stream.read1(disk.CHUNK, decode_content=False)
            if not chunk:
                break
            seen += len(chunk)
            yield chunk
        if length is not None and seen < length:  # a connection closed midway reads like an end
            raise _unavailable(self._part(key), f"a body that ended after {seen} of {length} bytes")

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _part(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._key(key)}"

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        part = self._part(key)
        try:
            yield
        except ClientError as error:
            raise _from_answer(part, error) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise _forbidden(part, str(error)) from error
        except (BotoCoreError, HTTPError, OSError) as error:
            raise _unavailable(part, f"{type(error).__name__}: {error}") from error


def _from_answer(part: str, error: ClientError) -> StaticsError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    found = f"HTTP {status} {code}"
    if status == 404:
        return not_found(part)
    if status == 416:
        return _PastTheEnd(part=part, found=found, expected="a longer object", remedy="begin anew")
    if status in {409, 412}:
        return conflict(part, found=found, expected="the version named")
    if status in {401, 403} or code in {"ExpiredToken", "InvalidToken"}:
        return _forbidden(part, found)
    return _unavailable(part, found)


def _without(chunks: Iterator[bytes], left: int) -> Iterator[bytes]:
    """A stream less its first `left` bytes."""
    for chunk in chunks:
        if len(chunk) > left:
            yield chunk[left:]
        left = max(0, left - len(chunk))


def _forbidden(part: str, found: str) -> Forbidden:
    return Forbidden(
        part=part,
        found=found,
        expected="leave to use this object",
        remedy="correct credentials and bucket policy (without s3:ListBucket a missing key answers 403 too)",
    )


def _unavailable(part: str, found: str) -> StoreUnavailable:
    return StoreUnavailable(
        part=part,
        found=found,
        expected="an answer",
        remedy="check endpoint, region and network, then try again",
    )
