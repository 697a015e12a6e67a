"""nlu.retrieval.train_ranker: a ranker learnt from dialogs finds what cosine does not, and serves where it was trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlu import loading
from nlu.canaries import FILE as CANARIES
from nlu.engine import Engine
from nlu.errors import EngineRefused
from nlu.heads import lifecycle
from nlu.parts import part
from nlu.ranker import FILE, MODEL_FILE, Ranker
from nlu.retrieval.dialogs import DialogsInvalid, Exchange, read
from nlu.retrieval.train_ranker import Trained, Wanted, divide, report_file, taught, train
from tests.nlu.retrieval.talk import silent, write_dialogs
from tests.tiny import Made


@pytest.fixture(scope="module")
def dialogs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dialogs(tmp_path_factory.mktemp("dialogs") / "things.jsonl", 100)


WANTED = Wanted(candidates=12)


def trained_in(folder: Path, engine: Engine, dialogs: Path, **changes: Any) -> Trained:
    wanted = replace(WANTED, **changes)
    return train(
        [dialogs], engine, folder / "vectors", folder / "ranker.chat", wanted, workers=1, progress=silent
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, engine: Engine, dialogs: Path) -> Trained:
    return trained_in(tmp_path_factory.mktemp("trained"), engine, dialogs)


def test_train_ranker_beats_cosine_on_dialogs_it_has_not_seen(trained: Trained) -> None:
    found = trained.report["among"]["contestants"]
    gain = found["trees"]["gain"]["recall@1"]
    assert gain["low"] > 0.2
    assert found["trees"]["measures"]["recall@1"]["value"] > 0.9  # the word tells it
    assert found["linear"]["gain"]["recall@1"]["value"] == 0.0  # the control: nothing else was learnt from
    assert max(trained.report["features"], key=trained.report["features"].__getitem__) in (
        "reply_overlap", "long_words", "context_share", "assistant_overlap", "user_overlap",
    )  # fmt: skip


def test_train_ranker_learns_nothing_where_there_is_nothing(
    tmp_path: Path, engine: Engine, dialogs: Path
) -> None:
    """The negative control of the test above: the same replies, dealt out to other dialogs."""
    records = [json.loads(line) for line in dialogs.read_text(encoding="utf-8").splitlines()]
    turns = [turn for record in records for turn in record["turns"]]
    order = np.random.default_rng(1).permutation(len(turns)).tolist()
    for number, record in enumerate(records):
        record["turns"] = [turns[i] for i in order[number * 5 : number * 5 + 5]]
    dealt = tmp_path / "dealt.jsonl"
    dealt.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    report = trained_in(tmp_path, engine, dealt).report
    assert report["among"]["contestants"]["trees"]["gain"]["recall@1"]["low"] < 0.05


def test_train_ranker_leaves_a_ranker_and_its_report(trained: Trained) -> None:
    assert sorted(file.name for file in trained.folder.iterdir()) == [CANARIES, MODEL_FILE, FILE]
    assert json.loads(report_file(trained.folder).read_bytes()) == trained.report
    ranker = Ranker.load(trained.folder)
    told = trained.report["ranker"]
    assert ranker.spec.trained == told
    assert set(ranker.spec.features) == set(trained.report["features"])
    assert set(told["exchanges"]) == {"learnt", "held", "test"}
    assert sum(told["exchanges"].values()) == 400
    assert sum(trained.report["features"].values()) == pytest.approx(1.0)
    test = trained.report["among"]["contestants"]["trees"]["measures"]["recall@1"]["value"]
    assert ranker.spec.metrics["test recall@1"] == pytest.approx(test, abs=1e-4)


def test_train_ranker_is_deterministic(
    tmp_path: Path, engine: Engine, dialogs: Path, trained: Trained
) -> None:
    again = trained_in(tmp_path, engine, dialogs)
    assert again.report == trained.report
    for file in (FILE, MODEL_FILE, CANARIES):
        assert (again.folder / file).read_bytes() == (trained.folder / file).read_bytes()
    other = trained_in(tmp_path, engine, dialogs, seed=1)  # the control, in the place of the one before
    assert (other.folder / MODEL_FILE).read_bytes() != (trained.folder / MODEL_FILE).read_bytes()


def test_train_ranker_takes_at_most_so_many_exchanges(tmp_path: Path, engine: Engine, dialogs: Path) -> None:
    told = trained_in(tmp_path, engine, dialogs, limit=250, candidates=5).report["ranker"]
    assert sum(told["exchanges"].values()) == 250


def test_train_ranker_divides_dialogs_whole(dialogs: Path) -> None:
    exchanges = list(read([dialogs], uncased=True, context=4))
    parts = divide(exchanges)
    names = [{exchange.dialog for exchange in part} for part in parts]
    assert sum(map(len, parts)) == len(exchanges)
    assert sum(map(len, names)) == len(set().union(*names)) == 100
    fewer = divide([exchange for exchange in exchanges if exchange.dialog != "d0"])
    for before, after in zip(names, fewer, strict=True):
        assert {exchange.dialog for exchange in after} == before - {"d0"}  # each stays where it was


def test_train_ranker_learns_what_dialogs_can_teach(engine: Engine) -> None:
    names = taught(engine)
    assert not {"similarity", "prompt_overlap", "weight", "own_voice", "same_mood"}.intersection(names)
    assert {"reply_similarity", "reply_overlap", "query.emotion.anger", "reply.intent.stop"} <= set(names)
    assert not any(name.startswith(("query.quick", "reply.followup")) for name in names)


def test_train_ranker_serves_where_it_was_trained(tiny: Made, trained: Trained, tmp_path: Path) -> None:
    bundle = lifecycle.add(tiny.bundle, trained.folder, tmp_path / "bundle")
    engine = loading.load(bundle)
    assert engine.ranker.spec.kind == "trees"
    assert bundle.component("ranker", "chat").requires == {"vectorizer": engine.vectorizer.fingerprint}


def test_train_ranker_is_refused_on_another_vectorizer(
    tiny: Made, stranger: Made, trained: Trained, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="vectorizer") as refused:
        lifecycle.add(stranger.bundle, trained.folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists(), refused.value
    moved = loading.load(stranger.bundle)
    with pytest.raises(EngineRefused, match="ranker: found trained on vectorizer .* train it again"):
        loading.checked_ranker(Ranker.load(trained.folder), moved.fleet, moved.vectorizer)


def test_train_ranker_is_refused_without_the_heads_it_reads(engine: Engine) -> None:
    known, unknown = (Ranker.linear({f"query.intent.{label}": 1.0}) for label in ("stop", "dance"))
    loading.checked_ranker(known, engine.fleet, engine.vectorizer)  # the control
    with pytest.raises(EngineRefused, match="ranker: found feature 'query.intent.dance'"):
        loading.checked_ranker(unknown, engine.fleet, engine.vectorizer)
    with pytest.raises(EngineRefused, match="ranker: found feature 'query.intent.stop'"):
        loading.checked_ranker(known, engine.fleet.without("intent"), engine.vectorizer)


def test_train_ranker_needs_its_canaries(trained: Trained, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained.folder, tmp_path / "ranker.chat"))
    part(folder)  # the control
    (folder / CANARIES).unlink()
    with pytest.raises(ValueError, match=f"found no {CANARIES}"):
        part(folder)


def test_train_ranker_replaces_a_ranker_and_nothing_else(
    tmp_path: Path, engine: Engine, dialogs: Path
) -> None:
    (tmp_path / "ranker.chat").mkdir()
    with pytest.raises(ValueError, match="found what is no ranker"):
        trained_in(tmp_path, engine, dialogs)
    Ranker.linear().save(tmp_path / "ranker.chat")
    trained_in(tmp_path, engine, dialogs, limit=250, candidates=5)
    assert Ranker.load(tmp_path / "ranker.chat").spec.kind == "trees"


def test_train_ranker_refuses_too_little_before_anything_is_encoded(tmp_path: Path, engine: Engine) -> None:
    few = write_dialogs(tmp_path / "few.jsonl", 4)
    with pytest.raises(ValueError, match="expected at least 2 of each; give more dialogs"):
        trained_in(tmp_path, engine, few)
    some = write_dialogs(tmp_path / "some.jsonl", 40)
    with pytest.raises(ValueError, match="give more dialogs, or fewer candidates"):
        trained_in(tmp_path, engine, some, candidates=200)
    (tmp_path / "broken.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DialogsInvalid, match="broken.jsonl:1"):
        trained_in(tmp_path, engine, tmp_path / "broken.jsonl")
    assert not (tmp_path / "vectors").exists()
    assert not (tmp_path / "ranker.chat").exists()


def test_train_ranker_divide_needs_some_of_each() -> None:
    with pytest.raises(ValueError, match="dialogs: found"):
        divide([Exchange("d", ("hi",), "ho", "Ho")])
