"""What a teacher says, against twins written out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the train extra: pip install 'chorus-nlu[train]'")

import torch

from nlu.training import network, student, teacher
from nlu.training.config import Stage
from nlu.training.network import Network
from nlu.training.teacher import Teaching, Vectors, read_vectors, similarity_loss, write_vectors
from tests.nlu.training.bert import make_bert

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

PHRASES = ("open the door", "paint", "close the box please", "a b c")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Network:
    return network.load(make_bert(tmp_path_factory.mktemp("bert"), layers=4))


def written(whole: Network, path: Path, **options: Any) -> Vectors:
    write_vectors(whole, PHRASES, path, **options)
    return read_vectors(path, whole.dim)


def lesson(
    whole: Network, tmp_path: Path, *, components: torch.Tensor | None = None, **weights: float
) -> Teaching:
    stage = Stage.model_validate({"name": "stage", "steps": 1, **weights})
    return Teaching(
        stage,
        written(whole, tmp_path / "vectors.f16"),
        components,
        (PHRASES, whole.encode(PHRASES)),
        network=whole,
        layers=(0, 1, 2, 3),
    )


def loss_of(teaching: Teaching, pupil: Network, phrases: tuple[str, ...] = PHRASES) -> torch.Tensor:
    order = [2, 0, 3, 1]
    chunks = [pupil.tokenise([phrases[i] for i in part]) for part in (order[:2], order[2:])]
    work = teaching.work(list(range(len(phrases))), chunks, order, pupil)
    return work.loss([torch.cat([work.encode(chunk) for chunk in column]) for column in work.columns]).loss


def test_teacher_vectors_are_those_of_the_network_in_their_order(whole: Network, tmp_path: Path) -> None:
    found = written(whole, tmp_path / "vectors.f16")
    assert np.allclose(found, whole.encode(PHRASES).numpy(), atol=1e-3)


def test_teacher_vectors_go_on_where_they_stopped(
    whole: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "BLOCK", 2)
    path = tmp_path / "vectors.f16"

    class Killed(Exception): ...

    def kill(done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        written(whole, path, done=kill)
    assert not path.exists()
    seen: list[tuple[int, int]] = []
    found = written(whole, path, done=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 4)]  # the first two were there
    assert np.allclose(found, whole.encode(PHRASES).numpy(), atol=1e-3)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["vectors.f16"]


def test_teacher_and_itself_agree(whole: Network, tmp_path: Path) -> None:
    for teaching in (
        lesson(whole, tmp_path, outputs=1.0),
        lesson(whole, tmp_path, similarities=1.0),
        lesson(whole, tmp_path, attention=1.0),
        lesson(whole, tmp_path, tokens=1.0),
    ):
        assert loss_of(teaching, whole).item() == pytest.approx(0.0, abs=1e-4)
    name, cosine = lesson(whole, tmp_path, outputs=1.0).measure(whole, batch=2)
    assert name == "cosine" and cosine == pytest.approx(1.0)


def test_teacher_of_outputs_is_the_squared_distance(whole: Network, tmp_path: Path) -> None:
    other = network.load(make_bert(tmp_path / "other", seed=5))
    gap = other.encode(PHRASES) - whole.encode(PHRASES)
    found = loss_of(lesson(whole, tmp_path, outputs=2.0), other)
    assert found.item() == pytest.approx(2.0 * float((gap * gap).sum()) / 4, rel=1e-2)


def test_teacher_of_fewer_dimensions_is_compressed(whole: Network, tmp_path: Path) -> None:
    pupil = student.cut(whole, PHRASES * 8, whole.encode(PHRASES * 8), layers=(0, 1, 2, 3), dim=4)
    components, _ = network.principal_components(whole.encode(PHRASES * 8), 4)
    assert loss_of(
        lesson(whole, tmp_path, components=components, outputs=1.0), pupil
    ).item() == pytest.approx(0.0, abs=1e-4)


def test_teacher_hears_the_clean_phrase(whole: Network, tmp_path: Path) -> None:
    noisy = ("opwn teh door", "paimt", "close the bxo please", "a b d")
    exact = loss_of(lesson(whole, tmp_path, outputs=1.0), whole)
    off = loss_of(lesson(whole, tmp_path, outputs=1.0), whole, noisy)
    gap = whole.encode(noisy) - whole.encode(PHRASES)
    assert exact.item() < off.item() == pytest.approx(float((gap * gap).sum()) / 4, rel=2e-2)


def test_teacher_of_attention_and_tokens_is_a_sum_over_real_tokens(whole: Network, tmp_path: Path) -> None:
    other = network.load(make_bert(tmp_path / "other", layers=4, seed=5))

    def inside(net: Network, phrase: str) -> Any:
        tokens = net.tokenise([phrase])
        with torch.no_grad():
            return net.graph.encoder(input_ids=tokens.ids, attention_mask=tokens.mask, output_attentions=True)

    attention = tokens = 0.0
    for phrase in PHRASES:  # alone, so without padding
        ours, theirs = inside(other, phrase), inside(whole, phrase)
        for a, b in zip(ours.attentions, theirs.attentions, strict=True):
            attention += float((a - b).pow(2).sum(-1).mean()) / 4 / len(PHRASES)
        gap = (ours.last_hidden_state - theirs.last_hidden_state).pow(2).mean(-1)
        tokens += float((gap / theirs.last_hidden_state.pow(2).mean(-1)).mean()) / len(PHRASES)
    assert loss_of(lesson(whole, tmp_path, attention=1.0), other).item() == pytest.approx(attention, rel=1e-3)
    assert loss_of(lesson(whole, tmp_path, tokens=3.0), other).item() == pytest.approx(3 * tokens, rel=1e-3)


def test_teacher_layers_are_those_before_the_next_kept_one(whole: Network, tmp_path: Path) -> None:
    teaching = lesson(whole, tmp_path, attention=1.0)
    for layers, taught in (((0, 2, 5), [1, 4, -1]), ((3,), [-1]), ((0, 1), [0, -1])):
        of = Teaching(teaching.stage, teaching.vectors, None, teaching.held, layers=layers)
        assert [of._taught_by(i) for i in range(len(layers))] == taught


def test_teacher_of_similarities_is_a_divergence_of_softmaxes() -> None:
    generator = torch.Generator().manual_seed(0)
    found, wanted = (
        torch.nn.functional.normalize(torch.randn(5, 3, generator=generator), dim=1) for _ in range(2)
    )
    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        ours = [math.exp(float(found[i] @ found[j]) / 0.1) for j in others]
        theirs = [math.exp(float(wanted[i] @ wanted[j]) / 0.1) for j in others]
        for a, b in zip(ours, theirs, strict=True):
            p, q = b / sum(theirs), a / sum(ours)
            total += p * math.log(p / q)
    assert similarity_loss(found, wanted, 0.1).item() == pytest.approx(total / 5, rel=1e-4)
    assert similarity_loss(wanted, wanted, 0.1).item() == pytest.approx(0.0, abs=1e-6)
