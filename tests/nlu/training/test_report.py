"""nlu.training.report: the table, the document and the files, of an evaluation written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'chorus-nlu[train]'")

from nlu.training import report
from nlu.training.scores import Column, Evaluation, Line, Score

COLUMNS = tuple(
    Column(name, f"made/{name}", character * 64, 384, 384, precision, size)
    for name, character, precision, size in (
        ("small", "a", "int8", 25_000_000),
        ("big", "b", "fp32", 100_000_000),
    )
)
FULL = Line(
    *("intents", "clinc150", "en", "full", "accuracy", 4500, False),
    scores=(Score(0.95, 0.944, 0.956), Score(0.96, 0.954, 0.966, None, 0.01, 0.004, 0.016)),
)
FEW = Line(
    *("intents", "hint3", "en", "5-shot", "accuracy", 900, True),
    scores=(Score(0.6, 0.57, 0.63, 0.012), Score(0.59, 0.56, 0.62, 0.015, -0.01, -0.03, 0.01)),
)
RUSSIAN = Line(
    *("similarity", "stsb.ru", "ru", "cosine", "Spearman", 1200, False),
    scores=(Score(0.7, 0.68, 0.72), Score(0.3, 0.28, 0.32, None, -0.4, -0.42, -0.38)),
)
SIZE = Line(*("cost", "", "", "on disk", "MB", 0, False), scores=(Score(25.0), Score(100.0)))
SPEED = Line(
    *("cost", "clinc150", "", "one thread", "ms per phrase", 400, False),
    scores=(Score(0.8, 0.79, 0.82), Score(2.4, 2.3, 2.5, None, 1.6, 1.5, 1.7)),
)
EVALUATION = Evaluation(
    "full", {"f_beta": 1.8}, COLUMNS, (SIZE, SPEED, FULL, FEW, RUSSIAN), {"clinc150/test.tsv.gz": "0"}, 1.0
)


@pytest.mark.parametrize(
    ("line", "first", "second"),
    [
        (FULL, "0.950 [0.944 0.956]", "0.960 (+0.010 [+0.004 +0.016]) ▲"),
        (FEW, "0.600 ±0.012", "0.590 ±0.015 (-0.010 [-0.030 +0.010])"),
        (RUSSIAN, "0.700 [0.680 0.720]", "0.300 (-0.400 [-0.420 -0.380]) ▼"),
        (SIZE, "25.00", "100.00 (4.00x)"),
        (SPEED, "0.80 [0.79 0.82]", "2.40 [2.30 2.50] (3.00x)"),
    ],
    ids=["better", "no different", "worse", "size", "speed"],
)
def test_report_cell_says_score_margin_and_change(line: Line, first: str, second: str) -> None:
    assert [report.cell(line, i).plain for i in range(2)] == [first, second]


def test_report_cell_of_other_rows_has_its_own_interval() -> None:
    unpaired = Line(
        *("toxicity", "davidson", "en", "full", "macro-F1", 10, False), (Score(0.5), Score(0.6, 0.5, 0.7))
    )
    assert report.cell(unpaired, 1).plain == "0.600 [0.500 0.700]"


def test_report_markdown_is_a_section_to_paste() -> None:
    text = report.markdown(EVALUATION).splitlines()
    assert text[0] == "- **small**: `aaaaaaaaaaaa`, 384 dimensions, int8"
    assert [line for line in text if line.startswith("#")] == ["### English", "### Russian", "### Cost"]
    assert text[text.index("### English") + 2 :][:4] == [
        "| line | n | small | big |",
        "| --- | ---: | ---: | ---: |",
        "| intents, clinc150, full: accuracy | 4,500 | 0.950 [0.944 0.956] | 0.960 (+0.010 [+0.004 +0.016]) ▲ |",
        "| intents, hint3 (unseen), 5-shot: accuracy | 900 | 0.600 ±0.012 | 0.590 ±0.015 (-0.010 [-0.030 +0.010]) |",
    ]
    assert "| cost, on disk: MB |  | 25.00 | 100.00 (4.00x) |" in text


def test_report_table_has_a_row_a_line_and_a_language() -> None:
    assert report.table(EVALUATION).row_count == len(EVALUATION.lines) + 3


def test_report_files(tmp_path: Path) -> None:
    paths = report.write(EVALUATION, tmp_path / "out")
    assert [path.name for path in paths] == list(report.REPORT_FILES)
    found = json.loads(paths[0].read_text(encoding="utf-8"))
    assert set(found) == {"suite", "settings", "columns", "lines", "data", "seconds"}
    assert set(found["lines"][0]) == {
        *("task", "data", "language", "condition", "metric", "items", "unseen", "scores"),
    }
    assert set(found["lines"][0]["scores"][0]) == {
        *("value", "low", "high", "spread", "change", "change_low", "change_high"),
    }
    assert paths[1].read_text(encoding="utf-8") == report.markdown(EVALUATION)
    assert paths[2].read_bytes().startswith(b"\x89PNG")
