"""The single-process twin, and two real ranks of Horovod against it."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the train extra: pip install 'chorus-nlu[train]'")

import torch
from torch import nn

from nlu.training import config as configs
from nlu.training import distributed
from nlu.training.distributed import Alone, HorovodWorld, world, write_once
from tests.nlu.training import ranks
from tests.nlu.training.bert import make_bert

pytestmark = pytest.mark.train
needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None,
    reason="needs horovod: make horovod",
)
ROOT = Path(__file__).parents[3]
RANKS = 2


def test_distributed_alone_outside_horovodrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOROVOD_RANK", raising=False)
    assert world() == Alone(rank=0, size=1, local_rank=0)


def test_distributed_horovodrun_without_horovod_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    monkeypatch.setenv("HOROVOD_RANK", "0")
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"deploy/horovod/build\.sh"):
        world()


def test_distributed_a_horovod_that_does_not_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "horovod.torch", type(sys)("horovod.torch"))
    with pytest.raises(RuntimeError, match=f"does not load beside torch {torch.__version__.split('+')[0]}"):
        HorovodWorld()


def test_distributed_alone_is_a_world_of_one(tmp_path: Path) -> None:
    alone, rows = Alone(), torch.arange(6.0).reshape(3, 2).requires_grad_()
    everybody = alone.all_gather_with_grad(rows)
    (everybody * 2).sum().backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None
    assert (rows.grad == 2).all()
    assert torch.equal(alone.all_gather(rows), rows)
    assert not alone.all_gather(rows).requires_grad
    assert alone.gather_strings(("да", "no")) == ["да", "no"]
    assert alone.average({"loss": 0.5}) == {"loss": 0.5}
    write_once(alone, (tmp_path / "once").touch)
    assert (tmp_path / "once").exists()


def test_distributed_alone_clips_before_it_steps() -> None:
    parameter, idle = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    optimizer = Alone().wrap_optimizer(torch.optim.SGD([parameter, idle], lr=1.0), max_norm=1.0)
    parameter.grad = torch.tensor([30.0, 40.0])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.6, -0.8]))
    assert idle.grad is None


@pytest.mark.parametrize("limit", [1, 5, 6, 100])
def test_distributed_buckets_hold_all_in_order(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(distributed, "BUCKET_ELEMENTS", limit)
    kinds = [torch.float32, torch.float32, torch.float64, torch.float32, torch.float32]
    gradients = [torch.zeros(size, dtype=kind) for size, kind in zip((3, 2, 4, 9, 1), kinds, strict=True)]
    buckets = list(distributed._buckets(gradients))
    assert [id(each) for bucket in buckets for each in bucket] == [id(each) for each in gradients]
    for bucket in buckets:
        assert len({each.dtype for each in bucket}) == 1
        assert len(bucket) == 1 or sum(each.numel() for each in bucket) <= limit


HOROVODRUN = [str(Path(sys.executable).with_name("horovodrun")), "--gloo", "-np", str(RANKS), sys.executable]


def horovodrun(folder: Path, *mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HOROVODRUN, "-m", "tests.nlu.training.ranks", str(folder), *mode],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two real ranks says."""
    folder = tmp_path_factory.mktemp("ranks")
    run = horovodrun(folder)
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@needs_horovod
def test_distributed_ranks_know_who_they_are(answers: list[dict[str, Any]]) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // RANKS)
    assert [each["rank"] for each in answers] == [[0, 2, 0, threads], [1, 2, 1, threads]]


@needs_horovod
def test_distributed_gathered_rows_receive_the_sum_of_gradients(answers: list[dict[str, Any]]) -> None:
    rows = [[0.0] * 3] * 2 + [[10.0] * 3] * 2
    gradients = [
        [3.0 * (row + 1)] * 3 for row in range(4)
    ]  # the mean, as hvd.allgather gives it, would be half
    assert all(each["gathered"] == rows + gradients for each in answers)


@needs_horovod
def test_distributed_broadcast_makes_all_ranks_rank_0(answers: list[dict[str, Any]]) -> None:
    assert answers[0]["broadcast"] == answers[1]["broadcast"]
    assert answers[0]["broadcast"][-1] == 0.1
    weights, slots = 12 + 5 + 1, 3  # AdamW keeps two moments a weight, and a step a tensor
    assert len(answers[0]["broadcast"]) == weights + 1 + 2 * weights + slots + 1


@needs_horovod
@pytest.mark.parametrize(("compression", "relative"), [("none", 1e-6), ("fp16", 2**-9), ("bf16", 2**-6)])
def test_distributed_gradients_are_averaged(
    answers: list[dict[str, Any]], compression: str, relative: float
) -> None:
    mine, others = ([gradient.tolist() for gradient in ranks.own_gradients(rank)] for rank in range(RANKS))
    first, second, third, fourth = answers[0]["gradients"][compression]
    assert answers[1]["gradients"][compression] == [first, second, third, fourth]  # bit for bit
    known = [[(x + y) / 2 for x, y in zip(mine[i], others[i], strict=True)] for i in (0, 3)]
    assert first == pytest.approx(known[0], rel=relative, abs=relative)
    assert second == pytest.approx([x / 2 for x in mine[1]], rel=relative, abs=relative)
    assert third is None
    assert fourth == pytest.approx(known[1], rel=relative, abs=relative)


@needs_horovod
def test_distributed_gradients_of_all_types_are_averaged(answers: list[dict[str, Any]]) -> None:
    assert [each["types"] for each in answers] == [[True] * len(ranks.COMPRESSIONS)] * RANKS


@needs_horovod
def test_distributed_two_ranks_train_as_one(answers: list[dict[str, Any]]) -> None:
    assert answers[0]["trained"] == answers[1]["trained"]
    assert answers[0]["trained"] == pytest.approx(ranks.trained(Alone()), abs=1e-12)


@needs_horovod
def test_distributed_metrics_and_texts_of_all(answers: list[dict[str, Any]]) -> None:
    for each in answers:
        assert each["average"] == {"accuracy": 0.5, "loss": 1.5}
        assert each["strings"] == ["rank 0", "да", "rank 1"]
        assert math.isclose(each["after"]["loss"], 0.5)  # refusals leave the ranks in step


@needs_horovod
def test_distributed_disagreement_is_refused(answers: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(answers):
        assert f"found 5 rows in all, expected {2 * (2 + rank)}" in each["uneven"]
        assert f"found ['loss {rank}'] on rank {rank}" in each["different"]


@needs_horovod
def test_distributed_rank_0_alone_writes(answers: list[dict[str, Any]]) -> None:
    assert all(each["written"] == ["written-by-0"] for each in answers)


@needs_horovod
def test_distributed_a_run_publishes(tmp_path: Path) -> None:
    run = horovodrun(tmp_path, "publish")
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "published").exists()


@needs_horovod
def test_distributed_a_killed_rank_fails_the_run_and_publishes_nothing(tmp_path: Path) -> None:
    run = horovodrun(tmp_path, "kill")
    assert run.returncode != 0
    seen = {path.name for path in tmp_path.iterdir()}
    assert (
        {"step-0", "step-1"} <= seen <= {"step-0", "step-1", "step-2"}
    )  # it was training, and never published


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A folder with the tiny config and what it reads; it would train for hours, with a checkpoint every other step."""
    make_bert(tmp_path / "bert")
    (tmp_path / "data").mkdir()
    places = "kitchen bedroom hall garden cellar attic garage office porch lounge nursery study".split()
    rows = [(f"lights on in the {place}", f"make the {place} dark") for place in places]
    labelled = [f"{text}\t{label}\n" for row in rows for text, label in zip(row, ("on", "off"), strict=True)]
    (tmp_path / "data" / "intents.tsv").write_text("".join(labelled))
    (tmp_path / "data" / "paraphrases.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    text = (Path(inspect.getfile(configs)).parent / "configs" / "tiny.toml").read_text()
    config = configs.parse(text)
    schedule = {"steps": 10**6, "checkpoint_every": 2, "evaluate_every": 0}
    config = config.model_copy(update={"schedule": config.schedule.model_copy(update=schedule)})
    (tmp_path / "config.toml").write_text(configs.dump(config))
    return tmp_path


def processes(folder: Path) -> dict[int, bytes]:
    """Process id -> environment of what runs in a folder."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder.resolve():
                found[int(process.name)] = (process / "environ").read_bytes()
        except OSError:  # it has just ended, or is another user's
            continue
    return found


@needs_horovod
@pytest.mark.timeout(400)
def test_distributed_a_training_whose_rank_is_killed_goes_on_from_its_checkpoint(experiment: Path) -> None:
    train = [*HOROVODRUN, "-m", "nlu", "vectorizer", "train", "config.toml"]
    folder = experiment / "runs" / "tiny"
    with (
        (experiment / "output").open("w") as output,
        subprocess.Popen(train, cwd=experiment, stdout=output, stderr=output) as run,
    ):
        while not list((folder / "checkpoints").glob("step-*")):
            assert run.poll() is None, (experiment / "output").read_text()
            time.sleep(0.1)
        (rank_1,) = (
            number for number, said in processes(experiment).items() if b"\0HOROVOD_RANK=1\0" in said
        )
        os.kill(rank_1, signal.SIGKILL)
        assert run.wait(timeout=100) != 0
    while processes(
        experiment
    ):  # the other rank, too, for which horovodrun does not wait; the test's timeout does
        time.sleep(0.1)
    assert not (folder / "vectorizer").exists() and not (folder / "model").exists()

    saved = max(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))
    resumed = subprocess.run(
        [*train, "--resume", "--steps", str(saved + 2)],
        cwd=experiment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (folder / "vectorizer" / "model.onnx").exists()
    assert f"the first {saved} in an earlier process" in (folder / "run.md").read_text()
