"""What is cut out of a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the train extra: pip install 'chorus-nlu[train]'")

import torch
import transformers

from nlu.training import network, student
from nlu.training.network import Network
from tests.nlu.training.bert import LETTERS, make_bert

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

PHRASES = [
    f"{verb} the {noun}" for verb in ("open", "close", "paint") for noun in ("door", "box", "gate", "car")
] * 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Network:
    """Four layers, and a vocabulary with some words of its own."""
    folder = make_bert(tmp_path_factory.mktemp("bert"), layers=4)
    words = ["the", "open", "zebra", "door", "##or", "quartz"]
    encoder = transformers.BertModel.from_pretrained(str(folder))
    vocabulary = (folder / "vocab.txt").read_text().split("\n") + words
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(1)
    encoder.resize_token_embeddings(len(vocabulary))
    encoder.save_pretrained(str(folder))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(str(folder))
    return network.load(folder)


def cut(teacher: Network, **options: object) -> Network:
    arguments = {"layers": (0, 1, 2, 3)} | options
    return student.cut(teacher, PHRASES, teacher.encode(PHRASES), **arguments).eval()  # type: ignore[arg-type]


def test_student_with_everything_is_its_teacher(teacher: Network) -> None:
    same = cut(teacher)
    assert torch.allclose(same.encode(PHRASES), teacher.encode(PHRASES), atol=1e-6)
    assert same.graph.encoder is not teacher.graph.encoder


def test_student_begins_as_the_layers_it_was_given(teacher: Network) -> None:
    made = cut(teacher, layers=(0, 3))
    ours, theirs = made.graph.encoder.encoder.layer, teacher.graph.encoder.encoder.layer
    assert len(ours) == made.graph.encoder.config.num_hidden_layers == 2
    assert torch.equal(ours[1].output.dense.weight, theirs[3].output.dense.weight)
    assert len(theirs) == 4


def test_student_keeps_the_neurons_that_write_most(teacher: Network) -> None:
    import copy

    quiet = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in quiet.graph.encoder.encoder.layer:
            layer.output.dense.weight[:, ::2] = 0.0  # every other neuron writes nothing
    made = cut(quiet, neurons=32)
    assert made.graph.encoder.config.intermediate_size == 32
    # So leaving those out changes nothing.
    assert torch.allclose(made.encode(PHRASES), quiet.encode(PHRASES), atol=1e-5)
    assert not torch.allclose(cut(teacher, neurons=32).encode(PHRASES), teacher.encode(PHRASES), atol=1e-5)


def test_student_spells_the_words_it_lost(teacher: Network) -> None:
    everything = len(teacher.tokenizer.get_vocab())
    made = cut(teacher, vocabulary=everything - 3)
    # `the`, `open` and `door` occur; `##or`, `zebra` and `quartz` do not.
    assert made.tokenizer.tokenize("open the door") == ["open", "the", "door"]
    assert teacher.tokenizer.tokenize("zebra") == ["zebra"]
    assert made.tokenizer.tokenize("zebra") == ["z", "##e", "##b", "##r", "##a"]
    # Phrases whose words are all left are encoded as before, through other numbers.
    assert torch.allclose(made.encode(PHRASES), teacher.encode(PHRASES), atol=1e-6)
    assert made.graph.encoder.config.vocab_size == everything - 3


def test_student_survives_being_saved(teacher: Network, tmp_path: Path) -> None:
    made = cut(teacher, layers=(0, 2), neurons=40, vocabulary=len(LETTERS) * 2 + 8, dim=8)
    made.save(tmp_path / "student")
    again = network.load(tmp_path / "student")
    assert torch.allclose(again.encode(PHRASES), made.encode(PHRASES), atol=1e-6)
    assert again.tokenizer.tokenize("zebra") == made.tokenizer.tokenize("zebra")
    assert again.dim == 8


def test_student_compresses_by_principal_components(teacher: Network) -> None:
    made = cut(teacher, dim=12)
    vectors = teacher.encode(PHRASES)
    _, _, directions = torch.linalg.svd(vectors, full_matrices=False)  # another way to the same axes
    wanted = torch.nn.functional.normalize(vectors @ directions[:12].T, dim=1)
    found = made.encode(PHRASES)
    assert torch.allclose(found @ found.T, wanted @ wanted.T, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0, 4)}, r"distill.layers: found \[0, 4\], expected rising numbers from 0 to 3"),
        ({"layers": (2, 1)}, "distill.layers"),
        ({"neurons": 65}, "distill.neurons: found 65, but the teacher has 64"),
        ({"vocabulary": 20}, "distill.vocabulary: found 20, but single characters alone take"),
        ({"vocabulary": 500}, "distill.vocabulary: found 500, but the teacher has"),
        ({"dim": 33}, "model.dim: found 33"),
    ],
)
def test_student_of_more_than_there_is_is_refused(
    teacher: Network, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cut(teacher, **options)
