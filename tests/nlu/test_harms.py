"""A bundle whose parts are wrong, with digests, canaries and fingerprints made to fit: what is behind them must tell.

Wrong bytes under an old digest are refused by statics (tests/nlu/test_loading.py); an index by itself is harmed in
tests/index/harms.py. Run as a program (`python -O -m tests.nlu.test_harms FOLDER`) it shows that no refusal is an assert.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from annotators.boosted import BoostedHead
from annotators.trees import to_onnx
from index.build import build as build_index
from nlu import canaries, loading, parts
from nlu.errors import EngineRefused
from nlu.ranker import Ranker
from nlu.vectorizer import Vectorizer
from statics.bundle import Bundle, build
from statics.verify import verify
from tests.annotators.clouds import cloud
from tests.annotators.toys import make_spec
from tests.index import harms as index_harms
from tests.index.tampering import seal
from tests.tiny import CREATED, DIM, PERSONAS, SURFACES, Made, make_bundle

Harm = Callable[[Path], None]  # done to a folder of parts
Graph = onnx.GraphProto
VECTORIZER = "vectorizer.tiny"


# What is done to a vectorizer; whatever was made with it would be refused first, so it is bundled alone.


def regraphed(change: Callable[[Graph], object]) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / VECTORIZER / "model.onnx"
        model = onnx.load(path)
        change(model.graph)
        onnx.save(model, str(path))

    return harm


def renamed(old: str, new: str) -> Harm:
    """An input or output, everywhere it is named."""

    def change(graph: Graph) -> None:
        for value in (*graph.input, *graph.output):
            value.name = new if value.name == old else value.name
        for node in graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]

    return regraphed(change)


def wrapped(output: str, *nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT, **held: object) -> Harm:
    """These nodes make the output, out of what it was before, `inner`."""

    def change(graph: Graph) -> None:
        next(node for node in graph.node if node.output[0] == output).output[0] = "inner"
        graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()
        )
        graph.node.extend(nodes)
        next(value for value in graph.output if value.name == output).type.tensor_type.elem_type = kind

    return regraphed(change)


def spec(part: str, file: str, **fields: object) -> Harm:
    """Fields of a part's JSON."""

    def harm(folder: Path) -> None:
        path = folder / part / file
        path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))

    return harm


def content(part: str, file: str, change: Callable[[bytes], bytes]) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / part / file
        path.write_bytes(change(path.read_bytes()))

    return harm


def other_ids(tokenizer: bytes) -> bytes:
    """Ids beyond the table that the model looks words up in."""
    fields = json.loads(tokenizer)
    fields["model"]["vocab"] = {piece: i + 9 * (i > 9) for piece, i in fields["model"]["vocab"].items()}
    return json.dumps(fields).encode()


def node(kind: str, *inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, [*inputs], [output], **attributes)


NAN, MANY = np.float32("nan"), np.int64(9)
VECTORIZERS: dict[str, tuple[Harm, str]] = {
    "another input": (renamed("input_ids", "ids"), r"a graph with inputs \['attention_mask', 'ids'\]"),
    "another output": (renamed("sentence", "pooled"), r"outputs \['pooled', 'tokens'\]"),
    "an output more": (regraphed(lambda graph: graph.output.append(graph.input[0])), "a graph with inputs"),
    "another dim": (spec(VECTORIZER, "vectorizer.json", dim=16), "vectors 8 and 4 wide, expected 16 and 4"),
    "another token_dim": (spec(VECTORIZER, "vectorizer.json", token_dim=5), "8 and 4 wide, expected 8 and 5"),
    "double precision": (
        wrapped("sentence", node("Cast", "inner", output="sentence", to=TensorProto.DOUBLE), kind=TensorProto.DOUBLE),
        r"'sentence': 'tensor\(double\)'",
    ),
    "half precision": (
        wrapped("tokens", node("Cast", "inner", output="tokens", to=TensorProto.FLOAT16), kind=TensorProto.FLOAT16),
        r"'tokens': 'tensor\(float16\)'",
    ),
    "NaN sentences": (wrapped("sentence", node("Mul", "inner", "by", output="sentence"), by=NAN), "not finite"),
    "NaN tokens": (wrapped("tokens", node("Mul", "inner", "by", output="tokens"), by=NAN), "not finite"),
    "infinite tokens": (wrapped("tokens", node("Div", "inner", "by", output="tokens"), by=np.float32(0)), "not finite|does not run"),
    "zero sentences": (wrapped("sentence", node("Mul", "inner", "by", output="sentence"), by=np.float32(0)), "unit length"),
    "NaN for long phrases": (
        wrapped(
            "tokens", node("Shape", "input_ids", output="size", start=1), node("Greater", "size", "most", output="long"),
            node("Where", "long", "by", "one", output="factor"), node("Mul", "inner", "factor", output="tokens"),
            most=np.array([30]), by=NAN, one=np.float32(1),
        ),
        "vectors of \"remind me .*that are not finite",
    ),
    "a model of no bytes": (content(VECTORIZER, "model.onnx", lambda raw: b""), "0 nodes"),
    "a model cut": (content(VECTORIZER, "model.onnx", lambda raw: raw[: len(raw) // 2]), "cut or garbage"),
    "a model that is a zip": (content(VECTORIZER, "model.onnx", lambda raw: b"PK\x03\x04"), "cut or garbage"),
    "a model with data elsewhere": (
        regraphed(lambda graph: graph.initializer[0].external_data.add(key="location", value="/etc/hostname")), "external_data",
    ),
    "a tokenizer cut": (content(VECTORIZER, "tokenizer.json", lambda raw: raw[:-9]), "tokenizer.json does not load"),
    "a tokenizer of other ids": (content(VECTORIZER, "tokenizer.json", other_ids), "does not run"),
}  # fmt: skip


# What is done to one part of a whole bundle.


def weights(part: str, **changed: Callable[[NDArray[Any]], NDArray[Any]]) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / part / "weights.safetensors"
        tensors = load_file(path)
        for name, change in changed.items():
            tensors[name] = np.ascontiguousarray(change(tensors[name]))
        save_file(tensors, path)

    return harm


def label_more(part: str) -> Harm:
    """One label more than the weights have rows."""

    def harm(folder: Path) -> None:
        head = json.loads((folder / part / "head.json").read_bytes())
        fields = {name: [*head[name], head[name][0]] for name in ("scale", "shift", "thresholds")}
        spec(part, "head.json", labels=[*head["labels"], "another"], **fields)(folder)

    return harm


def label_twice(part: str) -> Harm:
    def harm(folder: Path) -> None:
        labels = json.loads((folder / part / "head.json").read_bytes())["labels"]
        spec(part, "head.json", labels=[labels[0], labels[0], *labels[2:]])(folder)

    return harm


def golden(part: str, **fields: object) -> Harm:
    def harm(folder: Path) -> None:
        head = json.loads((folder / part / "head.json").read_bytes())
        spec(part, "head.json", golden=[head["golden"][0] | fields])(folder)

    return harm


def boosted(labels: int) -> Harm:
    """A head of trees for three labels, under a list of so many."""

    def harm(folder: Path) -> None:
        from annotators.answers import Answers
        from annotators.learners import BoostedLearner

        said = cloud(0.4, per_label=25)
        learnt = next(BoostedLearner(seed=0).path(said.vectors, Answers.one(said.firsts), (20,)))
        requires = {"vectorizer": Vectorizer(folder / VECTORIZER).fingerprint}
        names = [f"l{i}" for i in range(labels)]
        model = to_onnx(learnt, said.vectors.shape[1])
        head = BoostedHead(make_spec(names, kind="boosted", name="trees"), model, None, DIM)
        head.save(folder / "head.trees")
        spec("head.trees", "head.json", requires=requires)(folder)
        shutil.copy(folder / "head.intent" / canaries.FILE, folder / "head.trees")

    return harm


def ranked(**fields: object) -> Harm:
    """A ranker by hand."""

    def harm(folder: Path) -> None:
        Ranker.linear({"similarity": 1.0}).save(folder / "ranker.main")
        spec("ranker.main", "ranker.json", **fields)(folder)

    return harm


def routed(text: str, *, encoding: str = "utf-8") -> Harm:
    def harm(folder: Path) -> None:
        (folder / "routes.main").mkdir()
        (folder / "routes.main" / "routes.toml").write_bytes(text.encode(encoding))

    return harm


def indexed(name: str) -> Harm:
    """One of the harms to an index, its own digests made to fit."""

    def harm(folder: Path) -> None:
        index_harms.HARMS[name][0](folder / "index.chitchat")
        seal(folder / "index.chitchat")

    return harm


def whole_index(folder: Path) -> None:
    """The index that those harms are written for, in place of the tiny one."""
    shutil.rmtree(folder / "index.chitchat")
    index_harms.make_whole(folder / "index.chitchat")
    shutil.copy(folder / "head.intent" / canaries.FILE, folder / "index.chitchat")


def canary(change: Callable[[NDArray[Any]], NDArray[Any]]) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / "head.intent" / canaries.FILE
        with safe_open(path, "numpy") as file:
            metadata, vectors = file.metadata(), file.get_tensor("vectors")
        save_file({"vectors": np.ascontiguousarray(change(vectors))}, path, metadata=metadata)

    return harm


def array(file: str, dtype: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Harm:
    """The numbers of a file of the cold table."""
    return content("cold.phrases", file, lambda raw: change(np.frombuffer(raw, dtype).copy()).tobytes())


ROUTE = '[[route]]\nname = "a"\nto = "skill"\n{when}\n[[route]]\nname = "rest"\nto = "chitchat"\n'
GOOD_ROUTE = ROUTE.format(when='when.head.intent.label = ["stop"]')
DEEP = "[" * 200_000
PARTS: dict[str, tuple[Harm, str]] = {
    **{f"a label more in {part}": (label_more(f"head.{part}"), f"head {part}: found .*, expected") for part in ("intent", "followup", "slots", "topic")},
    **{f"a label twice in {part}": (label_twice(f"head.{part}"), "labels must be distinct") for part in ("intent", "emotion")},
    "a label more in trees": (boosted(4), r"found probabilities of shape \(2, 3\), expected \(2, 4\)"),
    "a head wider than vectors": (weights("head.intent", weight=lambda w: np.repeat(w, 2, axis=1)), "head intent: found dim 16, expected dim 8"),
    "a slot head wider than tokens": (weights("head.slots", weight=lambda w: np.repeat(w, 3, axis=1)), "head slots: found"),
    "NaN in a bias": (weights("head.intent", bias=lambda b: b * NAN), "NaN"),
    "infinity in weights": (weights("head.followup", weight=lambda w: np.full_like(w, np.inf)), "NaN|infinit"),
    "rows of a head turned": (weights("head.intent", weight=lambda w: w[::-1]), "head intent: found .* answered with"),
    "a golden phrase of no label": (golden("head.intent", label="never"), "answered with .*, expected never"),
    "a head of another name": (spec("head.intent", "head.json", name="other"), "a head named other, expected intent"),
    "a head of no kind": (spec("head.intent", "head.json", kind="pickle"), "found kind 'pickle'"),
    "a rule for no label": (spec("head.quick", "head.json", params={"rules": [{"label": "never", "phrases": ["x"]}]}), "a rule for label 'never'"),
    "a pattern that is none": (spec("head.quick", "head.json", params={"rules": [{"label": "stop", "pattern": "("}]}), "expected a regular expression"),
    "a rule's phrase twice": (
        spec("head.quick", "head.json", params={"rules": [{"label": "stop", "phrases": ["x"]}, {"label": "clock", "phrases": ["x"]}]}),
        "under two labels",
    ),
    "a byte order mark": (content("head.intent", "head.json", lambda raw: b"\xef\xbb\xbf" + raw), "Invalid JSON|unreadable"),
    "text that is no UTF-8": (content("head.intent", "head.json", lambda raw: raw.replace(b"stop", b"st\xffp")), "head intent: found"),
    "JSON without an end": (content("head.intent", "head.json", lambda raw: DEEP.encode()), "head intent: found RecursionError"),
    "NaN in JSON": (content("head.intent", "head.json", lambda raw: raw.replace(b'"metrics": {', b'"metrics": {"x": NaN, ')), "head intent: found"),
    "canaries of NaN": (canary(lambda vectors: vectors * np.float16("nan")), "head intent: found canaries that moved"),
    "fewer canaries": (canary(lambda vectors: vectors[:9]), r"head intent: found canary vectors of shape \(9, 8\)"),
    "a ranker by a label of no head": (ranked(weights={"label:never=x": 1.0}), "ranker: found"),
    "a ranker by a feature that is none": (ranked(weights={"charm": 1.0}), "ranker: found"),
    "a ranker of infinity": (ranked(weights={"similarity": 1e999}), "ranker: found"),
    "a ranker of no kind": (ranked(kind="joblib"), "ranker: found"),
    "trees without a model": (ranked(kind="trees", weights={}, features=["similarity"], requires={"vectorizer": "0" * 64}), "ranker: found"),
    "a route by a head that is not there": (routed(ROUTE.format(when='when.head.never.label = ["x"]')), "never"),
    "a route by a label that is not there": (routed(ROUTE.format(when='when.head.intent.label = ["never"]')), "never"),
    "a route for a persona that is not there": (routed(ROUTE.format(when='when.reply.persona = ["never"]')), "never"),
    "routes that are no table": (routed("[[route]]\nname = \n"), "line 2"),
    "routes with a byte order mark": (routed("\ufeff" + GOOD_ROUTE), "line 1"),
    "a cold table of fewer phrases": (spec("cold.phrases", "cold.json", phrases=2), "cold cache: found keys.bin of"),
    "a cold table of another vectorizer": (spec("cold.phrases", "cold.json", vectorizer="0" * 64), "cold cache: found made by"),
    "a cold table of other width": (spec("cold.phrases", "cold.json", dim=9), "cold cache: found"),
    "cold records out of order": (array("ends.bin", "<u8", lambda ends: ends[[1, 0, 2]]), "cold cache: found records out of order"),
    "cold records beyond the file": (array("ends.bin", "<u8", lambda ends: ends * 2), "cold cache: found records.bin of"),
}  # fmt: skip
INDEXES = (
    "a shard truncated", "a shard unlisted", "a shard twice", "narrower", "NaN", "infinity", "zero", "more rows", "no vectors",
    "an id of two texts", "items cut", "a link out of range", "a path",
)  # fmt: skip


def bundled(folder: Path, out: Path) -> Bundle:
    """A bundle of these parts, built as the honest one was, and verified as a pulled one is."""
    build(parts.collect(folder), out, created=CREATED, requires_service=">=0.1.0.dev0")
    return verify(out, service="0.1.0")


def harmed(whole: Path, out: Path, *harms: Harm, kinds: Iterable[str] = ()) -> Bundle:
    """A bundle of a copy of the parts, harmed; only of parts of these kinds, where any is named."""
    copy = out / "parts"
    shutil.copytree(whole, copy)
    for part in [*copy.iterdir()] if kinds else []:
        if part.name.partition(".")[0] not in kinds:
            shutil.rmtree(part)
    for harm in harms:
        harm(copy)
    return bundled(copy, out / "bundle")


ALL = {
    **{f"vectorizer: {name}": ((harm,), found, ("vectorizer",)) for name, (harm, found) in VECTORIZERS.items()},
    **{f"part: {name}": ((harm,), found, ()) for name, (harm, found) in PARTS.items()},
    **{f"index: {name}": ((whole_index, indexed(name)), "index chitchat: found", ("vectorizer", "head", "index")) for name in INDEXES},
}  # fmt: skip


WIDE = [
    name for name in ALL if name.startswith("index: ")
]  # of vectors as wide as those harms are written for


def refusal(whole: Path, out: Path, name: str) -> str:
    """The words with which a bundle so harmed is refused, or nothing where it loads."""
    harms, _, kinds = ALL[name]
    try:
        loading.load(harmed(whole, out, *harms, kinds=kinds))
    except EngineRefused as refused:
        return str(refused)
    return ""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The tiny bundle on a wider vectorizer."""
    return make_bundle(tmp_path_factory.mktemp("wide"), dim=index_harms.DIM)


@pytest.mark.parametrize("name", ALL)
def test_harms_are_refused(tiny: Made, wide: Made, tmp_path: Path, name: str) -> None:
    told = refusal((wide if name in WIDE else tiny).parts, tmp_path, name)
    assert re.search(ALL[name][1], told), told or "it loaded"
    assert all(word in told for word in ("found ", "expected ", "; "))


@pytest.mark.parametrize(
    ("kinds", "changes"),
    [
        pytest.param((), (), id="whole"),
        pytest.param(("vectorizer",), (), id="vectorizer-alone"),
        pytest.param((), (boosted(3),), id="trees"),
        pytest.param((), (ranked(weights={"similarity": 2.0}),), id="ranker"),
        pytest.param((), (routed(GOOD_ROUTE),), id="routes"),
        pytest.param((), (routed(GOOD_ROUTE.replace("\n", "\r\n")),), id="lines-end-otherwise"),
        pytest.param((), (content("head.intent", "head.json", lambda raw: raw.replace(b"\n", b"\r\n")),), id="json-too"),
    ],
)  # fmt: skip
def test_harms_controls_load(
    tiny: Made, tmp_path: Path, kinds: tuple[str, ...], changes: tuple[Harm, ...]
) -> None:
    """What every harmed bundle is without its harm: rebuilt the same way, it loads."""
    engine = loading.load(harmed(tiny.parts, tmp_path, *changes, kinds=kinds))
    assert engine.vectorizer.encode(["hello"])


def test_harms_control_of_another_index_loads(wide: Made, tmp_path: Path) -> None:
    engine = loading.load(harmed(wide.parts, tmp_path, whole_index, kinds=("vectorizer", "head", "index")))
    assert engine.replies is not None and len(engine.replies) == index_harms.ROWS


def test_harms_are_refused_when_optimised(tiny: Made, tmp_path: Path) -> None:
    """Under -O asserts are gone; no refusal is one."""
    done = subprocess.run(
        [sys.executable, "-O", "-m", "tests.nlu.test_harms", str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, f"{len(ALL)} refused"), done.stdout + done.stderr


def test_harms_empty_index_finds_nothing(tiny: Made, tmp_path: Path) -> None:
    """An index that says it has no rows is one; it finds nothing, rather than a row that is not there."""

    def emptied(folder: Path) -> None:
        shutil.rmtree(folder / "index.chitchat")
        build_index(
            [],
            np.zeros((0, DIM), np.float32),
            folder / "index.chitchat",
            personas=PERSONAS,
            surfaces=SURFACES,
        )
        shutil.copy(folder / "head.intent" / canaries.FILE, folder / "index.chitchat")

    engine = loading.load(harmed(tiny.parts, tmp_path, emptied))
    assert engine.replies is not None and len(engine.replies) == 0
    vector = engine.vectorizer.encode(["hello"], tokens=False)[0].sentence
    assert (
        engine.replies.search(vector, 5, persona=None, surface=None, as_of=datetime(2026, 6, 2, tzinfo=UTC))
        == []
    )


def alive(kind: type) -> int:
    gc.collect()
    return sum(type(each) is kind for each in gc.get_objects())


def mapped(bundle: Bundle) -> bool:
    return str(bundle.path) in Path("/proc/self/maps").read_text()


def test_harms_refused_load_holds_nothing(tiny: Made, tmp_path: Path) -> None:
    """The last part to load is wrong; whoever keeps the error to tell why keeps neither models nor mappings."""
    harm = spec("cold.phrases", "cold.json", vectorizer="0" * 64)
    bundle = harmed(tiny.parts, tmp_path, harm)
    before = alive(Vectorizer)
    with pytest.raises(EngineRefused) as refused:
        loading.load(bundle)
    assert refused.value.part == "cold cache"
    assert (alive(Vectorizer), mapped(bundle)) == (before, False)


def test_harms_refused_load_would_hold_all(tiny: Made, tmp_path: Path) -> None:
    """The negative control of the one above: the frames of the error are what would hold it."""
    bundle = harmed(tiny.parts, tmp_path, spec("cold.phrases", "cold.json", vectorizer="0" * 64))
    before = alive(Vectorizer)
    with pytest.raises(EngineRefused) as refused:
        loading._load(bundle, {}, "cpu", "own", ("", ""))
    assert (alive(Vectorizer), mapped(bundle)) == (before + 1, True)
    loading._let_go(refused.value)
    assert (alive(Vectorizer), mapped(bundle)) == (before, False)


def main(folder: Path) -> None:
    if __debug__:
        sys.exit("not optimised: this proves nothing")
    tiny, wide = make_bundle(folder / "tiny"), make_bundle(folder / "wide", dim=index_harms.DIM)
    loading.load(tiny.bundle)
    loading.load(wide.bundle)
    loaded = [
        name
        for i, name in enumerate(ALL)
        if not refusal((wide if name in WIDE else tiny).parts, folder / str(i), name)
    ]
    sys.stdout.write("\n".join(loaded) if loaded else f"{len(ALL)} refused")
    sys.exit(1 if loaded else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
