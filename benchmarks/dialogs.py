"""What do an adapter and a ranker add, on dialogs that nothing was learnt from?

    python -m benchmarks.dialogs [--save] [--set self_dialogue topical_chat ru_movie_dialogs] [--limit 4000]

For each set, with the commands anybody would use: `nlu index build` makes an index of replies of the learning part, `nlu
index adapt` learns from half of them, `nlu index train-ranker` from the dialogs, and `nlu index evaluate` asks the test
part: the true reply among 100, by the vectorizer's cosine alone, with the adapter, and with the ranker. What was learnt
stays in .cache/dialogs for the next run. Intervals are 95 %, over dialogs; gains are paired. The shipped vectorizer has
met the learning parts of self_dialogue, topical_chat and ru_movie_dialogs, as NOTICE says, and no test part.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.result import at_least, emit
from nlu.retrieval.dialogs import read

DATA = Path("../shared/data")
FOLDER = Path(".cache/dialogs")
STORE = Path(".cache/vectors")
SHIPPED = Path("statics/shipped")
# learnt from; tested on; exchanges the ranker may learn from
SETS = {
    "self_dialogue": (["train"], ["test"], 14_000),
    "topical_chat": (["valid_freq", "valid_rare"], ["test_freq", "test_rare"], 7_000),
    "ru_movie_dialogs": (["train"], ["test"], 7_000),
}
PAIRS = 2_000  # queries that the adapter learns from; as many replies stand beside theirs
MEASURES = ("recall@1", "recall@10", "mrr")


def main() -> None:
    """Learn what is not there yet, ask, print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    parser.add_argument("--set", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--limit", type=int, default=4_000, help="exchanges of each test part")
    chosen = parser.parse_args()
    figures: dict[str, float] = {}
    bars = []
    for name in chosen.set:
        told = measured(name, chosen.limit)
        figures |= {f"{name}_{what}": value for what, value in told.items()}
        low = told["ranker_recall@1_gain_low"]
        bars.append(
            at_least(f"{name}: recall@1 of the ranker over cosine, low end of its interval", low, 0.0)
        )
    emit("dialogs", figures, bars)


def measured(name: str, limit: int) -> dict[str, float]:
    """Each contestant's measures and its gain over cosine."""
    learnt, tested, exchanges = SETS[name]
    train, test = ([DATA / name / f"{part}.jsonl.gz" for part in parts] for parts in (learnt, tested))
    adapter, ranker = adapted(name, train), ranked(name, train, exchanges)
    figures: dict[str, float] = {}
    for kind, part in (("adapter", adapter), ("ranker", ranker)):
        told = json.loads(
            nlu(
                "index",
                "evaluate",
                *test,
                "--bundle",
                SHIPPED,
                f"--{kind}",
                part,
                "--limit",
                limit,
                "--store",
                STORE,
                "--json",
            )
        )
        among = told["among"]["contestants"]
        figures["exchanges"] = told["exchanges"]
        for contestant in {"cosine", kind} & among.keys():
            for measure in MEASURES:
                found = among[contestant]["measures"][measure]
                figures |= {
                    f"{contestant}_{measure}": found["value"],
                    f"{contestant}_{measure}_low": found["low"],
                    f"{contestant}_{measure}_high": found["high"],
                }
                gain = among[contestant].get("gain", {}).get(measure)
                if gain is not None:
                    figures |= {
                        f"{contestant}_{measure}_gain": gain["value"],
                        f"{contestant}_{measure}_gain_low": gain["low"],
                        f"{contestant}_{measure}_gain_high": gain["high"],
                    }
    return figures


def adapted(name: str, train: list[Path]) -> Path:
    """An adapter learnt from exchanges of these dialogs, on an index of twice as many replies."""
    folder = FOLDER / name
    out = folder / f"adapter.{name}"
    if out.exists():
        return out
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "parts").mkdir(parents=True)
    write_exchanges(train, folder)
    nlu("index", "build", folder / "replies.tsv", "--out", folder / "parts" / "index.dialogs", "--bundle", SHIPPED,
        "--encode", "replies", "--kind", "exact", "--merge", "off", "--max-toxicity", 1, "--store", STORE)  # fmt: skip
    shutil.copytree(SHIPPED / "vectorizer.sentence", folder / "parts" / "vectorizer.sentence")
    nlu("bundle", "build", folder / "parts", "--out", folder / "bundle")
    nlu("index", "adapt", folder / "pairs.tsv", "--bundle", folder / "bundle", "--out", out, "--max-harm", 0.05,
        "--store", STORE)  # fmt: skip
    return out


def write_exchanges(train: list[Path], folder: Path) -> None:
    """replies.tsv, found by their own vectors, and pairs.tsv, what was said before half of them."""
    exchanges = list(read(train, uncased=True, context=1))
    random.Random(0).shuffle(exchanges)
    ids: dict[str, str] = {}
    replies, pairs = ["reply\tid"], []
    for number, exchange in enumerate(exchanges[: 2 * PAIRS]):
        if exchange.reply not in ids:
            ids[exchange.reply] = f"r{number}"
            replies.append(f"{' '.join(exchange.text.split())}\tr{number}")
        if number < PAIRS:
            pairs.append(f"{exchange.context[-1]}\t{ids[exchange.reply]}")
    (folder / "replies.tsv").write_text("\n".join(replies) + "\n", encoding="utf-8")
    (folder / "pairs.tsv").write_text("\n".join(pairs) + "\n", encoding="utf-8")


def ranked(name: str, train: list[Path], exchanges: int) -> Path:
    """A ranker of trees learnt from these dialogs."""
    out = Path(".cache/rankers") / f"ranker.{name}"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        nlu(
            "index",
            "train-ranker",
            *train,
            "--bundle",
            SHIPPED,
            "--out",
            out,
            "--limit",
            exchanges,
            "--store",
            STORE,
        )
    return out


def nlu(*words: Any) -> str:
    """What a command printed."""
    command = [str(Path(sys.executable).parent / "nlu"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)}: found exit {done.returncode}: {done.stderr[-2000:]}; mend it and run again"
        )
    return done.stdout


if __name__ == "__main__":
    main()
