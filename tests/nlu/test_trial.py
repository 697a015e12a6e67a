"""nlu.trial: what would take this process's memory or time, or end it, takes those of a child, and is refused."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from nlu import canaries, parts, trial
from nlu.errors import EngineRefused
from nlu.ranker import FILE, INPUT, MODEL_FILE, OUTPUT, Requires, Spec
from nlu.settings import Settings
from nlu.trial import Limits, try_load
from nlu.vectorizer import Vectorizer
from statics.bundle import Bundle, build
from tests.tiny import CREATED, Made, make_vectorizer

MIB = 2**20
SETTINGS = Settings()


def bundle_of(folder: Path) -> Bundle:
    """A bundle of the parts in a folder."""
    return build(
        parts.collect(folder), folder.with_name("bundle"), created=CREATED, requires_service=">=0.1.0.dev0"
    )


def burdened(folder: Path, nodes: Sequence[onnx.NodeProto], **held: Any) -> Bundle:
    """A bundle of a vectorizer that first computes `burden` with these nodes, and then answers as if it had not."""
    model_path = make_vectorizer(folder / "vectorizer.tiny") / "model.onnx"
    model = onnx.load(model_path)
    graph = model.graph
    next(node for node in graph.node if node.output[0] == "sentence").output[0] = "unburdened"
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in held.items())
    graph.node.extend(nodes)
    graph.node.extend(
        [
            helper.make_node("ReduceMax", ["burden"], ["most"], keepdims=0),
            helper.make_node("Sub", ["most", "most"], ["nothing"]),
            helper.make_node("Add", ["unburdened", "nothing"], ["sentence"]),
        ]
    )
    onnx.save(model, str(model_path))
    return bundle_of(folder)


def of_memory(folder: Path) -> Bundle:
    """512 MiB, by a product that only whoever computes it knows."""
    nodes = [
        helper.make_node("Mul", ["high", "wide"], ["shape"]),
        helper.make_node("Expand", ["one", "shape"], ["burden"]),
    ]
    return burdened(folder, nodes, one=np.float32(1), high=np.array([1 << 14]), wide=np.array([1 << 13]))


def of_time(folder: Path, *, products: int) -> Bundle:
    """So many products of matrices, each of 2 billion operations."""
    names = [f"m{i}" for i in range(products)] + ["burden"]
    nodes = [
        helper.make_node("Expand", ["one", "shape"], [names[0]]),
        *(
            helper.make_node("MatMul", [before, names[0]], [after])
            for before, after in zip(names, names[1:], strict=False)
        ),
    ]
    return burdened(folder, nodes, one=np.float32(0), shape=np.array([1024, 1024]))


def of_a_tree(folder: Path, *, depth: int) -> Bundle:
    """A ranker of one tree, each of whose questions has a leaf on one side and the next question on the other."""
    vectorizer = Vectorizer(make_vectorizer(folder / "vectorizer.tiny"))
    nodes, leaves = range(depth), range(depth, 2 * depth + 1)
    nothing = [0] * len(leaves)
    tree = helper.make_node(
        "TreeEnsembleRegressor",
        [INPUT],
        [OUTPUT],
        domain="ai.onnx.ml",
        n_targets=1,
        nodes_treeids=[0] * (2 * depth + 1),
        nodes_nodeids=[*nodes, *leaves],
        nodes_modes=["BRANCH_LEQ"] * depth + ["LEAF"] * len(leaves),
        nodes_featureids=[0] * (2 * depth + 1),
        nodes_values=[float(i) for i in range(2 * depth + 1)],
        nodes_truenodeids=[*nodes[1:], leaves[0], *nothing],
        nodes_falsenodeids=[*leaves[1:], *nothing],
        target_ids=nothing,
        target_treeids=nothing,
        target_nodeids=[*leaves],
        target_weights=[1.0] * len(leaves),
    )
    graph = helper.make_graph(
        [tree],
        "deep",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["rows", 1])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["rows", 1])],
    )
    opsets = [helper.make_opsetid("", 8), helper.make_opsetid("ai.onnx.ml", 1)]
    ranker = folder / "ranker.deep"
    ranker.mkdir()
    (ranker / MODEL_FILE).write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=4).SerializeToString()
    )
    requires = Requires(vectorizer=vectorizer.fingerprint)
    spec = Spec(kind="trees", features=("similarity",), requires=requires)
    (ranker / FILE).write_text(spec.model_dump_json())
    canaries.write(ranker, vectorizer)
    return bundle_of(folder)


def test_trial_accepts_an_honest_bundle(tiny: Made) -> None:
    found = try_load(tiny.bundle, SETTINGS)
    assert 0 < found.rss_bytes < 256 * MIB
    assert found.seconds > 0


def test_trial_kills_a_load_that_takes_memory(tmp_path: Path) -> None:
    bundle = of_memory(tmp_path / "parts")
    before = psutil.Process().memory_info().rss
    with pytest.raises(EngineRefused, match="of size 536870912 .* within 512 MiB and 50 s of CPU") as refused:
        try_load(bundle, SETTINGS, limits=Limits(data_bytes=512 * MIB, cpu_s=50, wall_s=100))
    assert "\n" not in str(refused.value)
    assert psutil.Process().memory_info().rss - before < 64 * MIB
    # The control: with room it loads, and what it took is measured.
    assert try_load(bundle, SETTINGS).rss_bytes > 512 * MIB


def test_trial_kills_a_load_that_takes_time(tmp_path: Path) -> None:
    limits = Limits(data_bytes=2048 * MIB, cpu_s=5, wall_s=100)
    try_load(of_time(tmp_path / "short" / "parts", products=1), SETTINGS, limits=limits)  # the control
    with pytest.raises(EngineRefused, match="found a load of more than 5 s of CPU"):
        try_load(of_time(tmp_path / "long" / "parts", products=10_000), SETTINGS, limits=limits)


def test_trial_does_not_wait_for_ever(tiny: Made) -> None:
    try_load(tiny.bundle, SETTINGS)  # the control
    with pytest.raises(EngineRefused, match=r"found a load of more than 0\.05 s"):
        try_load(tiny.bundle, SETTINGS, limits=Limits(data_bytes=2048 * MIB, cpu_s=30, wall_s=0.05))
    assert _child(psutil.Process()) is None


def test_trial_refuses_what_crashes(tmp_path: Path) -> None:
    """A tree so deep that ONNX Runtime, which goes down it by recursion, ends the process."""
    try_load(of_a_tree(tmp_path / "low" / "parts", depth=100), SETTINGS)  # the control
    bundle = of_a_tree(tmp_path / "deep" / "parts", depth=50_000)
    with pytest.raises(EngineRefused, match="found a load that died of SIG(SEGV|BUS)"):
        try_load(bundle, SETTINGS)


def test_trial_tells_why_a_part_is_refused(tiny: Made, stranger: Made, tmp_path: Path) -> None:
    mixed = shutil.copytree(tiny.parts, tmp_path / "parts")
    shutil.copy(stranger.parts / "head.intent" / "weights.safetensors", mixed / "head.intent")
    with pytest.raises(EngineRefused, match="found head intent: found .* answered with"):
        try_load(bundle_of(mixed), SETTINGS)


def test_trial_refuses_a_bundle_that_was_changed_since(tiny: Made, stranger: Made) -> None:
    swapped = Bundle(stranger.bundle.path, tiny.bundle.manifest, tiny.bundle.digest)
    with pytest.raises(EngineRefused, match="it was changed"):
        try_load(swapped, SETTINGS)


def _child(parent: psutil.Process) -> psutil.Process | None:
    """The trial among the children of a process, which may have others."""
    for child in parent.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if trial.__name__ in child.cmdline():
                return child
    return None


def test_trial_child_is_confined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it works: its limits, its priority, its environment; and what is told when the system kills it."""
    monkeypatch.setenv("NLU_MILVUS_TOKEN", "a-secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    bundle = of_time(tmp_path / "parts", products=10_000)
    limits = Limits(data_bytes=1024 * MIB, cpu_s=100, wall_s=100)
    told: list[str] = []
    before = os.nice(0)

    def tried() -> None:
        try:
            try_load(bundle, Settings(), limits=limits)
        except EngineRefused as error:
            told.append(str(error))

    thread = threading.Thread(target=tried)
    thread.start()
    try:
        child = _until(lambda: _child(psutil.Process()))
        _until(lambda: child.nice() == 19 and child.memory_maps() and child.num_fds() < trial.OPEN_FILES)
        _until(lambda: child.rlimit(psutil.RLIMIT_CORE)[0] == 0)
        assert child.rlimit(psutil.RLIMIT_DATA)[0] == limits.data_bytes
        assert child.rlimit(psutil.RLIMIT_CPU)[0] == limits.cpu_s
        assert child.rlimit(psutil.RLIMIT_NOFILE)[0] == trial.OPEN_FILES
        assert Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip() == "1000"
        assert not any(name.startswith(("NLU_", "AWS_")) for name in child.environ())
        assert "a-secret" not in " ".join([*child.cmdline(), *child.environ().values()])
        child.kill()
    finally:
        thread.join(100)
    assert told and "a load that the system killed" in told[0]
    assert os.nice(0) == before


def test_trial_child_ends_with_its_parent(tmp_path: Path) -> None:
    bundle = of_time(tmp_path / "parts", products=10_000)
    code = (
        "import sys; from pathlib import Path; from nlu.trial import try_load; from nlu.settings import Settings;"
        "from statics.verify import verify;"
        "try_load(verify(Path(sys.argv[1]), service='0.1.0'), Settings())"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(bundle.path)]) as parent:
        child = _until(lambda: _child(psutil.Process(parent.pid)))
        _until(lambda: child.nice() == 19)
        assert child.is_running()  # the control
        parent.send_signal(signal.SIGKILL)
    _until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def _until(found: Callable[[], Any]) -> Any:
    """What this gives, once it gives something."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.01)
    raise AssertionError("it never came")
