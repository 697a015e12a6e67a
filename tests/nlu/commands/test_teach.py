"""`nlu heads check | train | compare | suggest` as they are called: pages, one JSON object each, exit status, clear errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from annotators import table
from nlu import __main__ as command_line
from nlu.heads import lifecycle
from tests.nlu.heads import phrases
from tests.nlu.heads.phrases import Line
from tests.nlu.heads.sprints import ASKED, KNOWN, RULES, STRANGE, STRANGE_ASKED, mislabelled
from tests.tiny import Made


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout, which must be one object and nothing else."""
        found = json.loads(self.out)
        assert isinstance(found, dict) and self.out.count("\n") == 1
        return found


Command = Callable[..., Done]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Toy vectors want one BLAS thread."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def nlu(
    tiny: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Calls `nlu heads ...` in this process, as the installed command does, in an empty folder, on the tiny bundle."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NLU_BUNDLE", str(tiny.bundle.path))
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")

    def run(*arguments: object, status: int = 0) -> Done:
        monkeypatch.setattr(sys, "argv", ["nlu", "heads", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            command_line.main()
        said = capsys.readouterr()
        found = Done(0 if left.value.code is None else int(left.value.code), said.out, said.err)
        assert found.status == status, found
        assert "Traceback" not in found.err
        return found

    return run


def tsv(path: Path, lines: list[Line], *, split: str = "") -> Path:
    rows = [f"{line['text']}\t{line['label']}\t{split or line.get('split', '')}" for line in lines]
    path.write_text("\n".join(["text\tlabel\tsplit", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    """A spreadsheet with a column for the split."""
    test = [line | {"split": "test"} for line in ASKED + STRANGE_ASKED]
    train = [line | {"split": "train"} for line in KNOWN + STRANGE]
    return tsv(tmp_path / "phrases.tsv", [*train, *test])


# train


def test_teach_train_writes_a_head_and_its_report(nlu: Command, tmp_path: Path, sheet: Path) -> None:
    done = nlu("train", "--data", sheet, "--out", "runs/coffee", "--task", "intent")
    folder = tmp_path / "runs" / "coffee"
    assert sorted(path.name for path in folder.iterdir()) == ["head.coffee", "report.html", "report.json"]
    head = table.load(folder / "head.coffee")
    assert (head.spec.name, head.spec.task, head.spec.made_by) == ("coffee", "intent", "phrases.tsv")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert f"accuracy {report['summary']['accuracy']['value']:.3f}" in re.sub(" +", " ", done.out)
    assert "measured on test" in done.out
    assert re.search(r"out of scope: auroc +0\.\d{3}", done.out)
    assert f"{report['head']['bytes']:,} bytes in" in done.out
    assert "next: nlu heads add runs/coffee --out BUNDLE" in done.out
    assert "labels of test that train does not have" in done.out  # a warning
    assert "duplicates" not in done.out  # a note is in the report alone
    assert (tmp_path / ".cache" / "vectors").is_dir()


def test_teach_train_prints_the_report_as_one_object(nlu: Command, tmp_path: Path, sheet: Path) -> None:
    done = nlu("train", "--data", sheet, "--out", "coffee", "--json")
    assert done.json == json.loads((tmp_path / "coffee" / "report.json").read_text(encoding="utf-8"))


def test_teach_train_takes_each_split_from_a_file_of_its_own(nlu: Command, tmp_path: Path) -> None:
    files = {
        "--data": tsv(tmp_path / "train.tsv", KNOWN), "--dev": tsv(tmp_path / "dev.tsv", phrases.labelled(3, 8)),
        "--test": tsv(tmp_path / "test.tsv", ASKED), "--outside": tsv(tmp_path / "strange.tsv", STRANGE),
    }  # fmt: skip
    options = [each for pair in files.items() for each in pair]
    report = nlu("train", *options, "--out", "x", "--store", "vectors", "--json").json
    assert report["data"]["rows"] == {
        "train": len(KNOWN),
        "dev": 9,
        "test": len(ASKED),
        "outside": len(STRANGE),
    }
    assert report["vectors"]["from_store"] == 0
    again = nlu("train", *options, "--out", "x", "--store", "vectors", "--json").json
    assert again["vectors"]["encoded"] == 0
    assert again["summary"] == report["summary"]


def test_teach_train_hands_every_option_on(nlu: Command, sheet: Path) -> None:
    options = (
        "--name", "tea", "--task", "t", "--balanced", "--hidden", "5", "--beta", "2.5", "--outside-from", "none", "--shots", "2,4",
        "--seeds", "2", "--cross-validate", "2", "--seed", "7", "--columns", "text=text,label=label", "--skip-bad",
    )  # fmt: skip
    report = nlu("train", "--data", sheet, "--out", "x", *options, "--json").json
    config = report["head"]["config"]
    assert config["files"] == {"train": [str(sheet)]}
    del config["files"]
    assert config == {
        "name": "tea", "task": "t", "balanced": True, "hidden": 5, "beta": 2.5, "outside": "none", "shots": [2, 4],
        "shot_seeds": 2, "cross_validate": 2, "seed": 7, "columns": {"text": "text", "label": "label"}, "skip_bad": True,
    }  # fmt: skip
    assert [part["shots"] for part in report["few_shot"]] == [2, 4]
    assert report["cross_validation"]["folds"] == 2


def test_teach_train_reads_a_file_of_settings_and_options_win(nlu: Command, tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    phrases.written(tmp_path / "conf" / "a.jsonl", phrases.marked(30, 0))
    settings = 'name = "orders"\nkind = "token"\nbeta = 2.0\nseed = 4\nfiles = { train = "a.jsonl" }\n'
    (tmp_path / "conf" / "orders.toml").write_text(settings, encoding="utf-8")
    config = nlu("train", "conf/orders.toml", "--out", "x", "--seed", "5", "--json").json["head"]["config"]
    assert (config["name"], config["kind"], config["beta"], config["seed"]) == ("orders", "token", 2.0, 5)
    assert config["files"] == {"train": ["conf/a.jsonl"]}


@pytest.mark.parametrize(
    ("kind", "lines", "options"),
    [
        ("context", phrases.answered(24, 0), ("--turns", "1")),
        ("token", phrases.spelt(24, 0), ("--scheme", "restore")),
        ("sentence", phrases.several(30, 0), ("--multi",)),
        ("anchors", phrases.labelled(2, 0), ()),
        ("boosted", phrases.labelled(9, 0), ()),
    ],
)
def test_teach_train_of_every_kind_shows_a_page(
    nlu: Command, tmp_path: Path, kind: str, lines: list[Line], options: tuple[str, ...]
) -> None:
    path = phrases.written(tmp_path / "a.jsonl", lines)
    done = nlu("train", "--data", path, "--kind", kind, *options, "--out", "x")
    wanted = "nothing was measured: there is no test split" if kind == "anchors" else "measured on folds"
    assert wanted in done.out
    assert not re.search(r"\b(None|nan)\b", done.out)


def test_teach_train_of_rules_needs_no_data(nlu: Command, tmp_path: Path) -> None:
    lines = [f"[[rules]]\nlabel = {rule['label']!r}" for rule in RULES]
    text = 'name = "machine"\nkind = "rules"\n' + f"{lines[0]}\nphrases = ['stop']\n{lines[1]}\npattern = '{RULES[1]['pattern']}'\n"  # fmt: skip
    (tmp_path / "machine.toml").write_text(text + "[tests]\n'stop.' = ['stop']\n", encoding="utf-8")
    done = nlu("train", "machine.toml", "--out", "x")
    assert re.search(r"measured on its tests\s.*\n.*tests +1", done.out)
    assert nlu("check", "machine.toml", "--json").json == {
        "rows": {"train": 0, "dev": 0, "test": 0}, "findings": [], "trainable": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("train", "--out", "x"), 1, "data: found 1 errors, expected none: train: nothing to learn from: found no labelled row; name a file with --data"),
        (("train", "--data", "none.tsv", "--out", "x"), 1, "none.tsv: found No such file or directory, expected a file of phrases; check the path"),
        (("train", "--data", "bad.tsv", "--out", "x"), 1, "bad.tsv:3: text that cannot be said: found text: found nothing but"),
        (("train", "--data", "good.tsv", "--out", "Runs"), 1, "options: name: String should match pattern"),
        (("train", "--data", "good.tsv", "--out", "x", "--multi", "--kind", "boosted"), 1, "multi: found in a head of kind boosted"),
        (("train", "--data", "good.tsv", "--out", "x", "--outside-from", "labels"), 1, "labels: found 2, expected at least 3"),
        (("train", "--data", "good.tsv", "--out", "x", "--shots", "2,many"), 2, "--shots '2,many': expected numbers such as 5,10"),
        (("train", "--data", "good.tsv", "--out", "x", "--columns", "utterance"), 2, "expected pairs such as text=utterance"),
        (("train", "--data", "good.tsv", "--out", "x", "--columns", "phrase=text"), 1, "columns: found phrase, expected some of text"),
        (("train", "--data", "good.tsv", "--out", "x", "--kind", "oracle"), 2, "'oracle' is not one of 'sentence', 'context'"),
        (("train", "none.toml", "--out", "x"), 2, "'none.toml' does not exist"),
        (("train", "--data", "good.tsv", "--out", "x", "--bundle", "nowhere"), 1, "file-missing"),
        (("check", "--data", "bad.xlsx"), 1, "bad.xlsx: found a file of kind '.xlsx', expected .tsv .csv"),
        (("compare", "topic", "intent"), 2, "found neither --data nor --traffic, expected one of them"),
        (("compare", "topic", "intent", "--data", "good.tsv", "--traffic", "said.txt"), 2, "found both --data and --traffic"),
        (("compare", "topic", "nobody", "--data", "good.tsv"), 1, "head.nobody: found only"),
        (("compare", "topic", "empty", "--data", "good.tsv"), 1, "empty: found no head, expected a folder called head.NAME"),
        (("compare", "topic", "intent", "--data", "train.tsv"), 1, "train.tsv: found no phrases to ask, expected some, of split test"),
        (("compare", "topic", "intent", "--data", "bad.tsv"), 1, "bad.tsv:3: text that cannot be said"),
        (("compare", "slots", "intent", "--traffic", "said.txt"), 1, "found kinds token and sentence, expected two that mark"),
        (("suggest", "said.txt", "--head", "quick"), 1, "head quick: found kind rules, expected one that can be unsure"),
        (("suggest", "none.txt"), 2, "'none.txt' does not exist"),
        (("suggest", "silent.txt"), 1, "silent.txt: found no phrases to ask, expected some"),
        (("suggest", "said.txt", "-n", "0"), 2, "Invalid value for '--count' / '-n': Input should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_teach_failures_are_one_clear_message(
    nlu: Command, tmp_path: Path, arguments: tuple[str, ...], status: int, words: str
) -> None:
    lines = phrases.labelled(4, 0, ["lamp", "music"])
    tsv(tmp_path / "good.tsv", lines)
    tsv(tmp_path / "train.tsv", lines, split="train")
    (tmp_path / "bad.tsv").write_text("text\tlabel\nabc\ta\n...\ta\n", encoding="utf-8")
    (tmp_path / "bad.xlsx").write_bytes(b"PK")
    (tmp_path / "said.txt").write_text("abc\n", encoding="utf-8")
    (tmp_path / "silent.txt").write_text("...\n\n", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    done = nlu(*arguments, status=status)
    assert done.out == ""
    framed = re.sub(r"[│╭╮╰╯─]", " ", done.err)  # typer draws a box around its own
    assert " ".join(words.split()) in " ".join(framed.split())
    assert not (tmp_path / "x").exists()


# check


def test_teach_check_says_that_all_is_well(nlu: Command, sheet: Path) -> None:
    done = nlu("check", "--data", sheet)
    assert f"{len(KNOWN)} train, {len(ASKED)} test rows; a head can be trained on this" in done.out


def test_teach_check_names_what_is_wrong_and_leaves_with_1(nlu: Command, tmp_path: Path) -> None:
    path = tsv(
        tmp_path / "a.tsv", [*KNOWN, {"text": "??", "label": "lamp"}, {"text": "hm", "label": "[b]odd[/b]"}]
    )
    done = nlu("check", "--data", path, status=1)
    assert "found errors: mend them first" in done.out
    assert "a.tsv:47\n" in done.out and "-> mend or drop the line" in done.out
    assert "1 phrase of '[b]odd[/b]'" in done.out  # what looks like markup is shown as it is
    found = nlu("check", "--data", path, "--json", status=1).json
    assert found["trainable"] is False
    errors = [finding for finding in found["findings"] if finding["severity"] == "error"]
    assert [finding["what"] for finding in errors] == ["text that cannot be said", "label too small"]
    assert all(finding["where"] and finding["found"] and finding["remedy"] for finding in found["findings"])


def test_teach_check_looks_at_vectors_unless_told_otherwise(nlu: Command, tmp_path: Path) -> None:
    wrong = [line | {"label": "music"} if i == 3 else line for i, line in enumerate(phrases.labelled(20, 0))]
    path = tsv(tmp_path / "a.tsv", wrong)

    def named(*options: str) -> list[str]:
        return [
            finding["what"] for finding in nlu("check", "--data", path, *options, "--json").json["findings"]
        ]

    assert "labels that look wrong" in named()
    assert "labels that look wrong" not in named("--no-vectors")
    assert (tmp_path / ".cache" / "vectors").exists()


def test_teach_check_and_train_agree_on_rows_to_leave_out(nlu: Command, tmp_path: Path) -> None:
    tsv(tmp_path / "a.tsv", [*KNOWN, {"text": "??", "label": "lamp"}])
    (tmp_path / "a.toml").write_text('name = "a"\nskip_bad = true\nfiles.train = "a.tsv"\n', encoding="utf-8")
    nlu("check", "a.toml")
    nlu("train", "a.toml", "--out", "x")
    nlu("train", "--data", "a.tsv", "--out", "y", "--skip-bad")
    nlu("train", "--data", "a.tsv", "--out", "z", status=1)
    assert sorted(path.name for path in tmp_path.glob("[xyz]")) == ["x", "y"]


# compare


@pytest.fixture
def two(nlu: Command, tmp_path: Path, sheet: Path) -> tuple[str, str]:
    """Two heads in their folders, trained on many and on few phrases."""
    nlu("train", "--data", sheet, "--name", "coffee", "--out", "one")
    few = tsv(tmp_path / "few.tsv", mislabelled(phrases.labelled(6, 5)))
    nlu("train", "--data", few, "--name", "coffee", "--out", "two")
    return "one", "two"


def test_teach_compare_shows_measures_and_flips(nlu: Command, two: tuple[str, str], sheet: Path) -> None:
    found = nlu("compare", *two, "--data", sheet, "--json").json
    assert set(found) == {"phrases", "measures", "flips", "by_pair"}
    assert found["phrases"] == len(ASKED) + len(
        STRANGE_ASKED
    )  # the rows of split test, those of no label too
    assert set(found["measures"]) == {"accuracy", "coverage", "accepted and right"}
    flips = found["flips"]
    assert flips and "nothing" in {flip["gold"] for flip in flips}
    page = nlu("compare", *two, "--data", sheet).out
    assert f"{len(flips)} of {found['phrases']} phrases are answered differently" in page
    accuracy = found["measures"]["accuracy"]
    assert re.search(
        rf"accuracy +{accuracy['before']:.3f} +{accuracy['after']:.3f} +[+-]0\.\d+ to [+-]", page
    )
    pair = found["by_pair"][0]
    assert f"{pair['count']:>6}  {pair['before']} -> {pair['after']}" in page
    report = json.loads(Path("one", "report.json").read_text(encoding="utf-8"))
    assert accuracy["before"] == pytest.approx(report["summary"]["accuracy"]["value"])


def test_teach_compare_asks_traffic_and_leaves_out_what_cannot_be_said(
    nlu: Command, two: tuple[str, str], tmp_path: Path
) -> None:
    said = [line["text"] for line in ASKED] + ["...", "wxyz\tzyx"]
    (tmp_path / "said.txt").write_text("\n".join(said) + "\n", encoding="utf-8")
    done = nlu("compare", *two, "--traffic", "said.txt", "--json")
    assert done.json["phrases"] == len(said) - 1
    assert done.json["measures"] == {} and {flip["gold"] for flip in done.json["flips"]} <= {""}
    assert "left out: said.txt:38: text that cannot be said" in done.err
    assert "accuracy" not in nlu("compare", *two, "--traffic", "said.txt").out


def test_teach_compare_takes_the_bundles_own_head_by_name(nlu: Command, tiny: Made, tmp_path: Path) -> None:
    lines = [{"text": text, "label": "stop"} for text in ("stop", "stop it")]
    path = tsv(tmp_path / "a.tsv", lines)
    found = nlu("compare", "intent", str(tiny.parts / "head.intent"), "--data", path, "--json").json
    assert (found["phrases"], found["flips"]) == (2, [])


@pytest.mark.parametrize(
    ("lines", "options"),
    [
        (phrases.marked(30, 0), ("--kind", "token")),
        (phrases.spelt(30, 0), ("--kind", "token", "--scheme", "restore")),
        (phrases.several(30, 0), ("--multi",)),
        (mislabelled(phrases.answered(30, 0)), ("--kind", "context")),
        (phrases.labelled(3, 0), ("--kind", "anchors")),
    ],
    ids=["spans", "restore", "several", "context", "anchors"],
)
def test_teach_compare_and_suggest_take_heads_of_every_kind(
    nlu: Command, tmp_path: Path, lines: list[Line], options: tuple[str, ...]
) -> None:
    path = phrases.written(tmp_path / "a.jsonl", lines)
    nlu("train", "--data", path, "--out", "x", *options)
    nlu("train", "--data", path, "--out", "y", "--seed", "3", *options)
    labelled = nlu("compare", "x", "y", "--data", path, "--json").json
    assert labelled["phrases"] == len(lines) and labelled["measures"]
    plain = phrases.written(tmp_path / "b.jsonl", [{key: line[key] for key in ("text", "context") if key in line} for line in lines])  # fmt: skip
    assert nlu("compare", "x", "y", "--traffic", plain, "--json").json["phrases"] == len(lines)
    assert nlu("suggest", plain, "--head", "x", "-n", "3", "--json").json["suggestions"]


def test_teach_compare_refuses_a_head_of_another_vectorizer(
    nlu: Command, stranger: Made, two: tuple[str, str], tmp_path: Path
) -> None:
    head = str(stranger.parts / "head.intent")
    (tmp_path / "said.txt").write_text("abc\n", encoding="utf-8")
    done = nlu("compare", head, head, "--traffic", "said.txt", status=1)
    assert re.search(r"head intent: found one trained on vectorizer \w{12}, expected \w{12}, the bundle's", " ".join(done.err.split()))  # fmt: skip
    assert nlu("compare", head, head, "--traffic", "said.txt", "--bundle", stranger.bundle.path)
    done = nlu("compare", two[0], head, "--traffic", "said.txt", status=1)
    assert "retrain it with --bundle naming a bundle of that vectorizer" in " ".join(done.err.split())


# suggest


def test_teach_suggest_writes_a_sheet_that_can_be_labelled_and_read(
    nlu: Command, two: tuple[str, str], tmp_path: Path
) -> None:
    pool = [*(line["text"] for line in phrases.labelled(10, 9)), "включи «jazz»", "включи «jazz»"]
    (tmp_path / "pool.txt").write_text("\n".join(pool) + "\n", encoding="utf-8")
    found = nlu("suggest", "pool.txt", "--head", two[1], "-n", "6", "--out", "sheet.tsv", "--json").json
    assert found["pool"] == len(pool) and len(found["suggestions"]) == 6
    heading, *rows = (line.split("\t") for line in (tmp_path / "sheet.tsv").read_text("utf-8").splitlines())
    assert heading == ["text", "guess", "runner_up", "uncertainty"]
    assert [row[:3] for row in rows] == [[each["phrase"], each["guess"], each["runner_up"]] for each in found["suggestions"]]  # fmt: skip
    page = nlu("suggest", "pool.txt", "--head", two[1], "-n", "6", "--out", "sheet.tsv").out
    assert "6 of 32 phrases in sheet.tsv; label them in a column label" in page
    done = [[*heading, "label"], *([*row, row[1]] for row in rows)]
    (tmp_path / "sheet.tsv").write_text("".join("\t".join(row) + "\n" for row in done), encoding="utf-8")
    nlu("train", "--data", "few.tsv", "--data", "sheet.tsv", "--out", "next")


def test_teach_suggest_shows_labels_as_they_are(nlu: Command, tmp_path: Path) -> None:
    odd = [line | {"label": f"[red]{line['label']}[/]"} for line in mislabelled(phrases.labelled(6, 0))]
    nlu("train", "--data", tsv(tmp_path / "a.tsv", odd), "--out", "x")
    (tmp_path / "pool.txt").write_text("abcd klmn\n[b]bold[/b]\n", encoding="utf-8")
    page = nlu("suggest", "pool.txt", "--head", "x").out
    assert "[red]" in page and "[b]bold[/b]" in page


# together


def test_teach_trained_heads_are_added_to_bundles(nlu: Command, tiny: Made, sheet: Path) -> None:
    nlu("train", "--data", sheet, "--out", "coffee")
    added = nlu("add", "coffee", "--out", "bundle", "--json").json
    assert [change["part"] for change in added["changes"]] == ["head.coffee"]
    assert lifecycle.find(Path("coffee")).name == "coffee"


def test_teach_help_needs_no_science(tmp_path: Path) -> None:
    script = "import sys, nlu.commands.teach; print(*(m for m in ('sklearn', 'numpy', 'pyarrow') if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == ""


def test_teach_without_the_extra_says_what_to_install(
    nlu: Command, sheet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)  # as if it were not there
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    done = nlu("check", "--data", sheet, status=2)
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.err).split())
    assert "expected the 'heads' extra; pip install 'chorus-nlu[heads]'" in said
