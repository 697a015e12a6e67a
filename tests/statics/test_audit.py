"""statics.audit: one line for each thing that happened."""

import json
import os
from datetime import datetime
from pathlib import Path

import pytest

from statics import audit
from statics.audit import note


def lines(root: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (root / "audit.jsonl").read_text().splitlines()]


def test_audit_says_what_when_and_which(tmp_path: Path) -> None:
    note(tmp_path / "root", "follow", digest="a" * 64, seq=7)
    note(tmp_path / "root", "refuse", digest="b" * 64, seq=8, reason="expired")
    first, second = lines(tmp_path / "root")
    assert datetime.fromisoformat(str(first.pop("time"))).tzinfo is not None
    assert first == {"event": "follow", "digest": "a" * 64, "seq": 7, "reason": ""}
    assert (second["event"], second["reason"]) == ("refuse", "expired")


def test_audit_does_not_repeat_itself(tmp_path: Path) -> None:
    for seq in (1, 1, 1, 2, 1, 1):
        note(tmp_path, "refuse", digest="a" * 64, seq=seq, reason="expired")
    assert [line["seq"] for line in lines(tmp_path)] == [1, 2, 1]


def test_audit_goes_on_after_a_line_that_was_cut_short(tmp_path: Path) -> None:
    note(tmp_path, "pin", digest="a" * 64)
    path = tmp_path / "audit.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event": "pi')
    note(tmp_path, "unpin", digest="")
    first, cut, last = path.read_text().splitlines()
    assert (json.loads(first)["event"], cut, json.loads(last)["event"]) == ("pin", '{"event": "pi', "unpin")


@pytest.mark.parametrize("tail", [b"\xff\xfe\n", b"[]\n", b"3\n", b"\n\n"])
def test_audit_is_not_put_off_by_what_others_wrote(tmp_path: Path, tail: bytes) -> None:
    (tmp_path / "audit.jsonl").write_bytes(tail)
    note(tmp_path, "pin", digest="a" * 64)
    assert json.loads((tmp_path / "audit.jsonl").read_bytes().splitlines()[-1])["event"] == "pin"


def test_audit_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "LONGEST", 1000)
    for seq in range(100):
        note(tmp_path, "refuse", digest="a" * 64, seq=seq)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) <= {"audit.jsonl", "audit.old.jsonl"}
    assert sum(sizes.values()) < 3000


def test_audit_is_no_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*args: object, **options: object) -> int:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        note(tmp_path, "pin", digest="a" * 64)
    assert list(tmp_path.iterdir()) == []
    note(tmp_path, "pin", digest="a" * 64)
    assert len(lines(tmp_path)) == 1
