"""A tiny but whole bundle, built in code in a second: real ONNX, real tokenizer, real heads, real float16 index.

The vectorizer averages a random vector per character piece, so it knows nothing, but it is a function of the whole
phrase, runs in microseconds, and two of them with different seeds disagree about everything.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from annotators import fit
from annotators.annotator import HeardTurn, Span
from annotators.answers import Answers
from annotators.fit import About
from annotators.fit_anchors import make_anchors
from annotators.fit_token import TaggedEncoding, fit_token
from annotators.head import GoldenTurn, Requires, Spec
from annotators.rules import RulesHead
from annotators.table import Head
from index.build import Entry
from index.build import build as build_index
from nlu import canaries, cold, parts
from nlu.normalizer import RULES_VERSION
from nlu.vectorizer import MODEL_FILE, SPEC_FILE, TOKENIZER_FILE, Vectorizer, VectorizerSpec
from statics.bundle import Bundle
from statics.bundle import build as build_bundle

DIM, TOKEN_DIM = 8, 4
CREATED = datetime(2026, 1, 1, tzinfo=UTC)

INTENTS = {
    "lights_on": (
        "lights on",
        "turn the lights on",
        "light please",
        "make it bright",
        "lamp on",
        "switch on the lamp",
    ),
    "music_play": ("play music", "play a song", "put on jazz", "some music", "sing", "music please"),
    "stop": ("stop", "stop it", "stop now", "stop that", "just stop", "stop stop"),
}
MOODS = {
    "anger": ("you annoy me", "i am so angry", "argh", "so annoying"),
    "neutral": ("hello", "what time", "lamp on", "ok"),
}
SLOTED = {
    "wake me at six": (("time", 11, 14),),
    "wake me at noon": (("time", 11, 15),),
    "meet anna at six": (("person", 5, 9), ("time", 13, 16)),
    "call anna": (("person", 5, 9),),
    "call boris": (("person", 5, 10),),
    "call me": (),
}
FOLLOW_UPS = (
    ("shall i turn it on", "yes", "lights_on"),
    ("turn the lamp on", "yes", "lights_on"),
    ("lamp on or off", "yes please", "lights_on"),
    ("play some jazz", "yes", "music_play"),
    ("shall i play music", "yes", "music_play"),
    ("music or silence", "yes please", "music_play"),
)
REPLIES = (
    Entry(id="hi.1", text="Hello.", prompt="hello"),
    Entry(id="hi.2", text="Hello, take your time.", prompt="hello", personas=("calm",)),
    Entry(id="hi.3", text="Hey hey!", prompt="hello", personas=("lively",)),
    Entry(
        id="sorry.1",
        text="I hear you. Let us slow down.",
        prompt="so annoying",
        personas=("calm",),
        emotion="anger",
    ),
    Entry(id="sorry.2", text="Oops, my bad!", prompt="so annoying", personas=("lively",), emotion="anger"),
    Entry(id="tv.1", text="Look at the screen.", prompt="what can i watch", surfaces=("tv",)),
    Entry(
        id="promo.1",
        text="Films are free until Sunday.",
        prompt="what can i watch",
        valid_from=datetime(2026, 6, 1, tzinfo=UTC),
        valid_until=datetime(2026, 6, 8, tzinfo=UTC),
    ),
)
PERSONAS, SURFACES = ("calm", "lively"), ("speaker", "tv")


@dataclass(frozen=True)
class Made:
    """Where a tiny bundle and the parts it was built from lie."""

    bundle: Bundle
    parts: Path


def make_vectorizer(folder: Path, *, seed: int = 0, dim: int = DIM, work: int = 0) -> Path:
    """A vectorizer folder; another seed is another vectorizer of the same shape. `work` products of 512 x 512 matrices
    make it slow and change nothing."""
    folder.mkdir(parents=True)
    characters = (
        string.ascii_lowercase + string.digits + string.punctuation + "абвгдеёжзийклмнопрстуфхцчшщъыьэюя"
    )
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *characters,
        *(f"##{character}" for character in characters),
    ]
    tokenizer = Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / TOKENIZER_FILE))
    onnx.save(_graph(len(pieces), seed, dim, work), str(folder / MODEL_FILE))
    spec = VectorizerSpec(
        name=f"tiny-{seed}", dim=dim, token_dim=TOKEN_DIM, pooling="mean", max_tokens=128, precision="fp32", uncased=True,
        normalizer=RULES_VERSION,
    )  # fmt: skip
    (folder / SPEC_FILE).write_text(spec.model_dump_json())
    return folder


def make_parts(folder: Path, *, seed: int = 0, dim: int = DIM, mark: str = "", work: int = 0) -> Path:
    """Every part of a bundle, as subfolders; `mark` begins every label and every reply's id and text."""
    vectorizer = Vectorizer(make_vectorizer(folder / "vectorizer.tiny", seed=seed, dim=dim, work=work))
    for head in _heads(vectorizer, mark):
        head.save(folder / f"head.{head.spec.name}")
    replies = [replace(entry, id=mark + entry.id, text=mark + entry.text) for entry in REPLIES]
    build_index(
        replies,
        _sentences(vectorizer, [entry.prompt for entry in replies]),
        folder / "index.chitchat",
        personas=PERSONAS,
        surfaces=SURFACES,
    )
    common = ["hello", "stop", "ok"]
    pairs = zip(common, vectorizer.encode(common), strict=True)
    cold.write(
        folder / "cold.phrases",
        pairs,
        fingerprint=vectorizer.fingerprint,
        dim=vectorizer.dim,
        token_dim=vectorizer.token_dim,
    )
    for part in folder.iterdir():
        if part.name != "vectorizer.tiny":
            canaries.write(part, vectorizer)
    return folder


def make_bundle(folder: Path, *, seed: int = 0, dim: int = DIM, seq: int = 1) -> Made:
    """Parts and bundle under one folder; the same arguments give the same bytes."""
    made = make_parts(folder / "parts", seed=seed, dim=dim)
    bundle = build_bundle(
        parts.collect(made),
        folder / "bundle",
        channel="test",
        seq=seq,
        created=CREATED,
        requires_service=">=0.1.0.dev0,<1",
    )
    return Made(bundle, made)


def _heads(vectorizer: Vectorizer, mark: str) -> list[Head]:
    def about(name: str) -> About:
        return About(name, name, vectorizer.fingerprint, made_by="tests")

    intents = [(text, mark + label) for label, texts in INTENTS.items() for text in texts]
    moods = [(text, mark + label) for label, texts in MOODS.items() for text in texts]
    spans = [
        TaggedEncoding(
            text,
            vectorizer.encode([text])[0],
            tuple(Span(mark + label, start, end, 1.0) for label, start, end in found),
        )
        for text, found in SLOTED.items()
    ]
    turns = [[HeardTurn("assistant", vectorizer.encode([before])[0])] for before, _, _ in FOLLOW_UPS]
    labels = (mark + "stop", mark + "clock")
    rules = [{"label": labels[0], "phrases": ["stop"]}, {"label": labels[1], "pattern": r"\d\d:\d\d"}]
    quick = Spec(
        name="quick", kind="rules", task="quick", labels=labels, scale=(1.0,) * 2, shift=(0.0,) * 2,
        thresholds=(1.0,) * 2, requires=Requires(vectorizer=vectorizer.fingerprint), params={"rules": rules},
    )  # fmt: skip
    return [
        _sentence(about("intent"), intents, vectorizer),
        _sentence(about("emotion"), moods, vectorizer),
        fit.fit_context(
            about("followup"),
            [said for _, said, _ in FOLLOW_UPS],
            vectorizer.encode([said for _, said, _ in FOLLOW_UPS]),
            turns,
            [[GoldenTurn(role="assistant", text=before)] for before, _, _ in FOLLOW_UPS],
            Answers.one([mark + label for _, _, label in FOLLOW_UPS]),
        ).head,
        fit_token(about("slots"), spans).head,
        make_anchors(
            about("topic"),
            ["hello", "play music"],
            _sentences(vectorizer, ["hello", "play music"]),
            Answers.one([mark + "greeting", mark + "music"], at_least=1),
        ),
        RulesHead(quick),
    ]


def _sentence(about: About, examples: list[tuple[str, str]], vectorizer: Vectorizer) -> Head:
    texts = [text for text, _ in examples]
    answers = Answers.one([label for _, label in examples])
    return fit.fit_sentence(about, texts, _sentences(vectorizer, texts), answers).head


def _sentences(vectorizer: Vectorizer, texts: list[str]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.stack([encoding.sentence for encoding in vectorizer.encode(texts)])


def _graph(pieces: int, seed: int, dim: int, work: int) -> onnx.ModelProto:
    """sentence = unit(mean over real pieces of table[id]); tokens = table[id, :TOKEN_DIM].

    The work is a chain of products that begins with the sum and comes back to it times 0, so that no optimiser removes it.
    """
    table = np.random.default_rng(seed).standard_normal((pieces, dim)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["pieces"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["pieces", "column"], ["real"]),
        helper.make_node("ReduceSum", ["real", "middle"], ["sum"], keepdims=0),
        *_work(work),
        helper.make_node("LpNormalization", ["worked" if work else "sum"], ["sentence"], axis=-1, p=2),
        helper.make_node("Slice", ["pieces", "zero", "width", "two"], ["tokens"]),
    ]
    constants = {"table": table, "last": [-1], "middle": [1], "zero": [0], "width": [TOKEN_DIM], "two": [2]}
    if work:
        square = np.random.default_rng(seed).standard_normal((512, 512)) / 512**0.5
        constants |= {"square": square.astype(np.float32), "nothing": np.zeros((), np.float32)}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "pieces"])
            for name in ("input_ids", "attention_mask")
        ],
        [
            helper.make_tensor_value_info("sentence", TensorProto.FLOAT, ["batch", dim]),
            helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["batch", "pieces", TOKEN_DIM]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def _work(count: int) -> list[onnx.NodeProto]:
    if not count:
        return []
    products = [helper.make_node("MatMul", [f"work{i}", "square"], [f"work{i + 1}"]) for i in range(count)]
    return [
        helper.make_node("ReduceMean", ["sum"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["square", "mean"], ["work0"]),
        *products,
        helper.make_node("ReduceMean", [f"work{count}"], ["worth"], keepdims=0),
        helper.make_node("Mul", ["worth", "nothing"], ["void"]),
        helper.make_node("Add", ["sum", "void"], ["worked"]),
    ]
