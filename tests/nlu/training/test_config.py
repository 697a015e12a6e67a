"""nlu.training.config: one TOML is one experiment; what it does not know it refuses by name, and a dump hides nothing."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlu.training import config, datasets
from nlu.training.config import Config, ConfigInvalid

EXAMPLE = Path(inspect.getfile(config)).parent / "configs" / "multitask.toml"

SMALL = """
[run]
name = "small"
[schedule]
steps = 10
[[task]]
name = "intents"
kind = "labels"
datasets = ["clinc150"]
loss = {name = "supervised_contrastive"}
labels_per_batch = 4
examples_per_label = 2
"""


def with_task(text: str, head: str = "") -> str:
    return f'[run]\nname = "x"\n{head}\n[schedule]\nsteps = 1\n[[task]]\nname = "t"\n{text}'


def test_config_load_reads_the_shipped_example() -> None:
    loaded = config.load(EXAMPLE)
    assert loaded.run.ship
    assert len(loaded.tasks) >= 10
    sources = loaded.sources().values()
    assert all(source.may_ship for source in sources)
    assert {language for source in sources for language in source.languages} == {"en", "ru"}
    assert "banking77" not in {source.folder for source in sources}
    assert {task.kind for task in loaded.tasks} >= {"pairs", "labels", "classify", "tags", "tokens"}
    head = EXAMPLE.read_text(encoding="utf-8").partition("[run]")[0]
    assert "nlu vectorizer train" in head and "hardware:" in head and "score:" in head


@pytest.mark.parametrize("path", sorted(EXAMPLE.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_config_load_reads_every_shipped_config(path: Path) -> None:
    loaded = config.load(path)
    head = path.read_text(encoding="utf-8").partition("[run]")[0]
    assert all(word in head for word in ("launch:", "hardware:", "score:"))
    assert path.name in head  # the launch command names this very file
    assert loaded.run.ship or all(name.startswith(datasets.OWN) for name in _datasets(loaded))


def _datasets(loaded: Config) -> list[str]:
    """What it is trained on, whether the files are here or not."""
    named = [task.datasets for task in loaded.tasks]
    named += [part.datasets for part in (loaded.mlm, loaded.distill) if part]
    return [name for names in named for name in names]


def test_config_shipped_adaptations_are_one_each() -> None:
    kinds = {
        name: config.load(EXAMPLE.with_name(f"{name}.toml")).model.adaptation
        for name in ("lora", "layernorm", "prompt", "mlm")
    }
    assert isinstance(kinds["lora"], config.Lora) and isinstance(kinds["layernorm"], config.LayerNorm)
    assert isinstance(kinds["prompt"], config.Prompt) and kinds["prompt"].method == "p_tuning"
    assert kinds["mlm"] == config.Full() and config.load(EXAMPLE.with_name("mlm.toml")).mlm


@pytest.mark.parametrize("text", [SMALL, EXAMPLE.read_text(encoding="utf-8")], ids=["small", "example"])
def test_config_dump_gives_the_same_config_back(text: str) -> None:
    loaded = config.parse(text)
    assert config.parse(config.dump(loaded)) == loaded
    assert config.dump(config.parse(config.dump(loaded))) == config.dump(loaded)


def test_config_dump_writes_every_value_in_force() -> None:
    dumped = tomllib.loads(config.dump(config.parse(SMALL)))
    assert dumped["optimizer"]["learning_rate"] == 2e-5
    assert dumped["model"]["adaptation"] == {"kind": "full", "freeze": 0}
    assert dumped["task"][0]["loss"] == {"name": "supervised_contrastive", "scale": 20.0}
    assert set(dumped["augment"]) == {
        field.alias or name for name, field in config.Augment.model_fields.items()
    }
    missing = {field.alias or name for name, field in Config.model_fields.items()} - set(dumped)
    assert missing == {"mlm", "distill"}  # steps that are not taken


FULL = (
    SMALL.replace('name = "small"', 'name = "small"\nseed = 3')
    + """
[task.rename]
"with blank" = "b"
plain = ""
[model]
dim = 300
adaptation = {kind = "lora", rank = 4, targets = ["query"]}
[mlm]
datasets = ["self_dialogue.replies"]
[distill]
teacher = "runs/teacher"
layers = [0, 2, 5]
datasets = ["clinc150"]
[[distill.stage]]
name = "outputs"
steps = 100
outputs = 1.0
[[distill.stage]]
name = "soft"
steps = 100
similarities = 1.0
int8 = true
"""
)


def test_config_dump_keeps_optional_sections_and_odd_keys() -> None:
    loaded = config.parse(FULL)
    assert loaded.distill is not None and [stage.name for stage in loaded.distill.stages] == [
        "outputs",
        "soft",
    ]
    assert loaded.tasks[0].rename == {"with blank": "b", "plain": ""}
    assert isinstance(loaded.model.adaptation, config.Lora)
    assert config.parse(config.dump(loaded)) == loaded


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.floats(min_value=1e-12, max_value=1e12),
)
def test_config_dump_survives_any_text_and_number(teacher: str, rate: float) -> None:
    loaded = config.parse(FULL)
    assert loaded.distill is not None
    changed = loaded.model_copy(
        update={
            "distill": loaded.distill.model_copy(update={"teacher": teacher}),
            "optimizer": config.Optimizer(learning_rate=rate),
        }
    )
    assert config.parse(config.dump(changed)) == changed


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("steps = 10", "stepz = 10", "schedule.stepz: found an unknown key"),
        ("steps = 10", "step = 10", "did you mean 'steps'"),
        ("steps = 10", "", "schedule.steps: found nothing"),
        ("steps = 10", "steps = 0", "schedule.steps: found 0"),
        ('"supervised_contrastive"}', '"supervised_contrastive", scle = 1}', "task[0].loss.scle"),
        ('"supervised_contrastive"', '"sup"', "task[0].loss: found"),
        ("examples_per_label = 2", "", "needs 2 labels and 2 examples"),
        ("labels_per_batch = 4\nexamples_per_label = 2", "", "labels_per_batch and examples_per_label"),
        ("examples_per_label = 2", "examples_per_label = 1", "2 examples of each"),
        ("examples_per_label = 2", "examples_per_label = 2\nbatch = 8", "leave batch out"),
        ('"labels"', '"classify"', "is not for kind 'classify'"),
        ('["clinc150"]', '["clinc15"]', "nearest: clinc150"),
        ('["clinc150"]', '["snips.slots"]', "gives tagged, not labelled"),
        ('["clinc150"]', '["clinc150"]\nsplit = "trian"', "expected one of train, dev, test"),
        ('name = "small"', 'name = "Not a name"', "run.name"),
        ("[schedule]", "[surprise]\nkey = 1\n[schedule]", "surprise: found an unknown key"),
        ("[schedule]", "[schedule", "expected TOML"),
    ],
)
def test_config_refuses_and_names_file_and_key(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in SMALL
    path = tmp_path / "wrong.toml"
    path.write_text(SMALL.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigInvalid) as caught:
        config.load(path)
    assert said in str(caught.value)
    assert all(line.startswith(str(path)) for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SMALL + SMALL[SMALL.index("[[task]]") :], "two tasks are called 'intents'"),
        (SMALL.replace('name = "small"', 'name = "small"\nship = true').replace("clinc150", "mcid"), "may not train weights that ship"),
        (SMALL + '[evaluate]\nheld_out = ["clinc150"]', "held out"),
        (SMALL + '[evaluate]\nheld_out = ["nothing"]', "found 'nothing'"),
        (SMALL + "[augment]\nmisspelling = {probability = 0.1}", "misspelling needs a set"),
        (SMALL + "[mlm]\ndatasets = [\"nothing\"]", "found 'nothing'"),
        (with_task('kind = "similarity"\ndatasets = ["stsb.en"]\nloss = {name = "cosent"}'), "for evaluation only"),
        (with_task('kind = "pairs"\ndatasets = ["sgd.replies"]\nloss = {name = "full_batch"}\nrename = {a = "b"}'), "rename is for labels"),
        ('[run]\nname = "x"\n[schedule]\nsteps = 1', "nothing to train"),
        (FULL.replace("outputs = 1.0", ""), "learn nothing"),
    ],
)  # fmt: skip
def test_config_refuses_what_does_not_fit_together(text: str, said: str) -> None:
    with pytest.raises(ConfigInvalid, match=said):
        config.parse(text)


def test_config_held_out_folder_covers_its_views() -> None:
    text = SMALL.replace("clinc150", "snips.intents") + '[evaluate]\nheld_out = ["snips"]'
    with pytest.raises(ConfigInvalid, match="held out"):
        config.parse(text)


def test_config_reports_every_complaint_at_once() -> None:
    text = SMALL.replace("steps = 10", "steps = 0").replace('name = "small"', 'name = "small"\nsedd = 1')
    with pytest.raises(ConfigInvalid) as caught:
        config.parse(text)
    assert len(str(caught.value).splitlines()) == 2


def test_config_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"nowhere\.toml"):
        config.load(tmp_path / "nowhere.toml")


def test_config_own_files_are_looked_at_only_when_used(tmp_path: Path) -> None:
    loaded = config.parse(SMALL.replace("clinc150", f"file:{tmp_path.as_posix()}/mine"))
    with pytest.raises(FileNotFoundError, match="mine"):
        loaded.sources()
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.tsv").write_text("turn it on\tlight_on\n", encoding="utf-8")
    (source,) = loaded.sources().values()
    assert source.form is datasets.Form.LABELLED and source.may_ship


@pytest.mark.parametrize(
    ("settings", "batch"),
    [("", 128), ("batch = 16", 16)],
)
def test_config_batch_of_a_plain_task(settings: str, batch: int) -> None:
    loaded = config.parse(
        with_task(f'kind = "pairs"\ndatasets = ["sgd.replies"]\nloss = {{name = "full_batch"}}\n{settings}')
    )
    assert loaded.batch_of(loaded.tasks[0]) == batch


def test_config_batch_of_a_task_by_label() -> None:
    loaded = config.parse(SMALL)
    assert loaded.batch_of(loaded.tasks[0]) == 8


def test_config_every_kind_has_losses_and_a_form() -> None:
    assert {*config.FORMS, "lesson"} == set(config.LOSSES)


def test_config_is_frozen() -> None:
    loaded = config.parse(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        loaded.run.seed = 1  # type: ignore[misc]


@pytest.mark.train
def test_config_losses_have_the_options_of_the_real_ones() -> None:
    pytest.importorskip("torch", reason="the losses need the train extra")
    losses = pytest.importorskip("nlu.training.losses", reason="the losses are not there")
    for names in config.LOSSES.values():
        for name in names:
            if name == "binary_cross_entropy" and name not in losses.RECIPES:
                continue  # a head's own loss, made where heads are
            text = SMALL.replace('"supervised_contrastive"', f'"{name}"')
            kind = next(kind for kind, known in config.LOSSES.items() if name in known)
            if kind != "labels":
                text = with_task(f'kind = "{kind}"\ndatasets = ["file:x"]\nloss = {{name = "{name}"}}')
            loss = config.parse(text).tasks[0].loss
            inspect.signature(losses.RECIPES[name].make).bind(**loss.model_dump(exclude={"name"}))


def test_config_and_its_neighbours_need_no_torch() -> None:
    code = (
        "import sys; from nlu.training import augment, config, datasets, sampler; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["multitask", "student"])
def test_config_of_shipped_weights_names_sets_that_notice_names(name: str) -> None:
    loaded = config.load(EXAMPLE.with_name(f"{name}.toml"))
    folders = {source.folder for source in loaded.sources().values()}
    assert loaded.run.ship
    notice = set(re.split(r"[^a-z0-9_]+", (EXAMPLE.parents[3] / "NOTICE").read_text()))
    assert not folders - notice
    assert "hint3" not in notice  # a set that no config trains on
