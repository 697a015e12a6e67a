"""The flow of docs/one-release.md: build, sign, publish, pull, verify, load, serve; and the next sprint's release on top."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import boto3
import grpc
import pytest

from nlu import parts
from nlu.origin import find_bundle
from nlu.serve import running
from nlu.settings import Settings
from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub
from statics.bundle import Bundle, build, diff
from statics.errors import StaticsError
from statics.locate import open_store
from statics.publish import publish
from statics.signing import generate_key, key_id, save_private
from statics.store import FolderStore, Store
from tests.test_one_utterance import turn
from tests.tiny import CREATED, Made


@pytest.fixture(params=["folder", "s3"])
def store_url(
    request: pytest.FixtureRequest, tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Where releases are published: a folder, and a real S3-compatible server."""
    if request.param == "folder":
        return str(tmp_path / "store")
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"statics-{abs(hash(str(tmp_path))) % 10**12}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/chorus"


async def test_release_is_published_pulled_and_served(tiny: Made, tmp_path: Path, store_url: str) -> None:
    import base64

    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    private, public = generate_key()
    save_private(private, tmp_path / "release.pem")
    raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
    keyring = tmp_path / "trusted.json"
    keyring.write_text(json.dumps({key_id(public): base64.b64encode(raw).decode()}))

    def release(folder: Path, seq: int) -> Bundle:
        out = tmp_path / f"release-{seq}"
        return build(
            parts.collect(folder), out, channel="prod", seq=seq, created=CREATED, requires_service=">=0.1.0.dev0",
            signing_key=private,
        )  # fmt: skip

    settings = Settings(
        store=store_url, channel="prod", statics=tmp_path / "pod", keyring=keyring, require_signature=True, port=0,
        metrics=False,
    )  # fmt: skip
    first = release(tiny.parts, 1)
    publish(first, open_store(store_url))
    assert await _served(settings) == first.digest

    sprint = shutil.copytree(tiny.parts, tmp_path / "sprint")
    head = json.loads((sprint / "head.intent" / "head.json").read_bytes())
    (sprint / "head.intent" / "head.json").write_text(json.dumps(head | {"made_by": "sprint 2"}))
    second = release(sprint, 2)
    changed = [change for change in diff(first.manifest, second.manifest) if change.what != "same"]
    assert [change.folder for change in changed] == ["head.intent"]
    publish(second, open_store(store_url))
    assert await _served(settings) == second.digest

    with pytest.raises(StaticsError) as older:
        publish(first, open_store(store_url))
    assert older.value.code == "seq-too-old"


async def _served(settings: Settings) -> str:
    """The digest a freshly started pod answers with."""
    async with running(settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        reply: pb.UnderstandReply = await NluStub(channel).Understand(turn("stop"))  # type: ignore[no-untyped-call]
        return reply.versions.bundle


def test_release_that_cannot_be_pulled_leaves_the_last_good_one(tiny: Made, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store: Store = FolderStore(folder)
    settings = Settings(store=str(folder), channel="test", statics=tmp_path / "pod")
    publish(tiny.bundle, store)
    good = find_bundle(settings)
    shutil.rmtree(folder)
    assert find_bundle(settings).digest == good.digest
    with pytest.raises(StaticsError):
        find_bundle(settings.model_copy(update={"statics": tmp_path / "another-pod"}))
