"""The flow of docs/adapter.md where it is served: the search sees q', nothing else does; what does not belong is refused."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from index.adapter import Adapter, Change, Exam, Requires, Residual, Spec, bound
from index.exact import ExactIndex
from nlu import canaries, loading, parts
from nlu.engine import Engine
from nlu.errors import EngineRefused
from nlu.heads.questions import read_library
from nlu.serve import pipeline_of
from nlu.settings import Settings
from nlu.types import Hypothesis, Reply, Retrieval, Utterance
from nlu.vectorizer import Vectorizer
from statics.bundle import Bundle, build
from statics.errors import StaticsError
from tests.tiny import CREATED, DIM, Made

PHRASES = ("hello", "what can i see on tv", "you annoy me so much", "привет, как дела")
NOW = datetime(2026, 6, 3, tzinfo=UTC)


def adapter(vectorizer: Vectorizer, *, dim: int = DIM) -> Adapter:
    """One that moves every query as far as it may."""
    rng = np.random.default_rng(0)
    residual = Residual.of(rng.standard_normal((3, dim)), rng.standard_normal((dim, 3)), 0.4)
    change = Change(before=0.5, after=0.75, low=0.1, high=0.4)
    exam = Exam(questions=20, recall_at_1=change, recall_at_10=change, mrr=change)
    spec = Spec(
        dim=dim, rank=3, eps=0.4, bound=bound(0.4), factor=1.0, max_harm=0.01, new=exam, old=exam, rows=3,
        requires=Requires(vectorizer=vectorizer.fingerprint),
    )  # fmt: skip
    return Adapter(spec, residual)


def bundled(folder: Path, out: Path) -> Bundle:
    return build(parts.collect(folder), out, created=CREATED, requires_service=">=0.1.0.dev0,<1")


@pytest.fixture
def folder(tiny: Made, vectorizer: Vectorizer, tmp_path: Path) -> Path:
    """The parts of the tiny bundle with an adapter; every wrong one in these tests starts as this one."""
    found = Path(shutil.copytree(tiny.parts, tmp_path / "parts"))
    adapter(vectorizer).save(found / "adapter.main")
    canaries.write(found / "adapter.main", vectorizer)
    return found


async def answered(engine: Engine, text: str) -> Reply:
    utterance = Utterance((Hypothesis(text),), as_of=NOW, retrieval=Retrieval(top_k=7))
    async with pipeline_of(engine, Settings()) as pipeline:
        return await pipeline.understand(utterance, deadline=time.monotonic() + 30)


def cosines(bundle: Bundle, query: NDArray[np.float32]) -> dict[str, float]:
    """Prompt to similarity, by the numpy index over the rows of the bundle."""
    index = bundle.folder(bundle.of_kind("index")[0])
    library = read_library(index, lambda phrases: np.zeros((len(phrases), DIM), np.float32), uncased=True)
    hits = ExactIndex(library.rows).search(query, len(library.rows))
    return {
        library.prompt_of(int(row)): float(score) for score, row in zip(hits.scores, hits.rows, strict=True)
    }


async def test_adapter_absent_searches_with_the_vector_itself(tiny: Made, engine: Engine) -> None:
    assert engine.adapter is None
    assert engine.replies is not None
    for text in PHRASES:
        reply = await answered(engine, text)
        vector = engine.vectorizer.encode([text])[0].sentence
        persona = Settings().persona if Settings().persona in engine.replies.personas else None
        hits = engine.replies.search(vector, 28, persona=persona, surface=None, as_of=NOW)
        assert {(hit.item.id, hit.similarity) for hit in hits} >= {
            (c.id, c.similarity) for c in reply.replies
        }
        assert reply.replies


async def test_adapter_present_searches_with_the_moved_vector(
    folder: Path, engine: Engine, tmp_path: Path
) -> None:
    bundle = bundled(folder, tmp_path / "bundle")
    adapted = loading.load(bundle)
    assert adapted.adapter is not None
    learnt = adapted.adapter.residual
    for text in PHRASES:
        query = engine.vectorizer.encode([text])[0].sentence.astype(np.float64)
        query /= np.linalg.norm(query)
        delta = learnt.up.astype(np.float64) @ (learnt.down.astype(np.float64) @ query)
        delta *= min(1.0, learnt.eps / float(np.linalg.norm(delta)))
        expected = cosines(bundle, (query + delta).astype(np.float32))
        plain = cosines(bundle, query.astype(np.float32))
        found = {
            candidate.prompt: candidate.similarity for candidate in (await answered(adapted, text)).replies
        }
        assert found
        for prompt, similarity in found.items():
            assert similarity == pytest.approx(expected[prompt], abs=2e-6)
            assert abs(similarity - plain[prompt]) <= bound(learnt.eps) + 2e-6
        assert max(abs(found[prompt] - plain[prompt]) for prompt in found) > 0.05  # the adapter is at work


async def test_adapter_lets_heads_see_the_vector_as_it_was(
    folder: Path, engine: Engine, tmp_path: Path
) -> None:
    adapted = loading.load(bundled(folder, tmp_path / "bundle"))
    for text in PHRASES:
        before, after = await answered(engine, text), await answered(adapted, text)
        assert after.annotations == before.annotations
        assert after.replies != before.replies


async def test_adapter_without_replies_is_idle(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "index.chitchat")
    reply = await answered(loading.load(bundled(folder, tmp_path / "bundle")), "hello")
    assert (reply.replies, bool(reply.annotations)) == ((), True)


def test_adapter_that_did_not_change_is_taken_over(folder: Path, tmp_path: Path) -> None:
    before = loading.load(bundled(folder, tmp_path / "a"))
    head = folder / "head.intent" / "head.json"
    head.write_text(json.dumps(json.loads(head.read_bytes()) | {"made_by": "the next sprint"}))
    after = loading.load(bundled(folder, tmp_path / "b"), before=before)
    assert after.adapter is before.adapter is not None


def test_adapter_beside_another_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "adapter.main", folder / "adapter.other")
    with pytest.raises(EngineRefused, match="found 2 parts of kind adapter, expected at most one"):
        loading.load(bundled(folder, tmp_path / "bundle"))


def test_adapter_of_another_vectorizer_is_refused(
    folder: Path, stranger: Made, vectorizer: Vectorizer, tmp_path: Path
) -> None:
    """At every door: the manifest's chain, the canaries where it is forged, and the adapter's own word."""
    other = Vectorizer(stranger.parts / "vectorizer.tiny")
    adapter(other).save(folder / "adapter.main")
    canaries.write(folder / "adapter.main", other)
    with pytest.raises(StaticsError) as refused:
        bundled(folder, tmp_path / "chain")
    assert refused.value.code == "fingerprint-mismatch"

    file = folder / "adapter.main" / canaries.FILE
    with safe_open(file, "numpy") as opened:
        phrases = opened.metadata()["phrases"]
    save_file(load_file(file), file, metadata={"phrases": phrases, "vectorizer": vectorizer.fingerprint})
    with pytest.raises(EngineRefused, match="canaries that moved"):
        loading.load(bundled(folder, tmp_path / "canaries"))

    canaries.write(folder / "adapter.main", vectorizer)
    with pytest.raises(
        EngineRefused, match=f"adapter: found one of vectorizer {other.fingerprint}.*nlu index adapt"
    ):
        loading.load(bundled(folder, tmp_path / "word"))


def test_adapter_of_another_width_is_refused(folder: Path, vectorizer: Vectorizer, tmp_path: Path) -> None:
    adapter(vectorizer, dim=DIM - 2).save(folder / "adapter.main")
    with pytest.raises(EngineRefused, match=f"adapter: found .* dim {DIM - 2}, expected .* dim {DIM};"):
        loading.load(bundled(folder, tmp_path / "bundle"))


def test_adapter_that_is_malformed_is_refused(folder: Path, vectorizer: Vectorizer, tmp_path: Path) -> None:
    made = adapter(vectorizer)
    broken = np.full_like(made.residual.up, np.nan)
    replace(made, residual=replace(made.residual, up=broken)).save(folder / "adapter.main")
    with pytest.raises(EngineRefused, match="adapter main: .*NaN or infinite values in tensor 'up'"):
        loading.load(bundled(folder, tmp_path / "bundle"))
