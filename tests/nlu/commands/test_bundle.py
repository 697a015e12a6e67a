"""`nlu bundle`: keys, publication, channels and house-keeping as an operator meets them."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from typer.testing import CliRunner, Result

from nlu import canaries, parts
from nlu.__main__ import app
from nlu.errors import EngineRefused
from statics.bundle import Bundle, build
from statics.errors import (
    ChannelMismatch,
    Conflict,
    Expired,
    ManifestInvalid,
    NotFound,
    SeqTooOld,
    SignatureInvalid,
    SignatureMissing,
)
from statics.locate import open_store
from statics.publish import publish
from statics.signing import generate_key, key_id, load_private, save_private
from statics.store import FolderStore, audit_key, channel_key, release_key, signature_key
from tests.tiny import Made

Nlu = Callable[..., str]
Release = Callable[..., Bundle]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """A command in an empty folder and a clean environment but for a key and its keyring."""
    for name in [name for name in os.environ if name.startswith(("NLU_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, said: str = "") -> Result:
        return CliRunner().invoke(app, ["bundle", *map(str, arguments)], input=said)

    assert call("keygen", "key.pem", "trusted.json").exit_code == 0
    return call


@pytest.fixture
def nlu(run: Callable[..., Result]) -> Nlu:
    """A command that must go well, as what it prints."""

    def call(*arguments: object, said: str = "") -> str:
        result = run(*arguments, said=said)
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    return call


@pytest.fixture
def release(tiny: Made, tmp_path: Path, run: Callable[..., Result]) -> Release:
    """Build a signed release whose intent head says which it is, and publish it to `store`."""

    def made(seq: int, *, channel: str = "prod", signed: bool = True, **options: Any) -> Bundle:
        folder = Path(shutil.copytree(tiny.parts, tmp_path / f"parts-{channel}-{seq}"))
        head = json.loads((folder / "head.intent" / "head.json").read_bytes())
        (folder / "head.intent" / "head.json").write_text(json.dumps(head | {"made_by": f"{channel} {seq}"}))
        bundle = build(
            parts.collect(folder), tmp_path / f"{channel}-{seq}", channel=channel, seq=seq, created=at(-1), requires_service=">=0.1.0.dev0,<1",
            signing_key=load_private(tmp_path / "key.pem") if signed else None, **options,
        )  # fmt: skip
        publish(bundle, FolderStore(tmp_path / "store"))
        return bundle

    return made


@pytest.fixture(params=["folder", "s3"])
def place(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """A store's address: a folder, and a real S3-compatible server."""
    if request.param == "folder":
        return "store"
    for name, value in {
        "AWS_ENDPOINT_URL": request.getfixturevalue("s3_endpoint"),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"commands-{abs(hash(str(tmp_path))) % 10**12}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    client.close()
    return f"s3://{bucket}/chorus"


def at(days: int) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


def follows(store: str = "store", channel: str = "prod") -> int:
    """The seq that a channel points to."""
    return int(json.loads(open_store(store).read(channel_key(channel), 10**4)[0])["seq"])


def own_key(path: str = "key.pem") -> str:
    return key_id(load_private(Path(path)).public_key())


# Keys and signatures


def test_bundle_keygen_adds_to_a_keyring_and_never_overwrites(run: Callable[..., Result], nlu: Nlu) -> None:
    nlu("keygen", "second.pem", "trusted.json")
    assert sorted(json.loads(Path("trusted.json").read_text())) == sorted([own_key(), own_key("second.pem")])
    assert isinstance(run("keygen", "key.pem", "trusted.json").exception, FileExistsError)
    assert len(json.loads(Path("trusted.json").read_text())) == 2


def test_bundle_keygen_refuses_a_keyring_that_is_none(run: Callable[..., Result]) -> None:
    Path("broken.json").write_text('{"a": 1, "a": 2}')
    assert isinstance(run("keygen", "third.pem", "broken.json").exception, SignatureInvalid)
    assert not Path("third.pem").exists()


def test_bundle_sign_rotates_a_key(
    run: Callable[..., Result], nlu: Nlu, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = release(1)
    nlu("keygen", "new.pem", "new.json")
    monkeypatch.setenv("NLU_REQUIRE_SIGNATURE", "1")
    monkeypatch.setenv("NLU_KEYRING", "new.json")
    assert isinstance(run("verify", bundle.path, "--no-load").exception, SignatureInvalid)
    said = nlu("sign", bundle.path, "--key", "new.pem")
    assert own_key() in said and own_key("new.pem") in said
    for keyring in ("trusted.json", "new.json"):
        monkeypatch.setenv("NLU_KEYRING", keyring)
        nlu("verify", bundle.path, "--no-load")


def test_bundle_sign_a_published_release(
    run: Callable[..., Result], nlu: Nlu, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(1)
    nlu("pull", "store", "pod")
    nlu("keygen", "new.pem", "new.json")
    refused = run("sign", "store#prod", "--key", "new.pem").exception
    assert isinstance(refused, SignatureInvalid)  # nobody is trusted, so nobody vouches for what lies there
    monkeypatch.setenv("NLU_REQUIRE_SIGNATURE", "1")
    monkeypatch.setenv("NLU_KEYRING", "new.json")
    assert isinstance(run("pull", "store", "pod").exception, SignatureInvalid)
    monkeypatch.setenv("NLU_KEYRING", "trusted.json")
    nlu("sign", "store#prod", "--key", "new.pem")
    monkeypatch.setenv("NLU_KEYRING", "new.json")
    assert "seq 1" in nlu("pull", "store", "pod")


def test_bundle_pull_asks_for_as_many_signatures_as_it_is_told(
    run: Callable[..., Result], nlu: Nlu, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = release(1)
    nlu("keygen", "second.pem", "trusted.json")
    monkeypatch.setenv("NLU_KEYRING", "trusted.json")
    monkeypatch.setenv("NLU_SIGNATURES", "2")
    assert isinstance(run("pull", "store", "pod").exception, SignatureInvalid)
    monkeypatch.setenv("NLU_SIGNATURES", "1")
    nlu("sign", bundle.path, "--key", "second.pem")
    monkeypatch.setenv("NLU_SIGNATURES", "2")
    nlu("publish", bundle.path, "store", "--no-load")
    nlu("pull", "store", "pod")


def test_bundle_verify_says_who_signed_and_when_it_expires(
    nlu: Nlu, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = at(3)
    bundle, plain = release(1, expires=soon), release(2, signed=False)
    said = nlu("verify", bundle.path, "--no-load")
    assert f"signed by {own_key()}; expires: {soon:%Y-%m-%d}\n" in said
    assert "signed by nobody; expires: never" in nlu("verify", plain.path, "--no-load")
    monkeypatch.setenv("NLU_KEYRING", "trusted.json")
    save_private(generate_key()[0], Path("stranger.pem"))
    nlu("sign", bundle.path, "--key", "stranger.pem")
    said = nlu("verify", bundle.path, "--no-load")
    assert f"{own_key('stranger.pem')} (not trusted)" in said and f"{own_key()} (not trusted)" not in said


# Publishing


def test_bundle_publish_loads_first_what_pods_will_load(nlu: Nlu, tiny: Made) -> None:
    said = nlu("publish", tiny.bundle.path, "store")
    assert "loads; canaries and golden phrases of" in said
    assert follows(channel=tiny.bundle.manifest.channel) == tiny.bundle.manifest.seq


def test_bundle_publish_refuses_what_fails_its_own_canaries(
    run: Callable[..., Result], nlu: Nlu, tiny: Made, stranger: Made, tmp_path: Path
) -> None:
    """Every digest and fingerprint is right; only the vectors tell that the parts are of two vectorizers."""
    folder = Path(shutil.copytree(tiny.parts, tmp_path / "forged"))
    told, ours = (str(canaries.made_for(made.parts / "head.intent")) for made in (stranger, tiny))
    file = stranger.parts / "head.intent" / canaries.FILE
    (folder / "head.intent" / canaries.FILE).write_bytes(
        file.read_bytes().replace(told.encode(), ours.encode())
    )
    forged = build(
        parts.collect(folder),
        tmp_path / "bundle",
        channel="prod",
        seq=1,
        requires_service=">=0.1.0.dev0,<1",
    )
    assert isinstance(run("publish", forged.path, "store").exception, EngineRefused)
    assert not Path("store").exists()
    nlu("publish", forged.path, "store", "--no-load")  # the negative control: nothing else objects
    assert follows() == 1


def test_bundle_publish_refuses_the_unsigned_where_signatures_are_required(
    run: Callable[..., Result], nlu: Nlu, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = release(1, signed=False)
    monkeypatch.setenv("NLU_KEYRING", "trusted.json")
    monkeypatch.setenv("NLU_REQUIRE_SIGNATURE", "1")
    assert isinstance(run("publish", plain.path, "other", "--no-load").exception, SignatureMissing)
    assert not Path("other").exists()
    nlu("sign", plain.path, "--key", "key.pem")
    nlu("publish", plain.path, "other", "--no-load")


def test_bundle_publish_refuses_the_expired(run: Callable[..., Result], tiny: Made, tmp_path: Path) -> None:
    old = build(
        parts.collect(tiny.parts), tmp_path / "old", created=at(-9), expires=at(-1), requires_service=">=0.1.0.dev0,<1"
    )  # fmt: skip
    assert isinstance(run("publish", old.path, "store", "--no-load").exception, Expired)


def test_bundle_build_gives_a_release_its_days(nlu: Nlu, tiny: Made) -> None:
    nlu("build", tiny.parts, "--out", "one", "--expires-days", 30)
    manifest = json.loads(Path("one/manifest.json").read_bytes())
    lives = datetime.fromisoformat(manifest["expires"]) - datetime.fromisoformat(manifest["created"])
    assert lives == timedelta(days=30)


# Channels


def test_bundle_list_tells_the_history(nlu: Nlu, release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [release(seq, expires=at(90)) for seq in (1, 2, 4)]
    monkeypatch.setenv("NLU_KEYRING", "trusted.json")
    nlu("rollback", "store", "--to", 2, "--key", "key.pem", "--note", "[red]p99 вырос[/red]", "--yes")
    found = json.loads(nlu("list", "store", "--json"))
    assert [(each["seq"], each["current"]) for each in found["releases"]] == [
        (5, True), (4, False), (2, False), (1, False),
    ]  # fmt: skip
    assert found["gaps"] == [{"first": 3, "last": 3, "why": "no entry in the history"}]
    newest, *_, oldest = found["releases"]
    assert (newest["restores"], newest["note"]) == (made[1].digest, "[red]p99 вырос[/red]")
    assert newest["signed_by"] == [{"key": own_key(), "vouches": True}]
    assert (oldest["digest"], oldest["bytes"]) == (made[0].digest, made[0].manifest.size)
    lines = nlu("list", "store").splitlines()
    assert lines[1].startswith("->  5 ") and not lines[2].startswith("->")
    assert lines[1].rstrip().endswith(f"  {own_key()[:8]}")
    assert lines[-2] == f"seq 5 restores {made[1].digest[:12]}: [red]p99 вырос[/red]"
    assert lines[-1] == "seq 3: no entry in the history"
    assert len(nlu("list", "store", "--limit", 1).splitlines()) == 3


def test_bundle_list_tells_of_signatures_that_cannot_be_read(nlu: Nlu, release: Release) -> None:
    """One broken object must not hide a history from who looks for the way back."""
    first = release(1)
    release(2)
    Path("store", signature_key(first.digest)).write_bytes(b"{")
    assert "(unreadable!)" in nlu("list", "store")
    second, older = json.loads(nlu("list", "store", "--json"))["releases"]
    assert second["signed_by"] == [{"key": own_key(), "vouches": None}]
    assert older["signed_by"] is None


def test_bundle_rollback_shows_asks_and_makes_a_release(
    place: str, run: Callable[..., Result], nlu: Nlu, release: Release
) -> None:
    for seq in (1, 2):
        publish(release(seq), open_store(place))
        assert f"seq {seq}" in nlu("pull", place, "pod")
    command = ("rollback", place, "--to", 1, "--key", "key.pem", "--note", "p99 вырос")
    for answer in ("n\n", ""):
        asked = run(*command, said=answer)
        assert asked.exit_code == 1 and follows(place) == 2
    assert "channel prod points to seq 2" in asked.output
    assert "new: seq 3, with the components of seq 1" in asked.output
    assert "head.intent" in asked.output and "head.mood" not in asked.output
    assert "channel prod now points to seq 3" in nlu(*command, said="y\n")
    assert follows(place) == 3
    line = json.loads(open_store(place).read(audit_key("prod", 3), 10**4)[0])
    assert (line["what"], line["why"]) == ("rollback", "p99 вырос") and "@" in line["who"]
    assert "seq 3" in nlu("pull", place, "pod")  # pods that have had seq 2 follow
    store = open_store(place)
    store.put(channel_key("prod"), store.read(release_key("prod", 1), 10**4)[0])
    back = run("pull", place, "pod").exception  # and this is why it takes a new release
    assert isinstance(back, SeqTooOld)


def test_bundle_rollback_refuses_the_expired_and_the_unsigned_unless_told_so(
    run: Callable[..., Result], nlu: Nlu, release: Release
) -> None:
    release(1, expires=datetime.now(UTC) - timedelta(minutes=1))
    release(2, signed=False)
    release(3)
    options = ("--key", "key.pem", "--note", "back", "--yes")
    for to, refused, words, wrong in (
        (1, Expired, "--even-expired", "--even-unsigned"),
        (2, SignatureMissing, "--even-unsigned", "--even-expired"),
    ):
        before = follows()
        assert isinstance(run("rollback", "store", "--to", to, *options).exception, refused)
        assert isinstance(run("rollback", "store", "--to", to, *options, wrong).exception, refused)
        assert follows() == before
        nlu("rollback", "store", "--to", to, *options, words)
        assert follows() == before + 1
    nlu("pull", "store", "pod")


def test_bundle_rollback_refuses_a_key_that_pods_do_not_trust(
    run: Callable[..., Result], release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(1)
    release(2)
    save_private(generate_key()[0], Path("stranger.pem"))
    monkeypatch.setenv("NLU_KEYRING", "trusted.json")
    refused = run("rollback", "store", "--to", 1, "--key", "stranger.pem", "--note", "x", "--yes")
    assert isinstance(refused.exception, SignatureInvalid) and follows() == 2


def test_bundle_promote_asks_for_as_many_signatures_of_the_older_release_as_pods(
    run: Callable[..., Result], nlu: Nlu, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one stolen key anybody makes a release that pods refuse; nobody's two keys may then vouch for it."""
    release(1, channel="canary")
    nlu("keygen", "second.pem", "trusted.json")
    monkeypatch.setenv("NLU_KEYRING", "trusted.json")
    monkeypatch.setenv("NLU_SIGNATURES", "2")
    promote = (
        "promote", "store", "--from", "canary", "--to", "prod", "--key", "key.pem", "--key", "second.pem", "--yes",
    )  # fmt: skip
    assert isinstance(run(*promote).exception, SignatureInvalid)
    nlu(*promote, "--even-unsigned")
    nlu("sign", "store#canary", "--key", "second.pem")
    nlu(*promote)
    assert follows() == 2


@pytest.mark.parametrize("days", ["36501", "9999999999999"])
def test_bundle_days_end_before_the_calendar_does(run: Callable[..., Result], days: str) -> None:
    keyed = ("--key", "key.pem", "--note", "x", "--expires-days", days)
    for arguments in (
        ("build", "parts", "--out", "bundle", "--expires-days", days),
        ("rollback", "store", "--to", 1, *keyed),
        ("promote", "store", "--from", "a", "--to", "b", *keyed),
        ("gc", "store", "--days", days),
    ):
        told = run(*arguments)
        assert told.exit_code == 2 and "36500" in told.output


def test_bundle_rollback_that_loses_a_race_says_what_to_do(
    run: Callable[..., Result], release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody publishes while the question stands."""
    release(1)
    release(2)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: release(3))
    lost = run("rollback", "store", "--to", 1, "--key", "key.pem", "--note", "back").exception
    assert isinstance(lost, Conflict) and "seq 4" in lost.remedy and follows() == 3


def test_bundle_promote_takes_a_release_to_another_channel(
    run: Callable[..., Result], nlu: Nlu, release: Release
) -> None:
    tried = release(7, channel="canary")
    blobs = sorted(path.name for path in Path("store/blobs/sha256").iterdir())
    command = ("promote", "store", "--from", "canary", "--to", "prod", "--key", "key.pem")
    assert run(*command, said="n\n").exit_code == 1 and not Path("store/channels/prod.json").exists()
    shown = nlu(*command, "--note", "held for a day", said="y\n")
    assert "channel prod points to nothing" in shown and "new: seq 1" in shown
    assert sorted(path.name for path in Path("store/blobs/sha256").iterdir()) == blobs
    only = json.loads(nlu("list", "store", "--json"))["releases"]
    assert [(each["seq"], each["note"]) for each in only] == [(1, "held for a day")]
    assert json.loads(nlu("diff", "store#canary", "store#prod", "--json"))["changes"]
    nlu("pull", "store", "pod")
    assert follows(channel="canary") == 7 and tried.manifest.seq == 7


def test_bundle_diff_compares_releases_and_folders(
    run: Callable[..., Result], nlu: Nlu, release: Release
) -> None:
    first, second = release(1), release(2)
    expected = {"head.intent": "changed"}
    for old, new in (
        (first.path, second.path),
        ("store#prod@1", "store#prod@2"),
        ("store#prod@1", "store#prod"),
        (f"store#{first.digest}", second.path),
        (f"store#prod@{first.digest}", f"store#{second.digest}"),
    ):
        changes = json.loads(nlu("diff", old, new, "--json"))["changes"]
        assert {each["part"]: each["what"] for each in changes if each["what"] != "same"} == expected
    assert isinstance(run("diff", "store#prod@9", "store#prod").exception, NotFound)
    other = f"store#canary@{first.digest}"
    assert isinstance(run("diff", other, "store#prod").exception, ChannelMismatch)


# House-keeping


def test_bundle_pin_holds_a_machine_until_unpin(
    run: Callable[..., Result], nlu: Nlu, release: Release
) -> None:
    first = release(1)
    nlu("pull", "store", "pod")
    nlu("pin", "pod", first.digest)
    release(2)
    assert f"bundle {first.digest}" in nlu("pull", "store", "pod")
    assert "no longer pinned" in nlu("unpin", "pod")
    assert "seq 2" in nlu("pull", "store", "pod")
    assert "was not pinned" in nlu("unpin", "pod")
    Path("pod/pin.json").write_text("{")
    assert isinstance(run("pull", "store", "pod").exception, ManifestInvalid)
    assert "no longer pinned" in nlu("unpin", "pod")
    assert "seq 2" in nlu("pull", "store", "pod")
    assert run("pin", "pod", "latest").exception is not None


def test_bundle_gc_of_a_store_says_what_it_deletes(place: str, nlu: Nlu, release: Release) -> None:
    for seq in (1, 2):
        publish(release(seq), open_store(place))
    assert "deleted 0 objects" in nlu("gc", place, "--keep", 1)  # all of it is young
    assert len(list(open_store(place).keys("manifests/"))) == 4


def test_bundle_gc_of_a_store_takes_what_is_old(nlu: Nlu, release: Release) -> None:
    first, second = release(1), release(2)
    for path in Path("store").rglob("*"):
        os.utime(path, (time.time() - 8 * 86400,) * 2)
    before = sorted(Path("store").rglob("*"))
    shown = nlu("gc", "store", "--keep", 1, "--dry-run")
    assert "would delete 3 objects" in shown and f"manifests/{first.digest}.json" in shown
    assert sorted(Path("store").rglob("*")) == before
    assert "would delete 0 objects" in nlu("gc", "store", "--keep", 1, "--days", 9, "--dry-run")
    assert "would delete 0 objects" in nlu("gc", "store", "--dry-run")
    told = nlu("gc", "store", "--keep", 1)
    assert "deleted 3 objects" in told and f"manifests/{first.digest}.sig" in told
    assert f"bundle {second.digest}" in nlu("pull", "store", "pod")


def test_bundle_gc_of_a_machine_says_what_it_deletes(nlu: Nlu, release: Release) -> None:
    made = []
    for seq in (1, 2, 3):
        made.append(release(seq))
        nlu("pull", "store", "pod")
    assert f"would delete bundle {made[0].digest}" in nlu("gc", "pod", "--dry-run")
    assert Path("pod/bundles", made[0].digest).exists()
    assert f"deleted bundle {made[0].digest}" in nlu("gc", "pod")
    assert not Path("pod/bundles", made[0].digest).exists()
    assert f"bundle {made[2].digest}" in nlu("pull", "store", "pod")


def test_bundle_gc_refuses_a_folder_that_is_neither(run: Callable[..., Result]) -> None:
    Path("empty").mkdir()
    refused = run("gc", "empty").exception
    assert isinstance(refused, ValueError) and "neither channels/ nor bundles/" in str(refused)
