"""nlu.heads.config: what a file and options say comes out, and what makes no sense is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nlu.heads import config
from nlu.heads.config import HeadConfig

WHOLE = """
name = "coffee"
kind = "sentence"
task = "intent"
beta = 2.0
regularisations = [0.5, 4]
hidden = 16
shots = [2, 5]
outside = "labels"
columns = { text = "utterance" }
[files]
train = ["a.tsv", "sub/b.tsv"]
test = "c.tsv"
"""


def toml(folder: Path, text: str) -> Path:
    path = folder / "head.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_config_of_options_alone() -> None:
    found = config.load(None, name="coffee", kind=None, multi=None, files={"train": ["a.tsv"]})
    assert found == HeadConfig(name="coffee", files=config.Files(train=(Path("a.tsv"),)))


def test_config_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    found = config.load(toml(tmp_path, WHOLE))
    assert found.files.train == (tmp_path / "a.tsv", tmp_path / "sub" / "b.tsv")
    assert found.files.test == (tmp_path / "c.tsv",)
    assert (found.task, found.beta, found.regularisations, found.shots) == ("intent", 2.0, (0.5, 4.0), (2, 5))


def test_config_absolute_paths_stay(tmp_path: Path) -> None:
    found = config.load(toml(tmp_path, f'name = "coffee"\n[files]\ntrain = "{tmp_path.parent}/a.tsv"'))
    assert found.files.train == (tmp_path.parent / "a.tsv",)


def test_config_options_win_over_the_file_and_none_is_no_option(tmp_path: Path) -> None:
    path = toml(tmp_path, WHOLE)
    found = config.load(path, name="tea", beta=1.0, hidden=None, files={"test": [Path("d.tsv")]})
    assert (found.name, found.beta, found.hidden) == ("tea", 1.0, 16)
    assert found.files.test == (Path("d.tsv"),)  # from where the command was called
    assert found.files.train == (
        tmp_path / "a.tsv",
        tmp_path / "sub" / "b.tsv",
    )  # the split that no option names


def test_config_of_a_report_is_the_config(tmp_path: Path) -> None:
    found = config.load(toml(tmp_path, WHOLE))
    assert HeadConfig.model_validate_json(found.model_dump_json(exclude_defaults=True)) == found


@pytest.mark.parametrize(
    ("kind", "beta"),
    [("sentence", 1.8), ("context", 1.8), ("boosted", 1.8), ("token", 1.0), ("anchors", 1.0)],
)
def test_config_beta_is_the_kinds_own_unless_it_is_said(kind: str, beta: float) -> None:
    assert config.load(None, name="x", kind=kind).beta == beta
    assert config.load(None, name="x", kind=kind, beta=3.0).beta == 3.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = ", "found .* expected TOML; mend the file"),
        ('kind = "sentence"', "name: Field required; mend the config"),
        ('name = "Coffee"', "name: String should match"),
        ('name = "x"\nkind = "oracle"', "kind: Input should be 'sentence', 'context'"),
        ('name = "x"\nregularization = [1.0]', "regularization: Extra inputs are not permitted"),
        ('name = "x"\n[files]\ntrian = "a.tsv"', "files.trian: Extra inputs are not permitted"),
        ('name = "x"\nfiles = "a.tsv"', r"files: found 'a.tsv', expected a table \[files\]"),
        ('name = "x"\n[files]\ntrain = 5', "files.train.0: Input is not a valid path"),
        ('name = "x"\n[files]\ntrain = ["a.tsv", 5]', "files.train.1: Input is not a valid path"),
        ('name = "x"\nbeta = 0', "beta: Input should be greater than 0"),
        ('name = "x"\nbeta = inf', "beta: Input should be a finite number"),
        ('name = "x"\nregularisations = [1.0, -2.0]', "regularisations.1: Input should be greater than 0"),
        ('name = "x"\nshots = [5, 0]', "shots.1: Input should be greater than or equal to 1"),
        ('name = "x"\ncross_validate = 1', "cross_validate: found 1 fold, expected at least 2, or 0"),
        ('name = "x"\noutside_labels = []', "outside_labels: Tuple should have at least 1 item"),
        ('name = "x"\noutside_share = 1.0', "outside_share: Input should be less than 1"),
        ('name = "x"\nkind = "rules"', r"rules: found none, expected \[\[rules\]\]"),
        ('name = "x"\nkind = "rules"\n[[rules]]\nphrases = ["hi"]', "found a rule without a label"),
        ('name = "x"\nturns = 3', "turns: found in a head of kind sentence, expected only in kind context"),
        ('name = "x"\nkind = "token"\nhidden = 8', "hidden: found in a head of kind token, expected only in"),
        ('name = "x"\nscheme = "restore"', "scheme: found in a head of kind sentence, expected only in kind token"),
        ('name = "x"\nkind = "boosted"\n[patterns]\na = ["b"]', "patterns: found .*boosted, expected only .*anchors"),
        ('name = "x"\nkind = "context"\nmulti = true', "multi: found in a head of kind context, expected only"),
        ('name = "x"\ncolumns = { utterance = "text" }', "columns: found utterance, expected some of text, label"),
    ],
)  # fmt: skip
def test_config_refuses_what_makes_no_sense(tmp_path: Path, text: str, words: str) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(ValueError, match=words) as caught:
        config.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_config_refuses_a_file_of_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "head.toml"
    path.write_bytes('name = "кофе"'.encode("cp1251"))
    with pytest.raises(ValueError, match="head.toml: found 'utf-8' codec .* expected TOML"):
        config.load(path)


@pytest.mark.parametrize("options", [{"name": "x", "beta": -1.0}, {"kind": "token"}])
def test_config_refusals_of_options_name_no_file(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^options: (beta|name): "):
        config.load(None, **options)
