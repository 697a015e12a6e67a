"""The stage of raw text: what is hidden and named, over all ranks, and a run that begins with it, stops in it and goes on."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the train extra: pip install 'chorus-nlu[train]'")

import torch
import transformers
from torch import Tensor, nn

from nlu.training import config as configs
from nlu.training import loop, mlm, network, train
from nlu.training.config import Config, ConfigInvalid, Model
from nlu.training.data import read_data, read_raw
from nlu.training.distributed import Alone, World
from nlu.training.loop import Event, Interrupted, Learner, Trained
from nlu.training.mlm import HEAD, SHOWN, Cloze, Gaps
from nlu.training.sampler import Sampler
from nlu.vectorizer import Vectorizer, fingerprint

pytestmark = [
    pytest.mark.train,
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore"),  # torch's and transformers' own deprecations
]

ROOT = Path(__file__).parents[3]
ROOMS = "kitchen hall bath attic cellar garden porch garage study lounge".split()
SAID = [
    (f"turn on the {room} light", f"{word} light in the {room} is on")
    for room in ROOMS
    for word in ("the", "a")
]
PHRASES = [text for pair in SAID for text in pair]


def made(base: Path) -> Learner:
    """A network that names hidden words, without dropout."""
    torch.manual_seed(1)
    model = Model(base=str(base), max_tokens=48, dropout=0.0)
    return mlm.with_head(Learner(network.make(model), (), uncertainty=False))


def cloze(*, mask: float = 0.15, held: Sequence[str] = (), world: World | None = None) -> Cloze:
    return Cloze(mask, tuple(held), world or Alone())


def gaps_of(work: loop.Work) -> list[Gaps]:
    (column,) = work.columns
    return [chunk for chunk in column if isinstance(chunk, Gaps)]


# --- what is hidden


def test_mlm_hides_a_share_of_the_words_as_bert_did(bert: Path) -> None:
    encoder = made(bert).network
    tokens = encoder.tokenise(PHRASES * 20)
    torch.manual_seed(5)
    (gaps,) = gaps_of(cloze().work([], [tokens], [], encoder))
    real = tokens.words != network.NO_WORD
    hidden = gaps.hidden != SHOWN
    assert not (hidden & ~real).any()  # no padding, no special token
    assert torch.equal(gaps.hidden[hidden], tokens.ids[hidden])
    assert torch.equal(gaps.ids[~hidden], tokens.ids[~hidden])
    count = int(hidden.sum())
    assert count / int(real.sum()) == pytest.approx(0.15, abs=0.01)
    masked = int((gaps.ids[hidden] == encoder.tokenizer.mask_token_id).sum())
    kept = int((gaps.ids[hidden] == tokens.ids[hidden]).sum())
    assert masked / count == pytest.approx(0.8, abs=0.03)
    assert kept / count == pytest.approx(0.1, abs=0.03)


def test_mlm_what_is_hidden_comes_from_the_random_state_of_the_step(bert: Path) -> None:
    encoder = made(bert).network
    tokens = encoder.tokenise(PHRASES)
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        (gaps,) = gaps_of(cloze().work([], [tokens], [], encoder))
        found.append(gaps)
    assert torch.equal(found[0].ids, found[1].ids) and torch.equal(found[0].hidden, found[1].hidden)
    assert not torch.equal(found[0].hidden, found[2].hidden)


# --- what is named


def test_mlm_loss_is_that_of_the_family_of_the_base(bert: Path) -> None:
    """Naming the hidden words alone gives what transformers computes over all of them."""
    encoder = made(bert).network
    theirs = transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(str(bert)))
    theirs.bert.load_state_dict(encoder.graph.encoder.state_dict(), strict=False)
    theirs.cls.load_state_dict(encoder.get_submodule(HEAD).state_dict())
    theirs.train(False)
    torch.manual_seed(5)
    work = cloze().work([], [encoder.tokenise(PHRASES[:5]), encoder.tokenise(PHRASES[5:9])], [], encoder)
    gaps = gaps_of(work)
    outcome = work.loss([torch.cat([work.encode(chunk) for chunk in gaps])])
    total = count = 0.0
    for chunk in gaps:
        answer = theirs(input_ids=chunk.ids, attention_mask=chunk.mask, labels=chunk.hidden)
        here = int((chunk.hidden != SHOWN).sum())
        total, count = total + float(answer.loss) * here, count + here
    assert float(outcome.loss) == pytest.approx(total / count, rel=1e-5)


def test_mlm_the_last_layer_is_the_word_vectors(bert: Path) -> None:
    encoder = made(bert).network
    words = encoder.graph.encoder.get_input_embeddings().weight
    decoders = [each for each in encoder.get_submodule(HEAD).modules() if isinstance(each, nn.Linear)]
    assert decoders[-1].weight is words
    torch.manual_seed(5)
    work = cloze(mask=0.5).work([], [encoder.tokenise(["turn it on"])], [], encoder)
    work.loss([work.encode(gaps_of(work)[0])]).loss.backward()  # type: ignore[no-untyped-call]
    seen = set(gaps_of(work)[0].ids.flatten().tolist())
    unseen = [i for i in range(len(words)) if i not in seen]
    assert (
        words.grad is not None and (words.grad[unseen].abs().sum(dim=1) > 0).all()
    )  # also words not in the text


def test_mlm_the_base_brings_its_own_head_where_it_has_one(bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(str(bert)))
    theirs.save_pretrained(str(tmp_path))
    transformers.AutoTokenizer.from_pretrained(str(bert)).save_pretrained(str(tmp_path))
    found = made(tmp_path).network.get_submodule(HEAD).state_dict()
    assert all(torch.equal(found[name], value) for name, value in theirs.cls.state_dict().items())
    fresh = made(bert).network.get_submodule(HEAD).state_dict()
    assert not torch.equal(
        fresh["predictions.transform.dense.weight"], found["predictions.transform.dense.weight"]
    )


def test_mlm_refuses_a_base_without_a_mask_token(bert: Path) -> None:
    learner = Learner(network.make(Model(base=str(bert), max_tokens=48)), (), uncertainty=False)
    learner.network.tokenizer.mask_token = None
    with pytest.raises(ValueError, match="without a token to hide others behind"):
        mlm.with_head(learner)


def test_mlm_refuses_a_family_whose_head_is_in_parts(bert: Path, tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(vocab_size=91, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    transformers.DistilBertModel(config).save_pretrained(str(tmp_path))
    transformers.AutoTokenizer.from_pretrained(str(bert)).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"DistilBertForMaskedLM with a head of \d parts, expected one"):
        made(tmp_path)


# --- how good


def test_mlm_perplexity_of_a_blind_guess_is_the_size_of_the_vocabulary(bert: Path) -> None:
    encoder = made(bert).network
    for parameter in encoder.get_submodule(HEAD).parameters():
        if parameter.ndim == 1:  # the norm and the bias: every word is as likely as any
            nn.init.zeros_(parameter)
    measure, value = cloze(held=PHRASES).measure(encoder, batch=16)
    vocabulary = len(encoder.graph.encoder.get_input_embeddings().weight)
    assert measure == "perplexity"
    assert value == pytest.approx(vocabulary, rel=1e-4)


def test_mlm_perplexity_is_of_the_same_words_each_time_and_disturbs_nothing(bert: Path) -> None:
    encoder = made(bert).network.train()
    lesson = cloze(held=PHRASES)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first = lesson.measure(encoder, batch=16)
    assert torch.equal(torch.get_rng_state(), before)
    assert encoder.training
    torch.manual_seed(10)
    assert lesson.measure(encoder, batch=16) == first


# --- over ranks


@dataclass(frozen=True, slots=True)
class OneOfTwo(Alone):
    """A rank whose neighbour hides `theirs` words."""

    size: int = 2
    theirs: int = 0

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Numbers of both."""
        return torch.cat([tensor, torch.tensor([float(self.theirs)])])


def gradients(encoder: network.Network, work: loop.Work) -> dict[str, Tensor]:
    encoder.zero_grad()
    work.loss([torch.cat([work.encode(chunk) for chunk in gaps_of(work)])]).loss.backward()  # type: ignore[no-untyped-call]
    return {name: each.grad.clone() for name, each in encoder.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("counted", [True, False])
def test_mlm_two_ranks_learn_what_one_would_though_they_hide_different_numbers(
    bert: Path, counted: bool
) -> None:
    """Not `counted` is the control: a rank that knows of its own words alone counts each of them for more or less."""
    encoder = made(bert).network.eval()
    chunks = [encoder.tokenise(PHRASES[:3]), encoder.tokenise(PHRASES[3:12])]
    torch.manual_seed(5)
    whole = cloze().work([], chunks, [], encoder)
    counts = [int((gaps.hidden != SHOWN).sum()) for gaps in gaps_of(whole)]
    assert counts[0] != counts[1]
    torch.manual_seed(5)
    parts = [
        cloze(world=OneOfTwo(theirs=counts[1 - rank]) if counted else Alone()).work([], [chunk], [], encoder)
        for rank, chunk in enumerate(chunks)
    ]
    wanted, one, other = (gradients(encoder, work) for work in (whole, *parts))
    averaged = {name: (one[name] + other[name]) / 2 for name in wanted}
    close = [torch.allclose(averaged[name], wanted[name], atol=1e-7, rtol=1e-4) for name in wanted]
    assert all(close) == counted


# --- the steps

RAW = """
[run]
name = "m"
seed = 3
threads = 1
[model]
base = "bert"
max_tokens = 48
[mlm]
datasets = ["file:raw.tsv"]
steps = 12
batch = 8
learning_rate = 5e-3
head_learning_rate = 1e-2
warm_up = 3
[schedule]
steps = 6
log_every = 3
evaluate_every = 6
checkpoint_every = 5
[batch]
per_rank = 8
chunk = 3
[export]
precision = "fp32"
token_dim = 16
"""
TASK = """
[[task]]
name = "pairs"
kind = "pairs"
datasets = ["file:raw.tsv"]
loss = { name = "full_batch" }
"""


def plan(text: str = RAW) -> tuple[Config, configs.Mlm]:
    config = configs.parse(text)
    assert config.mlm is not None
    return config, config.mlm


class Stage:
    """All that the steps of the stage need, made anew from the same seed."""

    def __init__(self, bert: Path, *, seed: int = 0) -> None:
        config, about = plan()
        self.config = mlm.stage(config, about)
        self.data = [mlm.task_data(about, "raw", PHRASES[4:], PHRASES[:4], Alone())]
        torch.manual_seed(seed)
        model = self.config.model.model_copy(update={"base": str(bert)})
        self.learner = mlm.with_head(Learner(network.make(model), [self.data[0].task], uncertainty=False))
        self.optimizer = Alone().wrap_optimizer(
            loop.make_optimizer(self.learner, self.config.optimizer, ranks=1), max_norm=1.0
        )
        self.sampler = Sampler([self.data[0].pool], temperature=1.0, seed=3)

    def train(self, folder: Path, *, start: int = 0, stop: int = 0) -> list[Trained]:
        calls = iter(range(1, 100))
        steps = loop.train(
            self.learner,
            self.optimizer,
            self.data,
            self.config,
            Alone(),
            sampler=self.sampler,
            start=start,
            checkpoints=folder,
            stamp={},
            stopping=lambda: next(calls) == stop,
        )
        return [what for _, what in steps if isinstance(what, Trained)]

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.learner.state_dict().items()}


def test_mlm_stage_trains_the_whole_base_at_its_own_rates(bert: Path) -> None:
    config, about = plan(RAW.replace("[model]", '[model]\ndim = 8\nadaptation = { kind = "lora" }') + TASK)
    staged = mlm.stage(config, about)
    assert (staged.model.dim, staged.model.adaptation, staged.tasks) == (0, configs.Full(), ())
    assert staged.schedule.steps == 12
    kept, about = plan(RAW.replace("[export]", "[export]\nbase_share = 0.5"))
    assert mlm.stage(kept, about).export.base_share == 0.5  # there it is the end
    both, about = plan(RAW.replace("[export]", "[export]\nbase_share = 0.5") + TASK)
    assert mlm.stage(both, about).export.base_share == 0.0
    stage = Stage(bert)
    names = {id(each): name for name, each in stage.learner.named_parameters()}
    rates = {
        names[id(each)]: group["lr"] for group in stage.optimizer.param_groups for each in group["params"]
    }
    assert rates.keys() == set(names.values())
    assert {rate for name, rate in rates.items() if HEAD in name} == {1e-2}
    assert {rate for name, rate in rates.items() if HEAD not in name} == {5e-3}


def test_mlm_learns_and_resumes_to_the_same_bits(bert: Path, tmp_path: Path) -> None:
    whole = Stage(bert)
    before = loop.measure(whole.learner.network, whole.data[0])
    events = whole.train(tmp_path / "whole")
    after = loop.measure(whole.learner.network, whole.data[0])
    assert before is not None and after is not None
    assert after[1] < 0.5 * before[1]
    with pytest.raises(Interrupted, match="stopped after 7 steps"):
        Stage(bert).train(tmp_path / "stopped", stop=7)
    again = Stage(bert, seed=99)
    start = loop.resume(tmp_path / "stopped", again.learner, again.optimizer, again.sampler, {})
    rest = again.train(tmp_path / "stopped", start=start)
    assert [each.loss for each in rest] == [each.loss for each in events[7:]]
    assert all(torch.equal(again.weights()[name], value) for name, value in whole.weights().items())
    head = again.learner.network.get_submodule(HEAD)
    words = again.learner.network.graph.encoder.get_input_embeddings().weight
    assert words.data_ptr() in {each.data_ptr() for each in head.parameters()}  # also after loading


def test_mlm_data_needs_phrases_and_some_to_hold_back() -> None:
    with pytest.raises(ValueError, match="found 3 phrases of raw and 0 to hold back"):
        mlm.task_data(plan()[1], "raw", PHRASES[:3], (), Alone())


# --- the run


@pytest.fixture
def work(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base, raw text and configs."""
    (tmp_path / "bert").symlink_to(bert)
    (tmp_path / "raw.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in SAID))
    (tmp_path / "alone.toml").write_text(RAW)
    (tmp_path / "both.toml").write_text(RAW + TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def perplexities(folder: Path) -> list[float]:
    found = [row["evaluation"]["mlm/file:raw.tsv"] for row in rows_of(folder) if "evaluation" in row]
    assert all(measure == "perplexity" for measure, _ in found)
    return [value for _, value in found]


@pytest.mark.timeout(300)
def test_mlm_a_run_begins_with_raw_text_stops_in_it_and_goes_on(work: Path) -> None:
    seen: list[tuple[int, str]] = []
    runs: list[tuple[str, int]] = []

    def watch(step: int, what: Event) -> None:
        if isinstance(what, Trained):
            seen.append((step, what.task))
            if len(seen) == 7:
                os.kill(os.getpid(), signal.SIGTERM)

    def begun(name: str, config: configs.Config) -> train.Watch:
        runs.append((name, config.schedule.steps))
        return watch

    folder = work / "runs" / "m"
    with pytest.raises(Interrupted, match="stopped after 8 steps"):
        train.train(Path("both.toml"), begun=begun)
    assert (folder / "mlm" / "checkpoints" / "step-00000008").exists()
    assert not (folder / "mlm" / "model").exists() and not (folder / "vectorizer").exists()
    with pytest.raises(
        ValueError, match=r"mlm: found a run in it, expected none; go on from there with --resume"
    ):
        train.train(Path("both.toml"))

    finished = train.train(Path("both.toml"), resume=True, begun=begun)
    raw, tasks = ([step for step, task in seen if task == name] for name in ("mlm", "pairs"))
    assert raw == list(range(1, 13)) and tasks == list(range(1, 7))
    assert runs == [("mlm", 12), ("mlm", 12), ("m", 6)]

    # The tasks began with what raw text had left, not with the base.
    left = network.load(folder / "mlm" / "model")
    data = read_data(configs.load(Path("both.toml"))).tasks[0]
    first = next(row["evaluation"] for row in rows_of(folder) if row["step"] == 0)
    assert tuple(first["pairs/file:raw.tsv"]) == loop.measure(left, data)
    base = network.load(work / "bert")
    assert float((left.encode(PHRASES) * base.encode(PHRASES)).sum(dim=1).max()) < 0.999

    # It is told: before and after, here and there.
    values = perplexities(folder / "mlm")
    assert values[-1] < 0.5 * values[0]
    for path in (folder / "run.md", folder / "mlm" / "run.md"):
        row = next(line for line in path.read_text().splitlines() if "perplexity" in line)
        assert f"{values[0]:.3f} | {values[-1]:.3f} | {min(values):.3f}" in row
        assert "**status**: finished" in path.read_text()
    assert (folder / "mlm" / "plots" / "evaluation.png").exists()
    assert Vectorizer(finished.vectorizer).spec.provenance["datasets"] == ["file:raw.tsv"]

    # Done is done: going on does not read the text again.
    seen.clear()
    about = (work / "both.toml").read_text()
    (work / "both.toml").write_text(about.replace("[schedule]\nsteps = 6", "[schedule]\nsteps = 7"))
    train.train(Path("both.toml"), resume=True, begun=begun)
    assert seen == [(7, "pairs")]
    assert perplexities(folder / "mlm") == values


@pytest.mark.timeout(300)
def test_mlm_alone_ends_in_a_vectorizer_of_its_own(work: Path) -> None:
    seen: list[int] = []
    finished = train.train(
        Path("alone.toml"), begun=lambda name, config: lambda step, what: seen.append(step)
    )
    folder = work / "runs" / "m"
    assert finished.folder.resolve() == folder and finished.steps == 12 and max(seen) == 12
    assert not (folder / "mlm").exists()
    values = perplexities(folder)
    assert values[-1] < 0.5 * values[0]
    trained = network.load(folder / "model")
    assert not [name for name in trained.state_dict() if HEAD in name]
    served = [encoding.sentence for encoding in Vectorizer(finished.vectorizer).encode(PHRASES)]
    np.testing.assert_allclose(np.stack(served), trained.encode(PHRASES).numpy(), atol=1e-3)
    spec = Vectorizer(finished.vectorizer).spec
    assert spec.provenance["steps"] == 12 and spec.provenance["datasets"] == ["file:raw.tsv"]
    assert fingerprint(finished.vectorizer) in (folder / "run.md").read_text()


def test_mlm_reads_no_phrase_that_something_is_tested_on(work: Path) -> None:
    raw = work / "talk"
    raw.mkdir()
    lines = [f"{a}\t{b}\n" for a, b in SAID]
    (raw / "train.tsv").write_text("".join(lines))
    (raw / "test.tsv").write_text("".join(lines[:4]))
    other = work / "task"
    other.mkdir()
    (other / "train.tsv").write_text("".join(lines[10:]))
    (other / "test.tsv").write_text("".join(lines[4:6]))
    text = RAW.replace("file:raw.tsv", "file:talk") + TASK.replace("file:raw.tsv", "file:task")
    data = read_raw(configs.parse(text))
    (each,) = data.tasks
    said = {text for column in loop.texts_of((*each.examples, *each.held)) for text in column}
    tested = {text for pair in SAID[:6] for text in pair}
    assert said == set(PHRASES) - tested
    assert data.dropped == {"mlm/file:talk": len(tested)}
    assert each.held and not set(each.held) & set(each.examples)
    assert {Path(name).name for name in data.digests} == {"train.tsv", "test.tsv"}


@pytest.mark.parametrize("more", ["dim = 8", 'adaptation = { kind = "layernorm" }'])
def test_mlm_alone_trains_the_whole_base_or_is_refused(work: Path, more: str) -> None:
    path = work / "changed.toml"
    path.write_text(RAW.replace("[model]", f"[model]\n{more}"))
    with pytest.raises(ConfigInvalid, match="found a dim or an adaptation but no task"):
        train.settings(path)
    path.write_text(path.read_text() + TASK)
    assert train.settings(path).schedule.steps == 6


def test_mlm_steps_of_the_command_line_bound_both_parts(work: Path) -> None:
    both = train.settings(Path("both.toml"), 4)
    assert both.mlm is not None and (both.mlm.steps, both.schedule.steps) == (4, 4)
    more = train.settings(Path("both.toml"), 40)
    assert more.mlm is not None and (more.mlm.steps, more.schedule.steps) == (12, 40)
    assert train.settings(Path("alone.toml")).schedule.steps == 12


@pytest.mark.timeout(300)
@pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None,
    reason="needs horovod: pip install --no-deps $(deploy/horovod/build.sh)",
)
def test_mlm_two_ranks_begin_with_raw_text(work: Path) -> None:
    command = [str(Path(sys.executable).with_name("horovodrun")), "--gloo", "-np", "2", sys.executable]
    done = subprocess.run(
        [*command, "-m", "nlu", "vectorizer", "train", "both.toml"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = work / "runs" / "m"
    values = perplexities(folder / "mlm")
    assert values[-1] < 0.5 * values[0]
    assert "2 rank(s)" in (folder / "mlm" / "run.md").read_text()
    # Rank 0 alone read what the first part left; that it was everybody's shows in what the tasks began with.
    left = network.load(folder / "mlm" / "model")
    data = read_data(configs.load(Path("both.toml"))).tasks[0]
    first = next(row["evaluation"] for row in rows_of(folder) if row["step"] == 0)
    assert tuple(first["pairs/file:raw.tsv"]) == loop.measure(left, data)
    assert math.isfinite(rows_of(folder)[-1]["evaluation"]["pairs/file:raw.tsv"][1])
    assert Vectorizer(folder / "vectorizer").dim == 32
