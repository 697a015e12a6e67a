"""nlu.retrieval.told: two files, both or neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from nlu.retrieval.told import Told
from tests.nlu.retrieval.kitchen import lines


def test_told_keeps_both_files(tmp_path: Path) -> None:
    with Told(tmp_path / "report") as told:
        told.merged("tea", "Чай готов.", "чай готов", "the same words")
        told.blocked("x", "«Нет»", "banned")
        assert not (tmp_path / "report" / "merges.jsonl").exists()
        told.keep()
    assert lines(tmp_path / "report" / "merges.jsonl") == [
        {"id": "tea", "kept": "Чай готов.", "merged": "чай готов", "why": "the same words"}
    ]
    assert lines(tmp_path / "report" / "blocked.jsonl") == [{"id": "x", "text": "«Нет»", "why": "banned"}]
    assert "Чай" in (tmp_path / "report" / "merges.jsonl").read_text(encoding="utf-8")
    assert len(list((tmp_path / "report").iterdir())) == 2


def test_told_of_a_build_that_failed_leaves_the_files_before(tmp_path: Path) -> None:
    with Told(tmp_path) as told:
        told.keep()
    with pytest.raises(KeyboardInterrupt), Told(tmp_path) as told:
        told.blocked("x", "y", "z")
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "merges.jsonl": b"",
        "blocked.jsonl": b"",
    }
