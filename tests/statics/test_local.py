"""statics.local: what a machine keeps, what it is held to, and what it lets go."""

import fcntl
import json
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from statics import local
from statics.bundle import Bundle
from statics.errors import FileMissing, ManifestInvalid
from statics.local import Collected, collect, pin, pinned, unpin
from statics.publish import publish
from statics.pull import Fetched, current, fetch, follow
from statics.store import FolderStore
from statics.verify import Trust, verify

TRUST = Trust("1.2.3")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def pulled(make_bundle: Callable[..., Bundle], store: FolderStore, root: Path) -> Callable[..., Fetched]:
    """Publish and pull release `seq`, the head of which is its own; releases come an hour apart."""

    def make(seq: int, **options: object) -> Fetched:
        publish(make_bundle(seq=seq, files={"head.intent": {"w": b"%d" % seq * 1000}}, **options), store)
        fetched = fetch(store, root, trust=TRUST, channel="dev")
        follow(root, fetched)
        os.utime(fetched.bundle.path, (seq * 3600, seq * 3600))
        return fetched

    return make


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def components(*bundles: Bundle) -> set[str]:
    return {component.digest for bundle in bundles for component in bundle.manifest.components}


def events(root: Path) -> list[tuple[str, int, str, str]]:
    lines = [json.loads(line) for line in (root / "audit.jsonl").read_text().splitlines()]
    return [(line["event"], line["seq"], line["digest"], line["reason"]) for line in lines]


@contextmanager
def lock_of_another(path: Path, kind: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


# Pins


def test_local_pin_lasts_until_it_is_taken_out(root: Path) -> None:
    assert pinned(root) == ""
    pin(root, "a" * 64)
    pin(root, "b" * 64)
    assert pinned(root) == "b" * 64
    assert unpin(root)
    assert not unpin(root)
    assert pinned(root) == ""


def test_local_unpin_takes_out_a_pin_that_cannot_be_read(root: Path) -> None:
    pin(root, "a" * 64)
    (root / "pin.json").write_bytes(b"{")
    with pytest.raises(ManifestInvalid, match="remedy: nlu bundle unpin"):
        pinned(root)
    assert unpin(root)
    assert pinned(root) == ""


@pytest.mark.parametrize("digest", ["", "a" * 63, "A" * 64, "../../etc/passwd", "newest"])
def test_local_pin_is_the_digest_of_a_bundle(root: Path, digest: str) -> None:
    with pytest.raises(ValueError, match="expected the digest of a bundle"):
        pin(root, digest)
    assert not root.exists()


def test_local_pin_that_cannot_be_read_is_no_missing_pin(root: Path) -> None:
    pin(root, "a" * 64)
    (root / "pin.json").write_text("{}")
    with pytest.raises(ManifestInvalid, match="pin.json"):
        pinned(root)


# What happened


def test_local_audit_tells_the_story_of_a_root(
    pulled: Callable[..., Fetched], make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    first = pulled(1).bundle
    pulled(1)
    (first.folder(first.component("head", "intent")) / "w").write_bytes(b"harmed")
    pulled(1)
    second = pulled(2).bundle
    pin(root, first.digest)
    follow(root, fetch(store, root, trust=TRUST, channel="dev"))
    unpin(root)
    path = store.root / "channels" / "dev.json"
    path.write_text(path.read_text().replace('"seq": 2', '"seq": 3'))
    for _ in range(3):  # a pod that asks every half minute says it once
        with pytest.raises(ManifestInvalid):
            fetch(store, root, trust=TRUST, channel="dev")
    assert events(root) == [
        ("follow", 1, first.digest, ""),
        ("quarantine", 0, first.component("head", "intent").digest, ""),
        ("follow", 2, second.digest, ""),
        ("pin", 0, first.digest, ""),
        ("follow", 1, first.digest, "pinned"),
        ("unpin", 0, "", ""),
        ("refuse", 3, second.digest, "manifest-invalid"),
    ]


# What goes


def test_local_collect_keeps_what_may_be_needed(
    pulled: Callable[..., Fetched], root: Path, store: FolderStore
) -> None:
    bundles = {seq: pulled(seq).bundle for seq in range(1, 8)}
    pin(root, bundles[2].digest)
    before = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    collected = collect(root, 2, also=[bundles[4].digest])
    kept = [bundles[seq] for seq in (2, 4, 6, 7)]
    gone = [bundles[seq] for seq in (1, 3, 5)]
    assert names(root / "bundles") == {bundle.digest for bundle in kept}
    assert names(root / "components") == components(*kept)
    assert set(collected.bundles) == {bundle.digest for bundle in gone}
    assert set(collected.components) == components(*gone) - components(*kept)
    assert (
        before - sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        == collected.bytes
        > 3000
    )
    for bundle in kept:
        verify(bundle.path, service="1.2.3")
    assert collect(root, 2, also=[bundles[4].digest]) == Collected()


def test_local_collect_never_takes_the_current_one(pulled: Callable[..., Fetched], root: Path) -> None:
    first, second = pulled(1), pulled(2)
    os.utime(first.bundle.path, (9e9, 9e9))  # the older release came later
    collect(root, 1)
    assert names(root / "bundles") == {first.bundle.digest, second.bundle.digest}
    collect(root, 0)
    assert names(root / "bundles") == {second.bundle.digest}
    assert current(root, trust=TRUST) == second.bundle


def test_local_collect_can_only_say_what_it_would_do(pulled: Callable[..., Fetched], root: Path) -> None:
    for seq in range(1, 4):
        pulled(seq)
    before = sorted(root.rglob("*"))
    would = collect(root, 1, dry_run=True)
    assert sorted(root.rglob("*")) == before
    assert collect(root, 1) == would != Collected()


def test_local_collect_does_nothing_while_a_pull_lives(pulled: Callable[..., Fetched], root: Path) -> None:
    for seq in range(1, 4):
        pulled(seq)
    with lock_of_another(root / "blobs", fcntl.LOCK_SH):
        assert collect(root, 1) == Collected()
        assert len(names(root / "bundles")) == 3
    assert len(collect(root, 1).bundles) == 2


def test_local_pull_waits_for_a_collection(
    pulled: Callable[..., Fetched], make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    pulled(1)
    publish(make_bundle(seq=2, files={"head.intent": {"w": b"new"}}), store)
    ended = threading.Event()

    def another() -> None:
        fetch(store, root, trust=TRUST, channel="dev")
        ended.set()

    with lock_of_another(root / "blobs", fcntl.LOCK_EX):
        thread = threading.Thread(target=another)
        thread.start()
        assert not ended.wait(0.2)
    thread.join(10)
    assert ended.is_set()


def test_local_collect_leaves_what_a_process_maps_to_it(pulled: Callable[..., Fetched], root: Path) -> None:
    bundle = pulled(1).bundle
    for seq in (2, 3):
        pulled(seq)
    with open(bundle.folder(bundle.component("head", "intent")) / "w", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert bundle.digest in collect(root, 1).bundles
    assert not bundle.path.exists()
    assert mapped[:] == b"1" * 1000
    mapped.close()


def test_local_collect_takes_no_components_of_a_bundle_it_cannot_read(
    pulled: Callable[..., Fetched], root: Path
) -> None:
    first, second = pulled(1).bundle, pulled(2).bundle
    (second.path / "manifest.json").write_bytes(b"{")
    assert collect(root, 1).components == ()
    assert names(root / "components") == components(first, second)


def test_local_collect_takes_whole_bundles_of_older_versions_too(
    pulled: Callable[..., Fetched], make_bundle: Callable[..., Bundle], root: Path
) -> None:
    old = make_bundle()
    (root / "bundles").mkdir(parents=True)
    old.path.rename(root / "bundles" / old.digest)
    os.utime(root / "bundles" / old.digest, (0, 0))
    new = pulled(2).bundle
    assert collect(root, 1).bundles == (old.digest,)
    assert names(root / "bundles") == {new.digest}


def test_local_collect_empties_the_quarantine_of_what_is_gone(
    pulled: Callable[..., Fetched], root: Path
) -> None:
    first = pulled(1).bundle
    (first.folder(first.component("head", "intent")) / "w").write_bytes(b"harmed")
    pulled(1)
    assert names(root / "quarantine") == {first.component("head", "intent").digest}
    collect(root, 1)
    assert len(names(root / "quarantine")) == 1  # of a bundle that is kept: somebody may want to know
    pulled(2)
    collect(root, 1)
    assert names(root / "quarantine") == set()


def test_local_collect_ends_what_another_left_half_done(
    pulled: Callable[..., Fetched], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between any two of its steps: no bundle that is seen lacks a component."""
    for seq in range(1, 4):
        pulled(seq)
    rename, left = os.rename, 2

    def stop(*args: object) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        rename(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            collect(root, 1)
    for digest in names(root / "bundles"):
        verify(root / "bundles" / digest, service="1.2.3")
    collect(root, 1)
    last = current(root, trust=TRUST)
    assert last is not None
    assert names(root / "components") == components(last)
    assert names(root / "staging") == set()


def test_local_follows_only_what_is_still_here(
    pulled: Callable[..., Fetched], make_bundle: Callable[..., Bundle], store: FolderStore, root: Path
) -> None:
    pulled(1)
    publish(make_bundle(seq=2, files={"head.intent": {"w": b"new"}}), store)
    fetched = fetch(store, root, trust=TRUST, channel="dev")
    os.utime(fetched.bundle.path, (0, 0))
    collect(root, 1)  # by another pod, which knows nothing of this one
    with pytest.raises(FileMissing, match="removed since it was pulled"):
        follow(root, fetched)
    assert json.loads((root / "state.json").read_bytes())["floors"] == {"dev": 1}


def test_local_waits_no_longer_than_it_says(
    pulled: Callable[..., Fetched], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled(1)
    monkeypatch.setattr(local, "LOCK_WAIT_S", 0.05)
    with (
        lock_of_another(root / ".lock", fcntl.LOCK_EX),
        pytest.raises(Exception, match="a lock that another process holds"),
    ):
        pin(root, "a" * 64)
    pin(root, "a" * 64)
