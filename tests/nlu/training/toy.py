"""Toy copies of the public sets, for the tests of evaluation: the formats are theirs, the sentences are not."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

INTENTS = {"lights": "lights", "music": "music", "stop": "stop"}
FRAMES = ["please {}", "the {} now", "{} again", "Do the {} thing", "my {} ok", "{} {}"]
RU_INTENTS = {"light": "свет", "music": "музыка"}


def write(path: Path, rows: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{row}\n" for row in rows)


def dialog(*turns: str) -> str:
    return json.dumps(
        {"id": "0", "turns": [{"speaker": "AB"[i % 2], "text": t} for i, t in enumerate(turns)]}
    )


def tagged(text: str, tags: str, label: str) -> str:
    names = [f"{tag}-{label}" if tag != "O" else tag for tag in tags]
    return json.dumps({"text": text, "tokens": text.split(), "tags": names, "intent": ""})


def rows_of(intents: dict[str, str], frames: Sequence[str]) -> list[str]:
    return [f"{frame.format(word, word)}\t{label}" for label, word in intents.items() for frame in frames]


def make_toy(root: Path) -> Path:
    """A few rows of each set of the quick suite, written for these tests."""
    tests = ["any {} here", "well {}"]
    bots = [f"hint3/{bot}" for bot in ("curekart", "powerplay11", "sofmattress")]
    for prefix, intents in (
        *((f"{bot}_", INTENTS) for bot in bots),
        ("clinc150/", INTENTS),
        ("banking77/", INTENTS | {"card": "card"}),
    ):
        write(root / f"{prefix}train.tsv.gz", rows_of(intents, FRAMES))
        write(root / f"{prefix}test.tsv.gz", rows_of(intents, tests))
    write(root / "banking77/train.tsv.gz", [*rows_of(INTENTS | {"card": "card"}, FRAMES), "Lost card\tcard"])
    write(root / "banking77/test.tsv.gz", [*rows_of(INTENTS, tests), "lost card\tcard"])
    write(root / "clinc150/dev.tsv.gz", rows_of(INTENTS, ["some {} there"]))
    write(root / "clinc150/test.tsv.gz", [*rows_of(INTENTS, tests), "qqq one\toos", "qqq two\toos"])
    write(
        root / "home_assistant_intents/ru_generated.tsv.gz",
        rows_of(RU_INTENTS, ["включи {}", "{} да", "вот {}"]),
    )
    write(root / "home_assistant_intents/ru_written.tsv.gz", rows_of(RU_INTENTS, ["Мне {} сюда"]))
    moods = ["ha {}\tjoy", "grr {}\tanger", "hm {}\tneutral", "ha grr {}\tjoy,anger"]
    for i, split in enumerate(("train", "dev", "test")):
        numbers = range(10 * i, 10 * i + (8 if split == "train" else 3))
        write(root / f"goemotions/{split}.tsv.gz", [row.format(n) for n in numbers for row in moods])
        toxic = ["bad {}\toffensive", "vile {}\thate", "nice {}\tneither"]
        write(
            root / f"davidson_hate_offensive/{split}.tsv.gz",
            [row.format(n) for n in numbers for row in toxic],
        )
        spans = [
            *(tagged(f"call anna {n}", "OBO", "who") for n in numbers),
            *(tagged(f"call me {n}", "OOO", "who") for n in numbers),
        ]
        for name in ("snips", "wnut17"):
            write(root / f"{name}/{split}.jsonl.gz", spans)
    pairs = [("one two", "one two three", 5), ("one", "абв", 0), ("a dog", "a dogs", 4), ("hi", "bye", 1)]
    for language in ("en", "ru"):
        write(root / f"stsb/{language}_test.tsv.gz", [f"{a}\t{b}\t{score}" for a, b, score in pairs])
    write(
        root / "self_dialogue/test.jsonl.gz",
        [dialog(f"what {i} {'ab' * i}", f"that {'ab' * i}") for i in range(9)],
    )
    return root
