"""nlu.training.datasets: each format on a few rows written here, errors that say what to do, and the real sets where they lie."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlu.errors import InvalidInput
from nlu.normalizer import MAX_CODE_POINTS, normalize
from nlu.public_data import Labelled, Tagged
from nlu.training import datasets
from nlu.training.datasets import ALL, DEV, TEST, TRAIN, Form, Pair, Scored, identity, read

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"the public sets are not at {DATA}; nothing else needs them"
)


def write(path: Path, rows: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{row}\n" for row in rows)


def jsonl(*records: dict[str, Any]) -> list[str]:
    return [json.dumps(record, ensure_ascii=False) for record in records]


def dialog(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"id": "0", "turns": [{"speaker": who, "text": text, **more} for who, text in turns]}


# --- formats


def test_datasets_labelled_are_phrases_and_refused_texts_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "goemotions/train.tsv.gz", ["Thank  YOU!\tjoy,love", "...\tanger", "Ёлка\tjoy"])
    loaded = read("goemotions", TRAIN, tmp_path)
    assert loaded.examples == (Labelled("thank you!", ("joy", "love")), Labelled("ёлка", ("joy",)))
    assert loaded.skipped == 1
    assert datasets.labels_of(loaded.examples) == {"joy": 2, "love": 1}


def test_datasets_cased_keeps_case(tmp_path: Path) -> None:
    write(tmp_path / "banking77/test.tsv.gz", ["My Card\tcard", "Моя Карта\tcard"])
    phrases = [
        e.phrase for e in read("banking77", TEST, tmp_path, uncased=False).examples if isinstance(e, Labelled)
    ]
    assert phrases == ["My Card", "Моя Карта"]


@pytest.mark.parametrize(
    ("name", "labels"),
    [("clinc150", ["a"]), ("clinc150.full", ["a", datasets.OUT_OF_SCOPE])],
)
def test_datasets_out_of_scope_is_left_out_unless_asked_for(
    tmp_path: Path, name: str, labels: list[str]
) -> None:
    write(tmp_path / "clinc150/dev.tsv.gz", ["one\ta", "two\toos"])
    assert list(datasets.labels_of(read(name, DEV, tmp_path).examples)) == labels


def test_datasets_out_of_scope_has_one_name(tmp_path: Path) -> None:
    write(tmp_path / "hint3/curekart_test.tsv.gz", ["one\tNO_NODES_DETECTED"])
    assert list(datasets.labels_of(read("hint3.curekart.full", TEST, tmp_path).examples)) == ["oos"]


def test_datasets_intents_of_turns_that_tell_them(tmp_path: Path) -> None:
    tagged: dict[str, list[str]] = {"tokens": [], "tags": []}
    rows = jsonl(
        {"text": "Book a bus", "intent": "BuyBus", "acts": ["INFORM", "INFORM_INTENT"], **tagged},
        {"text": "Yes please", "intent": "BuyBus", "acts": ["AFFIRM"], **tagged},
        {"text": "Hello", "intent": "NONE", "acts": ["INFORM_INTENT"], **tagged},
    )
    write(tmp_path / "sgd/user_train.jsonl.gz", rows)
    assert read("sgd.intents", TRAIN, tmp_path).examples == (Labelled("book a bus", ("BuyBus",)),)


def test_datasets_acts_are_sets_of_turns(tmp_path: Path) -> None:
    record = dialog(("user", "Hi there"))
    record["turns"][0]["acts"] = ["REQUEST", "INFORM", "REQUEST"]
    record["turns"].append({"speaker": "system", "text": "Well"})
    write(tmp_path / "sgd/dialogs_train.jsonl.gz", jsonl(record))
    assert read("sgd.acts", TRAIN, tmp_path).examples == (Labelled("hi there", ("INFORM", "REQUEST")),)


def test_datasets_well_formedness_has_the_bar_of_its_paper(tmp_path: Path) -> None:
    write(tmp_path / "query_wellformedness/dev.tsv.gz", ["Who am I?\t0.8", "Who I?\t0.6"])
    loaded = read("query_wellformedness", DEV, tmp_path)
    assert list(datasets.labels_of(loaded.examples)) == ["well_formed", "ill_formed"]


def test_datasets_tagged_spans_are_of_the_phrase_that_serving_makes(tmp_path: Path) -> None:
    text = "Wake  me at ７ AM, in Kraków!"
    tokens = ["Wake", "me", "at", "７", "AM", ",", "in", "Kraków", "!"]
    tags = ["O", "O", "O", "B-time", "I-time", "O", "O", "B-city", "O"]
    write(tmp_path / "restaurant8k/train.jsonl.gz", jsonl({"text": text, "tokens": tokens, "tags": tags}))
    (example,) = read("restaurant8k", TRAIN, tmp_path).examples
    assert isinstance(example, Tagged)
    assert example.phrase == normalize(text).text == "wake me at 7 am, in kraków!"
    assert [(label, example.phrase[start:end]) for label, start, end in example.spans] == [
        ("time", "7 am"),
        ("city", "kraków"),
    ]


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        (["B-a", "B-a", "O"], [("a", "x"), ("a", "y")]),  # two, side by side
        (["I-a", "I-a", "O"], [("a", "x y")]),  # the B is missing
        (["B-a", "I-b", "O"], [("a", "x"), ("b", "y")]),  # the I of another
        (["B-", "O", "B-a"], [("a", "z")]),  # a label without a name
    ],
)
def test_datasets_tagged_takes_sloppy_tags(
    tmp_path: Path, tags: list[str], spans: list[tuple[str, str]]
) -> None:
    record = {"text": "lost", "tokens": ["x", "y", "z"], "tags": tags}  # the text does not hold the tokens
    write(tmp_path / "wnut17/dev.jsonl.gz", jsonl(record))
    (example,) = read("wnut17", DEV, tmp_path).examples
    assert isinstance(example, Tagged) and example.phrase == "x y z"
    assert [(label, example.phrase[start:end]) for label, start, end in example.spans] == spans


def test_datasets_replies_are_consecutive_turns_of_two_speakers(tmp_path: Path) -> None:
    turns = (("A", "One"), ("B", "Two"), ("B", "Three"), ("A", "Four"), ("B", "!?"), ("A", "Six"))
    write(tmp_path / "ru_movie_dialogs/dev.jsonl.gz", jsonl(dialog(*turns)))
    loaded = read("ru_movie_dialogs", DEV, tmp_path)
    assert [(e.anchor, e.positive, e.context) for e in loaded.examples if isinstance(e, Pair)] == [
        ("one", "two", ()),
        ("three", "four", ("one", "two")),
    ]
    assert loaded.skipped == 2  # to the turn that is no phrase, and from it


def test_datasets_replies_that_are_equal_are_one_group(tmp_path: Path) -> None:
    write(
        tmp_path / "sgd/dialogs_dev.jsonl.gz",
        jsonl(dialog(("u", "Hi"), ("s", "Yes."), ("u", "Why?"), ("s", "yes."))),
    )
    groups = [e.group for e in read("sgd.replies", DEV, tmp_path).examples if isinstance(e, Pair)]
    assert groups == [identity("yes."), identity("why?"), identity("yes.")]


def test_datasets_paraphrases_that_hang_together_are_one_group(tmp_path: Path) -> None:
    rows = ["A\tB\t1", "C\tD\t1", "B\tE\t2", "F\tD\t1", "G\tg\t1"]
    write(tmp_path / "tatoeba_paraphrases/en_train.tsv.gz", rows)
    examples = [e for e in read("tatoeba_paraphrases.en", TRAIN, tmp_path).examples if isinstance(e, Pair)]
    assert [(e.anchor, e.positive) for e in examples] == [("a", "b"), ("c", "d"), ("b", "e"), ("f", "d")]
    one, two, three, four = (e.group for e in examples)
    assert one == three != two == four
    reversed_rows = [e.group for e in datasets._grouped(examples[::-1]) if isinstance(e, Pair)]
    assert reversed_rows == [four, three, two, one]  # a group's number does not hang on the order


def test_datasets_translations_go_from_english_to_russian(tmp_path: Path) -> None:
    write(tmp_path / "tatoeba_enru/test.tsv.gz", ["I see.\tПонятно."])
    (example,) = read("tatoeba_enru", TEST, tmp_path).examples
    assert isinstance(example, Pair) and (example.anchor, example.positive) == ("i see.", "понятно.")


def test_datasets_facts_are_found_by_their_question(tmp_path: Path) -> None:
    write(tmp_path / "ru_premise_questions/dev.tsv.gz", ["Я все скажу\tкто скажет все?\tя"])
    (example,) = read("ru_premise_questions", DEV, tmp_path).examples
    assert isinstance(example, Pair) and (example.anchor, example.positive) == (
        "кто скажет все?",
        "я все скажу",
    )


def test_datasets_corrections_take_the_first_word(tmp_path: Path) -> None:
    write(tmp_path / "en_misspellings/misspellings.tsv.gz", ["teh\tthe,tech"])
    (example,) = read("en_misspellings", TRAIN, tmp_path).examples
    assert isinstance(example, Pair) and (example.anchor, example.positive) == ("teh", "the")


def test_datasets_similarity_ends_at_one(tmp_path: Path) -> None:
    write(tmp_path / "stsb/ru_test.tsv.gz", ["Да\tНет\t1.25", "Да\tДа\t5.0"])
    assert read("stsb.ru", TEST, tmp_path).examples == (Scored("да", "нет", 0.25), Scored("да", "да", 1.0))


def test_datasets_punctuation_and_case_lie_on_the_words_one_hears(tmp_path: Path) -> None:
    rows = ["Ну, Анна-Мария, как дела?\tq", "без знаков\ts", "НАТО — это... да!\ts", "Don’t; stop.\ts"]
    write(tmp_path / "ru_utterances/train.tsv.gz", rows)
    marks = read("ru_utterances.punctuation", TRAIN, tmp_path).examples
    cases = read("ru_utterances.case", TRAIN, tmp_path).examples
    assert [of_words(e) for e in marks] == [
        ("ну анна-мария как дела", [("COMMA", "ну"), ("COMMA", "анна-мария"), ("QUESTION", "дела")]),
        ("нато это да", [("PERIOD", "это"), ("EXCLAMATION", "да")]),
        ("don’t stop", [("COMMA", "don’t"), ("PERIOD", "stop")]),
    ]
    assert [of_words(e)[1] for e in cases] == [
        [("TITLE", "ну"), ("TITLE", "анна-мария")],
        [("UPPER", "нато")],
        [("TITLE", "don’t")],
    ]


def of_words(example: datasets.Example) -> tuple[str, list[tuple[str, str]]]:
    assert isinstance(example, Tagged)
    return example.phrase, [(label, example.phrase[start:end]) for label, start, end in example.spans]


def test_datasets_questions_do_not_give_themselves_away(tmp_path: Path) -> None:
    turns = [("A", "You like it?"), ("B", "I do."), ("A", "Good. Why?"), ("B", "no mark")]
    write(tmp_path / "self_dialogue/dev.jsonl.gz", jsonl(dialog(*turns)))
    assert read("self_dialogue.questions", DEV, tmp_path).examples == (
        Labelled("you like it", ("question",)),
        Labelled("i do", ("statement",)),
    )


def test_datasets_line_ends_inside_a_text_end_no_row(tmp_path: Path) -> None:
    write(tmp_path / "banking77/train.tsv.gz", ["one\u2028two\tlabel", "three\tlabel\r"])
    loaded = read("banking77", TRAIN, tmp_path)
    assert loaded.examples == (Labelled("one two", ("label",)), Labelled("three", ("label",)))


# --- errors


def test_datasets_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"found no folder .*snips.*expected one holding train.*data\.root"
    ):
        read("snips.slots", TRAIN, tmp_path)


def test_datasets_missing_file_names_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "snips/other.jsonl.gz", [])
    with pytest.raises(FileNotFoundError, match=r"found other\.jsonl\.gz in .*expected train\.jsonl\.gz"):
        read("snips.slots", TRAIN, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "row", "said"),
    [
        ("banking77", "banking77/train.tsv.gz", "no tab", "row 2: found 1 column"),
        ("snips.slots", "snips/train.jsonl.gz", "{", "row 2: found no JSON"),
        ("snips.slots", "snips/train.jsonl.gz", '{"tokens": []}', "row 2: found no tags"),
        ("snips.slots", "snips/train.jsonl.gz", '{"tokens": ["a"], "tags": []}', "1 tokens and 0 tags"),
        ("stsb.en", "stsb/en_train.tsv.gz", "a\tb\t6", "found a score of 6, expected 0 to 5"),
    ],
)
def test_datasets_broken_row_is_named(tmp_path: Path, name: str, file: str, row: str, said: str) -> None:
    good = {"banking77": "a\tb", "stsb.en": "a\tb\t1"}.get(
        name, '{"tokens": ["a"], "tags": ["O"], "text": "a"}'
    )
    write(tmp_path / file, [good, row])
    with pytest.raises(ValueError, match=said):
        read(name, TRAIN, tmp_path)


def test_datasets_unknown_name_brings_near_ones() -> None:
    with pytest.raises(ValueError, match=r"sgd\.intents, sgd\.acts"):
        datasets.find("sgd")
    with pytest.raises(ValueError, match="banking77"):
        datasets.find("banking")


def test_datasets_unknown_split_brings_the_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of train, test"):
        read("banking77", DEV, tmp_path)


# --- laziness, digests, users' own files


def test_datasets_reading_one_split_opens_no_other(tmp_path: Path) -> None:
    write(
        tmp_path / "snips/test.jsonl.gz", jsonl({"text": "a", "tokens": ["a"], "tags": ["O"], "intent": "A"})
    )
    (tmp_path / "snips/train.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "sgd").mkdir()
    assert len(read("snips.intents", TEST, tmp_path).examples) == 1
    with pytest.raises(gzip.BadGzipFile):  # negative control: it would have noticed
        read("snips.intents", TRAIN, tmp_path)


def test_datasets_digests_are_of_the_files_used(tmp_path: Path) -> None:
    write(tmp_path / "wnut17/dev.jsonl.gz", jsonl({"text": "a", "tokens": ["a"], "tags": ["O"]}))
    path = tmp_path / "wnut17/dev.jsonl.gz"
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    (file,) = read("wnut17", DEV, tmp_path).files
    assert file == ("wnut17/dev.jsonl.gz", expected, path.stat().st_size, 1, 0)
    assert datasets.digests("wnut17", DEV, tmp_path) == {"wnut17/dev.jsonl.gz": expected}


def test_datasets_all_is_every_file_once(tmp_path: Path) -> None:
    for split in (TRAIN, TEST):
        write(tmp_path / f"banking77/{split}.tsv.gz", [f"{split}\tlabel"])
    phrases = [e.phrase for e in read("banking77", ALL, tmp_path).examples if isinstance(e, Labelled)]
    assert phrases == [TRAIN, TEST]


@pytest.mark.parametrize(
    ("form", "file", "row", "kind"),
    [
        (Form.LABELLED, "train.tsv", "Hi\tgreet", Labelled),
        (Form.LABELLED, "train.jsonl", '{"text": "Hi", "intent": "greet"}', Labelled),
        (Form.PAIRS, "train.tsv", "Hi\tHello", Pair),
        (Form.PAIRS, "train.jsonl", jsonl(dialog(("A", "Hi"), ("B", "Hello")))[0], Pair),
        (Form.TAGGED, "train.jsonl", '{"tokens": ["Hi"], "tags": ["B-x"]}', Tagged),
        (Form.SCORED, "train.tsv", "Hi\tHello\t4", Scored),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_datasets_own_files(
    tmp_path: Path, form: Form, file: str, row: str, kind: type, zipped: bool
) -> None:
    if zipped:
        write(tmp_path / f"{file}.gz", [row])
    else:
        (tmp_path / file).write_text(f"{row}\n", encoding="utf-8")
    path = next(tmp_path.iterdir())
    for name in (f"file:{tmp_path}", f"file:{path}"):  # the folder, or the one file
        loaded = read(datasets.own(name, form), TRAIN, Path("/nowhere"))
        assert [type(example) for example in loaded.examples] == [kind]
        assert loaded.files[0].name == str(path)


def test_datasets_own_folder_has_the_splits_it_has(tmp_path: Path) -> None:
    for split in ("train", "test", "notes"):
        (tmp_path / f"{split}.tsv").write_text("a\tb\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("hello", encoding="utf-8")
    assert set(datasets.own(f"file:{tmp_path}", Form.LABELLED).splits) == {"train", "test", "notes"}


def test_datasets_own_missing_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such path"):
        datasets.own(f"file:{tmp_path}/none", Form.PAIRS)
    with pytest.raises(FileNotFoundError, match="no data in it"):
        datasets.own(f"file:{tmp_path}", Form.PAIRS)


# --- choosing


MANY = tuple(Labelled(f"phrase {i}", ("big" if i % 4 else "small",)) for i in range(200))


def test_datasets_select_caps_crowded_labels_and_keeps_order() -> None:
    kept = datasets.select(MANY, cap_per_label=30)
    assert datasets.labels_of(kept) == {"big": 30, "small": 30}
    places = [MANY.index(example) for example in kept if isinstance(example, Labelled)]
    assert places == sorted(places)


def test_datasets_select_limits_by_content_not_place() -> None:
    kept = datasets.select(MANY, limit=50)
    assert len(kept) == 50
    assert set(datasets.select(MANY[::-1], limit=50)) == set(kept)
    assert set(datasets.select(MANY, limit=50, seed=1)) != set(kept)


def test_datasets_select_renames_and_drops() -> None:
    renamed = datasets.select((Labelled("a", ("x", "y")), Labelled("b", ("x",))), rename={"x": "", "y": "z"})
    assert renamed == (Labelled("a", ("z",)),)
    spans = (("person", 0, 1), ("product", 2, 3))
    tagged = datasets.select((Tagged("a b", spans),), rename={"person": "PER", "product": ""})
    assert tagged == (Tagged("a b", (("PER", 0, 1),)),)


def test_datasets_select_wants_both_sides_long_enough() -> None:
    pairs = (Pair("a long one", "yes", 1), Pair("a long one", "another one", 2, ("hi",)))
    assert datasets.select(pairs, min_chars=8) == pairs[1:]


def test_datasets_excluding_drops_what_is_tested_on() -> None:
    pairs = (Pair("a", "b", 1), Pair("c", "d", 2, ("b",)), Pair("e", "f", 3))
    assert datasets.excluding(pairs, {"b"}) == pairs[2:]


def test_datasets_identity_is_the_same_everywhere() -> None:
    assert identity("да") == 933082318812378996
    assert 0 <= identity("") < 2**63


# --- the shortcut for plain Cyrillic


plain = st.text(st.sampled_from("аяАЯёЁйЙzZ09 _-.,?!'«»„“”’–—"), max_size=30)
near_plain = st.text(st.sampled_from("аЯё \t\u00a0\u0301\u0306…№й\u200dıß"), max_size=12)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.one_of(plain, near_plain, st.text(max_size=12)), st.booleans())
def test_datasets_phrase_of_is_the_normalisers(text: str, uncased: bool) -> None:
    try:
        expected: str | None = normalize(text, uncased=uncased).text
    except InvalidInput:
        expected = None
    assert datasets.phrase_of(text, uncased=uncased) == expected


def test_datasets_phrase_of_keeps_the_caps() -> None:
    assert datasets.phrase_of("я" * MAX_CODE_POINTS) == "я" * MAX_CODE_POINTS
    assert datasets.phrase_of("я" * (MAX_CODE_POINTS + 1)) is None


# --- the table


def test_datasets_table_covers_every_folder() -> None:
    assert len(datasets.FOLDERS) == 52
    assert {source.folder for source in datasets.SOURCES.values()} == set(datasets.FOLDERS)
    assert sum(folder.may_ship for folder in datasets.FOLDERS.values()) == 33


def test_datasets_no_file_is_in_two_splits() -> None:
    for source in datasets.SOURCES.values():
        names = [name for files in source.splits.values() for name in files]
        assert len(names) == len(set(names)), source.name


@needs_data
def test_datasets_table_agrees_with_the_readme() -> None:
    stated: dict[str, tuple[str, bool]] = {}
    for line in (DATA / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 7 and cells[0].startswith("["):
            stated[cells[0][1 : cells[0].index("]")]] = (cells[5], cells[6] == "yes")
    assert stated == {name: (about.licence, about.may_ship) for name, about in datasets.FOLDERS.items()}


@needs_data
@pytest.mark.parametrize("source", datasets.SOURCES.values(), ids=datasets.SOURCES)
def test_datasets_files_of_the_table_are_there(source: datasets.Source) -> None:
    assert datasets.paths(source, ALL, DATA)


@needs_data
@pytest.mark.parametrize(
    ("name", "split", "examples", "skipped"),
    [
        ("clinc150", TEST, 4500, 0),
        ("clinc150.full", TEST, 5500, 0),
        ("banking77", TEST, 3080, 0),
        ("snips.slots", TEST, 700, 0),
        ("restaurant8k", TEST, 3731, 0),
        ("goemotions", TEST, 5426, 1),
        ("sgd.acts", DEV, 9100, 0),
        ("sgd.slots", DEV, 4550, 0),
        ("wnut17", TEST, 1287, 0),
        ("tatoeba_enru", DEV, 1977, 0),
        ("stsb.ru", TEST, 1379, 0),
        ("ru_utterances.punctuation", DEV, 5151, 0),
        ("home_assistant_intents.ru", TEST, 447, 0),
        ("date_number_expressions.datetime", TRAIN, 965, 1),
    ],
)
def test_datasets_counts_of_real_sets(name: str, split: str, examples: int, skipped: int) -> None:
    loaded = read(name, split, DATA)
    assert (len(loaded.examples), loaded.skipped) == (examples, skipped)
    for example in loaded.examples[:200]:
        for text in datasets._texts(example):
            assert normalize(text).text == text  # a phrase is a fixed point
