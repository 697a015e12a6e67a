"""nlu.retrieval.dialogs: who answers whom, what is left out, and what is refused with its file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nlu.retrieval.dialogs import DialogsInvalid, Exchange, Skipped, read, split

TEA = ["Any tea left?", "Only  GREEN tea.", "Налей, пожалуйста", "Сейчас!"]


def line(dialog: str, texts: list[str]) -> str:
    turns = [{"speaker": "AB"[i % 2], "text": text, "mood": "calm"} for i, text in enumerate(texts)]
    return json.dumps({"id": dialog, "turns": turns, "topic": "kitchen"}, ensure_ascii=False)


def written(tmp_path: Path, *lines: str, name: str = "dialogs.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def exchanges(path: Path, context: int = 3, *, uncased: bool = True) -> list[Exchange]:
    return list(read([path], uncased=uncased, context=context))


def test_dialogs_every_turn_after_the_first_is_a_reply(tmp_path: Path) -> None:
    found = exchanges(written(tmp_path, line("tea", TEA)))
    assert found == [
        Exchange("tea", ("any tea left?",), "only green tea.", "Only  GREEN tea."),
        Exchange("tea", ("any tea left?", "only green tea."), "налей, пожалуйста", "Налей, пожалуйста"),
        Exchange("tea", ("any tea left?", "only green tea.", "налей, пожалуйста"), "сейчас!", "Сейчас!"),
    ]


def test_dialogs_context_is_cut_from_the_old_end(tmp_path: Path) -> None:
    found = exchanges(written(tmp_path, line("tea", TEA)), context=2)
    assert [exchange.context for exchange in found][-1] == ("only green tea.", "налей, пожалуйста")
    with pytest.raises(ValueError, match="context: found 0, expected at least 1"):
        exchanges(written(tmp_path, line("tea", TEA)), context=0)


def test_dialogs_case_stays_for_a_cased_vectorizer(tmp_path: Path) -> None:
    assert exchanges(written(tmp_path, line("tea", TEA)), uncased=False)[0].reply == "Only GREEN tea."


def test_dialogs_gzip_and_several_files_read_as_one(tmp_path: Path) -> None:
    plain = written(tmp_path, line("tea", TEA))
    packed = tmp_path / "more.jsonl.gz"
    packed.write_bytes(gzip.compress(f"\n{line('soup', ['Soup?', 'Yes'])}\n\n".encode()))
    found = list(read([plain, packed], uncased=True, context=1))
    assert [exchange.dialog for exchange in found] == ["tea", "tea", "tea", "soup"]


def test_dialogs_turns_that_say_nothing_are_skipped_and_told(tmp_path: Path) -> None:
    skipped: list[Skipped] = []
    path = written(
        tmp_path, line("quiet", ["Hello", "...", "Are you there?", "Yes", "Good", "word " * 200, "Bye"])
    )
    found = list(read([path], uncased=True, context=3, skip=skipped.append))
    # Nobody answers silence: "are you there?" is no reply to "hello", but its place in the context stays.
    assert [(each.context, each.reply) for each in found] == [
        (("hello", "are you there?"), "yes"),
        (("hello", "are you there?", "yes"), "good"),
    ]
    assert [(each.where, each.turn) for each in skipped] == [("dialogs.jsonl:1", 2), ("dialogs.jsonl:1", 6)]
    assert "at most 512" in skipped[1].why


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ('{"id": "x"', "found Expecting"),
        ("[1]", "found a list, expected an object with id and turns"),
        ('{"turns": []}', "id: found nothing, expected a name"),
        ('{"id": 7, "turns": []}', "id: found a number, expected a name"),
        ('{"id": "", "turns": []}', "id: found a string that is empty, expected a name"),
        ('{"id": "x"}', "turns: found nothing, expected a list of turns"),
        ('{"id": "x", "turns": []}', "turns: found a list that is empty, expected a list of turns"),
        ('{"id": "x", "turns": {"a": 1}}', "turns: found an object, expected a list of turns"),
        ('{"id": "x", "turns": ["hi"]}', "turns.1: found a string, expected an object with speaker and text"),
        ('{"id": "x", "turns": [{"text": "hi"}]}', "turns.1.speaker: found nothing, expected a string"),
        (
            '{"id": "x", "turns": [{"speaker": "A", "text": "a"}, {"speaker": "B", "text": 5}]}',
            "turns.2.text: found a number, expected a string",
        ),
        ('{"id": "x", "turns": [{"speaker": "A", "text": null}]}', "turns.1.text: found nothing"),
    ],
)
def test_dialogs_bad_lines_are_refused_by_file_and_line(tmp_path: Path, bad: str, complaint: str) -> None:
    assert exchanges(written(tmp_path, line("tea", TEA), "", line("soup", TEA)))  # the control
    with pytest.raises(DialogsInvalid) as refused:
        exchanges(written(tmp_path, line("tea", TEA), "", bad))
    message = str(refused.value)
    assert message.startswith(f"dialogs.jsonl:3: {complaint}")
    assert message.endswith("; mend or drop the line")


def test_dialogs_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(line(str(i), TEA) for i in range(99)).encode())
    for name, raw, complaint in (
        ("empty.jsonl", b"", "found no reply, expected dialogs of at least two turns"),
        ("alone.jsonl", line("x", ["Hi"]).encode(), "found no reply"),
        ("cp1251.jsonl", line("x", TEA).encode("cp1251"), "cp1251.jsonl:1: found the byte 0x"),
        ("cut.jsonl.gz", whole[:-20], "expected a whole file of dialogs; get it again"),
        ("not.jsonl.gz", line("x", TEA).encode(), "expected a whole file of dialogs; get it again"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DialogsInvalid) as refused:
            exchanges(tmp_path / name)
        assert complaint in str(refused.value)
    with pytest.raises(DialogsInvalid, match="found no such file, expected dialogs; check the path"):
        exchanges(tmp_path / "missing.jsonl")


def test_dialogs_split_is_the_same_everywhere_and_as_large_as_asked() -> None:
    names = [f"dialog {i}" for i in range(4000)]
    held = {name for name in names if split(name, 0.25)}
    assert held == {name for name in names if split(name, 0.25)}
    assert abs(len(held) / len(names) - 0.25) < 0.03
    assert held < {name for name in names if split(name, 0.5)}  # a larger share only adds
    assert [split("чай", 0.5), split("чай", 0.5, "another"), split("кофе", 0.5)] == [False, True, False]
    assert not any(split(name, 0.0) for name in names)
    assert all(split(name, 1.0) for name in names)


def test_dialogs_splits_of_different_salts_are_independent() -> None:
    names = [f"dialog {i}" for i in range(4000)]
    both = sum(split(name, 0.5, "one") and split(name, 0.5, "two") for name in names)
    assert abs(both / len(names) - 0.25) < 0.03


def test_dialogs_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="share: found 1.5, expected 0 to 1"):
        split("tea", 1.5)
