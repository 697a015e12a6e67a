"""The steps: every kind of task learns, a stopped run goes on to the same bits, and what is broken stops."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the train extra: pip install 'chorus-nlu[train]'")

import torch
from torch import Tensor
from torch.optim import Optimizer

from nlu.public_data import Labelled, Tagged
from nlu.training import config as configs
from nlu.training import loop, network
from nlu.training.augment import Augmenter
from nlu.training.config import Config
from nlu.training.datasets import Example, Pair, Scored, identity
from nlu.training.distributed import Alone
from nlu.training.loop import Diverged, Interrupted, Learner, Saved, StepNoise, Trained
from nlu.training.sampler import Sampler

pytestmark = [
    pytest.mark.train,
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore"),  # torch's and transformers' own deprecations
]

ROOMS = "kitchen hall bath attic cellar garden porch garage study lounge".split()
ON = [f"{verb} on the {room} light" for verb in ("turn", "switch") for room in ROOMS]
OFF = [f"make it dark in the {room}{end}" for end in ("", " now") for room in ROOMS]

EXAMPLES: dict[str, tuple[Example, ...]] = {
    "labels": tuple(  # by room, not by what is to be done there
        Labelled(text, ("inside" if room in ROOMS[:5] else "outside",))
        for text in ON + OFF
        for room in ROOMS
        if room in text.split()
    ),
    "pairs": tuple(Pair(text, f"{text.split()[-2]} please", identity(text.split()[-2])) for text in ON),
    "similarity": tuple(
        Scored(a, b, score) for i, a in enumerate(ON) for b, score in ((ON[i - 1], 0.9), (OFF[i], 0.1))
    ),
    "classify": tuple(Labelled(text, (text.split()[0],)) for text in ON + OFF),
    "tags": tuple(
        Labelled(text, ("light", "room") if text in ON else ("room",) if "now" in text else ("dark",))
        for text in ON + OFF
    ),
    "tokens": tuple(
        Tagged(text, (("room", text.index(room), text.index(room) + len(room)),))
        for text in ON + OFF
        for room in ROOMS
        if room in text.split()
    ),
}
LOSSES = {
    "labels": '{ name = "supervised_contrastive", scale = 10.0 }\nlabels_per_batch = 2\nexamples_per_label = 6',
    "pairs": '{ name = "full_batch", scale = 10.0 }',
    "similarity": '{ name = "cosent", scale = 10.0 }',
    "classify": '{ name = "cross_entropy" }',
    "tags": '{ name = "binary_cross_entropy" }',
    "tokens": '{ name = "token_cross_entropy" }',
}


def experiment(*kinds: str, steps: int = 12, batch: str = "per_rank = 8", more: str = "") -> Config:
    """A config with one task a kind."""
    tasks = "".join(
        f'[[task]]\nname = "{kind}"\nkind = "{kind}"\ndatasets = ["file:{kind}"]\nloss = {LOSSES[kind]}\n'
        for kind in kinds
    )
    return configs.parse(
        f'[run]\nname = "t"\nseed = 3\n[model]\nbase = "bert"\n[batch]\n{batch}\n'
        "[optimizer]\nlearning_rate = 4e-3\nhead_learning_rate = 2e-2\nwarm_up = 4\nweight_decay = 0.01\n"
        f"[schedule]\nsteps = {steps}\ncheckpoint_every = 5\nkeep = 2\n{more}\n{tasks}"
    )


class Bench:
    """All that a run needs, made anew from the same seed."""

    def __init__(self, config: Config, bert: Path, *, seed: int = 0) -> None:
        self.config = config
        self.data = [
            loop.task_data(
                task,
                task.datasets[0],
                EXAMPLES[task.kind],
                EXAMPLES[task.kind][::3],
                batch=config.batch_of(task),
            )
            for task in config.tasks
        ]
        torch.manual_seed(seed)
        heads = [each.head for each in self.data if each.head is not None]
        model = config.model.model_copy(update={"base": str(bert), "max_tokens": 48})
        self.learner = Learner(
            network.make(model, heads), config.tasks, uncertainty=config.mix.weighting == "uncertainty"
        )
        self.optimizer: Optimizer = Alone().wrap_optimizer(
            loop.make_optimizer(self.learner, config.optimizer, ranks=1), max_norm=config.optimizer.clip
        )
        self.sampler = Sampler(
            [each.pool for each in self.data], temperature=config.mix.temperature, seed=config.run.seed
        )
        noisy = any(getattr(config.augment, kind).probability for kind in ("keyboard", "ocr", "recogniser"))
        self.augmenter = Augmenter(config.augment) if noisy else None
        self.stamp: dict[str, Any] = {"config": {"seed": config.run.seed}, "data": {"a.tsv": "00"}}

    def resume(self, folder: Path) -> int:
        return loop.resume(folder, self.learner, self.optimizer, self.sampler, self.stamp)

    def train(
        self, folder: Path, *, start: int = 0, stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, loop.Event]]:
        return loop.train(
            self.learner,
            self.optimizer,
            self.data,
            self.config,
            Alone(),
            sampler=self.sampler,
            augmenter=self.augmenter,
            start=start,
            checkpoints=folder,
            stamp=self.stamp,
            stopping=stopping,
        )

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.learner.state_dict().items()}


def run(bench: Bench, folder: Path, **options: Any) -> list[tuple[int, Trained]]:
    return [(step, what) for step, what in bench.train(folder, **options) if isinstance(what, Trained)]


# --- learning


FLOOR = {"labels": math.log(5)}  # of six of a label, the five others share the probability


@pytest.mark.parametrize("kind", EXAMPLES)
def test_loop_each_kind_of_task_learns(kind: str, bert: Path, tmp_path: Path) -> None:
    bench = Bench(experiment(kind, steps=40), bert)
    encoder, data = bench.learner.network, bench.data[0]
    before = loop.measure(encoder, data)
    events = [what for _, what in run(bench, tmp_path)]
    after = loop.measure(encoder, data)
    assert before is not None and after is not None
    assert after[1] >= 0.85
    assert (
        after[1] > before[1] or kind == "similarity"
    )  # which nearly knew: different words, different vectors
    losses = [event.loss - FLOOR.get(kind, 0.0) for event in events]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


@pytest.mark.parametrize("kind", EXAMPLES)
def test_loop_chunks_have_the_gradients_of_the_whole(kind: str, bert: Path) -> None:
    gradients = []
    for batch in ("per_rank = 8", "per_rank = 8\nchunk = 3"):
        bench = Bench(experiment(kind, batch=batch), bert)
        bench.learner.eval()  # dropout draws in another order
        data = bench.data[0]
        work = loop.prepare(
            data,
            bench.sampler.batch(0).rows.tolist(),
            bench.learner.network,
            loop.make_task_loss(data.task),
            Alone(),
            bench.config,
            noise=StepNoise(None, bench.config, 0),
        )
        rows = [len(chunk.ids) for column in work.columns for chunk in column]
        assert max(rows) == (3 if "chunk" in batch else work.phrases / len(work.columns))
        outcome = loop.backward(work, kind, bench.learner, recompute="chunk" in batch)
        found = {name: each.grad for name, each in bench.learner.named_parameters() if each.grad is not None}
        gradients.append(found | {"loss": outcome.loss})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)


def test_loop_trains_in_bf16_with_weights_in_float32(bert: Path, tmp_path: Path) -> None:
    config = experiment("pairs", "tokens", steps=30, batch="per_rank = 8\nchunk = 3")
    config = config.model_copy(update={"run": config.run.model_copy(update={"autocast": "bf16"})})
    bench = Bench(config, bert)
    events = [what for _, what in run(bench, tmp_path) if what.task == "pairs"]
    assert events[-1].loss < 0.5 * events[0].loss
    assert {value.dtype for value in bench.weights().values() if value.is_floating_point()} == {torch.float32}


def test_loop_reports_what_happened(bert: Path, tmp_path: Path) -> None:
    bench = Bench(experiment("pairs", "classify", steps=10), bert)
    seen = list(bench.train(tmp_path))
    assert [step for step, what in seen if isinstance(what, Trained)] == list(range(1, 11))
    assert [(step, what.path.name) for step, what in seen if isinstance(what, Saved)] == [
        (5, "step-00000005"),
        (10, "step-00000010"),
    ]
    for step, what in seen:
        if not isinstance(what, Trained):
            continue
        assert what.dataset == f"file:{what.task}"
        factor = loop.rate(step - 1, bench.config.optimizer, steps=10)
        assert what.learning_rate == pytest.approx(4e-3 * factor)
        if what.task == "pairs":  # twenty pairs, two of each reply: whoever shares one is no negative
            assert what.phrases == 16
            assert what.negatives is not None and 4 <= what.negatives <= 7
        else:
            assert (what.phrases, what.negatives) == (8, None)


def test_loop_uncertainty_starts_at_the_weights_of_the_config_and_learns(bert: Path, tmp_path: Path) -> None:
    config = experiment("pairs", "classify", steps=10, more='[mix]\nweighting = "uncertainty"')
    tasks = (config.tasks[0].model_copy(update={"weight": 0.5}), config.tasks[1])
    bench = Bench(config.model_copy(update={"tasks": tasks}), bert)
    assert bench.learner.weights() == pytest.approx({"pairs": 0.5, "classify": 1.0})
    run(bench, tmp_path)
    assert all(abs(weight - 1) > 1e-3 for weight in bench.learner.weights().values())


def test_loop_noise_is_of_step_and_row_alone() -> None:
    config = experiment("pairs", more="[augment.keyboard]\nprobability = 0.9\nrate = 0.3")
    noise = StepNoise(Augmenter(config.augment), config, step=4)
    columns = loop.texts_of(EXAMPLES["pairs"][:8])
    whole = noise.on(config.tasks[0], columns, range(8))
    assert whole[0] != columns[0]
    assert whole[1] == columns[1]  # the target stays clean
    halves = [
        noise.on(config.tasks[0], [column[rows] for column in columns], range(8)[rows])
        for rows in (slice(0, 4), slice(4, 8))
    ]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert StepNoise(noise.augmenter, config, step=5).on(config.tasks[0], columns, range(8)) != whole
    words = experiment("tokens").tasks[0]
    assert noise.on(words, columns[:1], range(8)) == columns[:1]  # its spans would move


# --- stopping and going on

ALL_KINDS = ("labels", "pairs", "tokens", "tags")
NOISY = '[mix]\nweighting = "uncertainty"\n[augment.keyboard]\nprobability = 0.5\nrate = 0.1'


def stopped_at(step: int, bench: Bench, folder: Path) -> None:
    """Train until told to stop while a step is under way."""
    calls = iter(range(1, 100))
    with pytest.raises(Interrupted, match=f"stopped after {step} steps.*--resume"):
        run(bench, folder, stopping=lambda: next(calls) == step)


def test_loop_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(bert: Path, tmp_path: Path) -> None:
    config = experiment(*ALL_KINDS, batch="per_rank = 8\nchunk = 3", more=NOISY)
    whole = Bench(config, bert)
    events = run(whole, tmp_path / "whole")
    assert {event.task for _, event in events} == set(ALL_KINDS)

    stopped_at(7, Bench(config, bert), tmp_path / "stopped")
    again = Bench(config, bert, seed=99)  # other weights and heads, until the checkpoint is loaded
    torch.manual_seed(1234)  # nor does it matter what was drawn before
    start = again.resume(tmp_path / "stopped")
    assert start == 7
    rest = run(again, tmp_path / "stopped", start=start)

    seen = [(step, event.task, event.loss, event.negatives) for step, event in events[7:]]
    assert [(step, event.task, event.loss, event.negatives) for step, event in rest] == seen
    for name, value in whole.weights().items():
        assert torch.equal(again.weights()[name], value), name
    one, other = whole.optimizer.state_dict()["state"], again.optimizer.state_dict()["state"]
    assert one.keys() == other.keys()
    for index, slots in one.items():
        assert all(torch.equal(value, other[index][slot]) for slot, value in slots.items())


def test_loop_without_the_optimizer_a_resumed_run_is_another(bert: Path, tmp_path: Path) -> None:
    """The control of the test above: it would see a checkpoint that forgets something."""
    config = experiment(*ALL_KINDS, more=NOISY)
    whole = Bench(config, bert)
    run(whole, tmp_path / "whole")
    stopped_at(7, Bench(config, bert), tmp_path / "stopped")
    again = Bench(config, bert)
    start = again.resume(tmp_path / "stopped")
    again.optimizer.state.clear()
    run(again, tmp_path / "stopped", start=start)
    assert any(not torch.equal(again.weights()[name], value) for name, value in whole.weights().items())


ADAPTATIONS = {
    "lora": 'kind = "lora"\nrank = 2',
    "layernorm": 'kind = "layernorm"',
    "prompt": 'kind = "prompt"\ntokens = 3',
    "p_tuning": 'kind = "prompt"\nmethod = "p_tuning"\ntokens = 3\nhidden = 8',
}
MARKS = {"lora": "lora_", "layernorm": "LayerNorm", "prompt": ".prompt.", "p_tuning": ".prompt."}


def adapting(name: str) -> Config:
    """A config with a task that has a head, and one that has none."""
    more = f"[model.adaptation]\n{ADAPTATIONS[name]}"
    return experiment("pairs", "classify", steps=8, batch="per_rank = 8\nchunk = 3", more=more)


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_loop_an_adaptation_changes_its_own_weights_and_heads_alone(
    name: str, bert: Path, tmp_path: Path
) -> None:
    bench = Bench(adapting(name), bert)
    before = bench.weights()
    events = [what for _, what in run(bench, tmp_path) if what.task == "pairs"]
    assert events[-1].loss < events[0].loss
    changed = {key for key, value in bench.weights().items() if not torch.equal(value, before[key])}
    encoder = {key for key in changed if key.startswith("network.graph.encoder.")}
    assert encoder == {key for key in before if MARKS[name] in key}
    assert changed - encoder == {"network.heads.0.weight", "network.heads.0.bias"}


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_loop_a_resumed_adaptation_has_the_bits_of_one_that_was_not_stopped(
    name: str, bert: Path, tmp_path: Path
) -> None:
    whole = Bench(adapting(name), bert)
    run(whole, tmp_path / "whole")
    stopped_at(4, Bench(adapting(name), bert), tmp_path / "stopped")
    again = Bench(adapting(name), bert, seed=99)
    run(again, tmp_path / "stopped", start=again.resume(tmp_path / "stopped"))
    assert all(torch.equal(again.weights()[key], value) for key, value in whole.weights().items())


def test_loop_checkpoints_are_whole_and_few(bert: Path, tmp_path: Path) -> None:
    (tmp_path / ".step-00000005.partial").mkdir()  # what a killed process leaves
    (tmp_path / ".step-00000005.partial" / "model.safetensors").write_text("half")
    run(Bench(experiment("pairs", steps=17), bert), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-00000017"]
    files = {path.name for path in (tmp_path / "step-00000017").iterdir()}
    assert files == {"model.safetensors", "optimizer.safetensors", "state.json"}  # nothing pickled


def test_loop_resume_without_a_checkpoint_begins(bert: Path, tmp_path: Path) -> None:
    assert Bench(experiment("pairs"), bert).resume(tmp_path / "nothing") == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda bench: bench.stamp["config"].update(seed=4), "another config seed,"),
        (lambda bench: bench.stamp["data"].update({"a.tsv": "01"}), "another data a.tsv,"),
        (
            lambda bench: setattr(
                bench, "sampler", Sampler([each.pool for each in bench.data], temperature=5.0, seed=8)
            ),
            "another the order of batches",
        ),
    ],
    ids=["config", "data", "order"],
)
def test_loop_resume_refuses_another_experiment(
    change: Callable[[Bench], object], words: str, bert: Path, tmp_path: Path
) -> None:
    config = experiment("pairs", "classify", steps=6)
    run(Bench(config, bert), tmp_path)
    bench = Bench(config, bert)
    change(bench)
    before = bench.weights()
    with pytest.raises(ValueError, match=words):
        bench.resume(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in bench.weights().items())


# --- what is broken


def test_loop_a_loss_that_is_no_number_stops_the_run(bert: Path, tmp_path: Path) -> None:
    bench = Bench(experiment("pairs"), bert)
    steps = bench.train(tmp_path)
    next(steps)
    with torch.no_grad():
        bench.learner.network.graph.encoder.embeddings.LayerNorm.weight[0] = math.nan
    before = bench.weights()
    with pytest.raises(
        Diverged, match=r"step 2, pairs/file:pairs: found a loss of nan, expected a number; train again"
    ):
        next(steps)
    assert all(
        torch.equal(value, before[name]) for name, value in bench.weights().items() if value.isfinite().all()
    )
    assert not list(tmp_path.iterdir())


def test_loop_weights_that_are_no_numbers_are_not_saved(bert: Path, tmp_path: Path) -> None:
    bench = Bench(experiment("pairs", "tags"), bert)
    with torch.no_grad():
        bench.learner.network.heads[0].bias[0] = math.inf  # type: ignore[operator]
    with pytest.raises(Diverged, match="found weights that are no numbers"):
        loop.save(tmp_path / "step-1", bench.learner, bench.optimizer, {"step": 1}, keep=1)
    assert not list(tmp_path.iterdir())


def test_loop_a_head_needs_two_labels() -> None:
    task = experiment("classify").tasks[0]
    with pytest.raises(ValueError, match=r"found 1 label\(s\) in mine, expected at least 2"):
        loop.task_data(task, "mine", [Labelled("a", ("x",))] * 3, (), batch=1)


# --- rows


def test_loop_out_of_scope_is_a_negative_for_all() -> None:
    task = experiment("labels").tasks[0]
    rows = [Labelled("a", ("x",)), Labelled("b", ("oos",)), Labelled("c", ("x",)), Labelled("d", ("y",))]
    data = loop.task_data(task, "mine", rows, [Labelled("e", ("x",)), Labelled("f", ("z",))], batch=4)
    assert data.pool.labels is not None
    assert [label < 0 for label in data.pool.labels.tolist()] == [False, True, False, False]
    assert data.held == (Labelled("e", ("x",)),)  # nobody was taught z
    assert data.head is None
    mined = configs.parse(
        '[run]\nname = "t"\n[schedule]\nsteps = 1\n[[task]]\nname = "t"\nkind = "labels"\ndatasets = ["file:x"]\n'
        'loss = { name = "batch_hard_triplet" }\nlabels_per_batch = 2\nexamples_per_label = 2'
    ).tasks[0]
    assert len(loop.task_data(mined, "mine", rows, (), batch=4).examples) == 3


def test_loop_heads_keep_the_names_of_labels() -> None:
    heads = {
        kind: loop.task_data(experiment(kind).tasks[0], "mine", EXAMPLES[kind], (), batch=4).head
        for kind in ("classify", "tags", "tokens", "pairs", "labels")
    }
    assert heads["classify"] == network.Head("classify/mine", "classify", ("make", "switch", "turn"))
    assert heads["tags"] == network.Head("tags/mine", "tags", ("dark", "light", "room"))
    assert heads["tokens"] == network.Head("tokens/mine", "tokens", ("O", "B-room", "I-room"))
    assert heads["pairs"] is None and heads["labels"] is None


# --- the optimizer


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.8536, 0.5, 0.1464]),
    ],
)
def test_loop_rate_warms_up_and_falls(decay: str, expected: Sequence[float]) -> None:
    config = configs.Optimizer.model_validate({"warm_up": 4, "decay": decay})
    found = [loop.rate(step, config, steps=8) for step in range(8)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_loop_optimizer_groups_have_the_rates_of_the_config(bert: Path) -> None:
    more = {"layer_decay": 0.5, "learning_rate": 0.1, "head_learning_rate": 0.7, "weight_decay": 0.3}
    config = experiment("classify", "pairs", more='[mix]\nweighting = "uncertainty"')
    config = config.model_copy(
        update={
            "optimizer": config.optimizer.model_copy(update=more),
            "model": config.model.model_copy(update={"dim": 8}),
        }
    )
    bench = Bench(config, bert)
    names = {id(each): name for name, each in bench.learner.named_parameters()}
    optimizer = loop.make_optimizer(bench.learner, config.optimizer, ranks=4)  # sqrt: twice the rate
    found = {
        names[id(each)].removeprefix("network.graph."): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for each in group["params"]
    }
    assert found.keys() == {name.removeprefix("network.graph.") for name in names.values()}
    assert found["encoder.encoder.layer.1.output.dense.weight"] == (0.2, 0.3)
    assert found["encoder.encoder.layer.1.output.dense.bias"] == (0.2, 0.0)
    assert found["encoder.encoder.layer.0.output.dense.weight"] == (0.1, 0.3)
    assert found["encoder.embeddings.word_embeddings.weight"] == (0.05, 0.3)
    assert found["dense.0.weight"] == found["network.heads.0.weight"] == (1.4, 0.3)
    assert found["uncertainty.log_variances.0"] == (1.4, 0.0)


def lamb(config: Config, **more: Any) -> Config:
    about = config.optimizer.model_copy(update={"name": "lamb", **more})
    return config.model_copy(update={"optimizer": about})


def test_loop_lamb_names_its_package(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    bench = Bench(experiment("pairs"), bert)
    with pytest.raises(ValueError, match="no module pytorch_optimizer, expected the 'train' extra"):
        loop.make_optimizer(bench.learner, lamb(bench.config).optimizer, ranks=1)


def test_loop_lamb_steps_as_its_paper_says(bert: Path) -> None:
    """A step of a matrix is as long as the matrix times the rate, decay and all; what is no matrix takes Adam's step."""
    config = lamb(experiment("pairs"), learning_rate=0.1, weight_decay=0.5, epsilon=1e-12)
    learner = Bench(config, bert).learner
    optimizer = loop.make_optimizer(learner, config.optimizer, ranks=1)
    layer = learner.network.graph.encoder.encoder.layer[0].output
    matrix, norm = layer.dense.weight, layer.LayerNorm.weight
    before = matrix.detach().clone()
    matrix.grad, norm.grad = torch.full_like(matrix, -3.0), torch.full_like(norm, 2.0)
    optimizer.step()
    adam = 0.1 / math.sqrt(
        0.001
    )  # a first gradient over its own root mean square, as the moments take them in
    wanted = 0.5 * before - adam
    step = 0.1 * wanted * before.norm() / wanted.norm()
    torch.testing.assert_close(matrix.detach(), before - step)
    assert float((matrix.detach() - before).norm()) == pytest.approx(0.1 * float(before.norm()), rel=1e-5)
    torch.testing.assert_close(norm.detach(), torch.full_like(norm, 1 - 0.1 * adam))


def test_loop_lamb_moves_what_starts_at_zero(bert: Path, tmp_path: Path) -> None:
    config = experiment("pairs", steps=6, more=f"[model.adaptation]\n{ADAPTATIONS['lora']}")
    bench = Bench(lamb(config, learning_rate=0.01), bert)
    run(bench, tmp_path)
    updates = [value for key, value in bench.weights().items() if "lora_B" in key]
    # Steps in proportion to their norm, which is that of the first step, would have left them below 0.01.
    assert updates and all(float(value.abs().mean()) > 0.05 for value in updates)


def test_loop_lamb_trains_and_resumes_to_the_same_bits(bert: Path, tmp_path: Path) -> None:
    config = lamb(experiment("pairs", steps=14), learning_rate=0.02)
    whole = Bench(config, bert)
    losses = [what.loss for _, what in run(whole, tmp_path / "whole")]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    stopped_at(6, Bench(config, bert), tmp_path / "stopped")
    again = Bench(config, bert, seed=99)
    run(again, tmp_path / "stopped", start=again.resume(tmp_path / "stopped"))
    assert all(torch.equal(again.weights()[key], value) for key, value in whole.weights().items())
