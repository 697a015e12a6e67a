"""nlu.watched: a change is seen, and a broken one changes nothing but the log."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from nlu import metrics
from nlu.watched import LOOK_S, Watched


class Clock:
    """Seconds, as far as somebody turned it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def number(tmp_path: Path) -> Path:
    path = tmp_path / "number"
    path.write_text("1")
    return path


def watch(path: Path, clock: Clock) -> Watched[int]:
    return Watched("callers", (path,), lambda: int(path.read_text()), clock=clock)


def reloads(result: str) -> float:
    return (
        metrics.REGISTRY.get_sample_value("nlu_reloads_total", {"file": "callers", "result": result}) or 0.0
    )


def test_watched_sees_a_change_after_a_second_and_not_before(number: Path) -> None:
    clock = Clock()
    watched, before = watch(number, clock), reloads("ok")
    number.write_text("22")
    clock.now += LOOK_S * 0.9
    assert watched.now() == 1
    clock.now += LOOK_S * 0.1
    assert watched.now() == 22
    assert reloads("ok") == before + 1


def test_watched_sees_the_same_size_and_a_file_moved_in_its_place(number: Path, tmp_path: Path) -> None:
    """As a mounted secret changes: a link that points to another folder from one moment to the next."""
    clock = Clock()
    for name, text in (("old", "3"), ("new", "4")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "number").write_text(text)
        os.utime(tmp_path / name / "number", ns=(1, 1))
    link = tmp_path / "link"
    link.symlink_to("old")
    watched = watch(link / "number", clock)
    beside = tmp_path / "beside"
    beside.symlink_to("new")
    beside.replace(link)
    clock.now += LOOK_S
    assert watched.now() == 4


def test_watched_keeps_what_it_had_when_the_new_file_is_broken_or_gone(
    number: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    watched, before = watch(number, clock), reloads("refused")
    with caplog.at_level(logging.INFO, logger="nlu.watched"):
        number.write_text("no number")
        for _ in range(5):  # one change is told once
            clock.now += LOOK_S
            assert watched.now() == 1
        assert len(caplog.records) == 1 and "no number" in caplog.text
        number.unlink()
        for _ in range(5):
            clock.now += LOOK_S
            assert watched.now() == 1
        assert len(caplog.records) == 2
        assert reloads("refused") == before + 2
        number.write_text("5")
        clock.now += LOOK_S
        assert watched.now() == 5
    assert caplog.records[-1].levelno == logging.INFO


def test_watched_refuses_a_broken_file_at_the_start(number: Path) -> None:
    number.write_text("no number")
    with pytest.raises(ValueError, match="no number"):
        watch(number, Clock())
