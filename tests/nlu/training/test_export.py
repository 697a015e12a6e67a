"""Export: any encoder becomes a vectorizer folder, and only if it says what torch says. On a small random BERT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="needs the train extra: pip install 'chorus-nlu[train]'")

import torch
import transformers

from nlu import content
from nlu.errors import VectorizerRefused
from nlu.training import export as export_module
from nlu.training.export import Gates, Precision, export
from nlu.training.rounding import WORD_BLOCK, steps_of_words
from nlu.vectorizer import MODEL_FILE, Vectorizer
from tests.nlu.training.bert import make_bert

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore"),  # torch's and transformers' own deprecations
]

PHRASES = content.load().phrases()[:600]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a two-layer BERT that nobody trained."""
    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789'?!.,-:"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(pieces),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
    )
    transformers.BertModel(config).save_pretrained(str(folder))
    return folder


def _torch_vectors(checkpoint: Path, phrases: list[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Mean-pooled unit vectors, the long way."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(checkpoint))
    model = transformers.AutoModel.from_pretrained(str(checkpoint)).eval()
    vectors = []
    with torch.inference_mode():
        for phrase in phrases:
            hidden = model(**tokenizer(phrase, return_tensors="pt")).last_hidden_state[0].mean(0)
            vectors.append((hidden / hidden.norm()).numpy())
    return np.stack(vectors)


def test_export_fp32_is_torch(checkpoint: Path, tmp_path: Path) -> None:
    parity = export(str(checkpoint), tmp_path / "out", precision="fp32", phrases=PHRASES, token_dim=16)
    assert parity.phrases >= 500
    assert parity.min_cosine >= 0.9999
    vectorizer = Vectorizer(tmp_path / "out")
    some = PHRASES[:20]
    found = np.stack([encoding.sentence for encoding in vectorizer.encode(some)])
    np.testing.assert_allclose(found, _torch_vectors(checkpoint, some), atol=1e-3)  # float16 rounding
    assert (vectorizer.dim, vectorizer.token_dim, vectorizer.spec.uncased) == (48, 16, True)


def test_export_words_of_four_bits_are_those_training_knew(tmp_path: Path) -> None:
    """Words that are multiples of their scales lose nothing, and take half the bytes; others lose something."""
    folder = make_bert(tmp_path / "bert")
    encoder = transformers.AutoModel.from_pretrained(str(folder))
    words = encoder.get_input_embeddings().weight
    gaps = {}
    for rounded in (False, True):
        if rounded:
            steps, scales = steps_of_words(words.detach())
            with torch.no_grad():
                words.copy_(steps * scales.float().repeat_interleave(WORD_BLOCK, dim=1))
            encoder.save_pretrained(str(folder))
        for bits in (4, 8):
            out = tmp_path / f"{rounded}-{bits}"
            gaps[rounded, bits] = (
                1
                - export(
                    *(str(folder), out), precision="int8", phrases=PHRASES, word_bits=bits, token_dim=16
                ).mean_cosine
            )
    assert gaps[True, 4] <= gaps[True, 8] * 1.05 and gaps[True, 4] < gaps[False, 4], gaps
    sizes = [(tmp_path / f"True-{bits}" / MODEL_FILE).stat().st_size for bits in (4, 8)]
    assert sizes[0] < sizes[1]
    graph = onnx.load(str(tmp_path / "True-4" / MODEL_FILE)).graph
    assert "GatherBlockQuantized" in {node.op_type for node in graph.node}


def test_export_words_of_four_bits_are_for_int8(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(VectorizerRefused, match="word_bits: found 4 in fp32, expected 8"):
        export(str(checkpoint), tmp_path / "out", precision="fp32", phrases=PHRASES, word_bits=4)


def test_export_words_of_four_bits_come_in_blocks(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(VectorizerRefused, match="word vectors of 48 components, expected a multiple of 32"):
        export(str(checkpoint), tmp_path / "out", precision="int8", phrases=PHRASES, word_bits=4)


def test_export_int8_is_close_to_torch_and_the_same_in_a_crowd(checkpoint: Path, tmp_path: Path) -> None:
    parity = export(str(checkpoint), tmp_path / "out", precision="int8", phrases=PHRASES, token_dim=16)
    assert parity.mean_cosine >= 0.985
    vectorizer = Vectorizer(tmp_path / "out")
    crowd = vectorizer.encode(PHRASES[:50])
    for phrase, encoding in zip(PHRASES[:50], crowd, strict=True):
        alone = vectorizer.encode([phrase])[0]
        assert alone.sentence.tobytes() == encoding.sentence.tobytes()
    fp32 = tmp_path / "fp32"
    export(str(checkpoint), fp32, precision="fp32", phrases=PHRASES, token_dim=16)
    assert Vectorizer(fp32).fingerprint != vectorizer.fingerprint


def test_export_int8_of_a_network_with_a_compressing_layer(checkpoint: Path, tmp_path: Path) -> None:
    """The student's shape: an encoder, mean pooling and a dense layer to fewer dimensions."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer

    encoder = Transformer(str(checkpoint))
    torch.manual_seed(1)
    modules = [encoder, Pooling(48, "mean"), Dense(48, 24, activation_function=torch.nn.Identity())]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "student"))
    parity = export(
        str(tmp_path / "student"), tmp_path / "out", precision="int8", phrases=PHRASES, token_dim=16
    )
    assert parity.mean_cosine >= 0.985
    assert Vectorizer(tmp_path / "out").dim == 24


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_export_says_nothing_of_the_machine(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    ours = str(Path(export_module.__file__).parent).encode()
    export(str(checkpoint), tmp_path / "clean", precision=precision, phrases=PHRASES)
    assert ours not in (tmp_path / "clean" / MODEL_FILE).read_bytes()
    # Left alone, the exporter does name the file that each node came from.
    monkeypatch.setattr(export_module, "forget_origins", lambda model: None)
    export(str(checkpoint), tmp_path / "noted", precision=precision, phrases=PHRASES)
    assert ours in (tmp_path / "noted" / MODEL_FILE).read_bytes()


def test_export_gate_refuses_what_is_not_close_enough(checkpoint: Path, tmp_path: Path) -> None:
    gates = Gates(int8_mean_cosine=0.999999)
    with pytest.raises(VectorizerRefused, match=r"found mean cosine \d\.\d+, expected >= 0.999999"):
        export(str(checkpoint), tmp_path / "out", precision="int8", phrases=PHRASES, gates=gates)
    assert not (tmp_path / "out").exists()


def test_export_asks_for_enough_phrases(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(VectorizerRefused, match="expected at least 500"):
        export(str(checkpoint), tmp_path / "out", precision="fp32", phrases=PHRASES[:100])


def test_export_names_what_it_cannot_load(tmp_path: Path) -> None:
    with pytest.raises(VectorizerRefused, match="no loadable encoder"):
        export(str(tmp_path / "nothing"), tmp_path / "out", precision="fp32", phrases=PHRASES)
