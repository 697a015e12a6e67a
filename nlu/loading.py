"""Bundle to Engine: every part loaded, checked against the others, and warm before anyone is answered.

A part whose digest did not change is taken over from the engine before, so a sprint's new head costs its own kilobytes.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from annotators import table
from annotators.annotator import Heard, HeardTurn
from annotators.fleet import Fleet
from annotators.table import Head
from index.adapter import Adapter
from index.layout import INDEX_FILE
from index.matrix import Pages
from index.replies import Replies, Retriever
from nlu import canaries
from nlu.cold import ColdTable
from nlu.engine import Engine
from nlu.errors import EngineRefused, VectorizerRefused
from nlu.graphs import check_graphs
from nlu.normalizer import normalize
from nlu.ranker import Ranker
from nlu.routes import Routes
from nlu.types import Versions
from nlu.vectorizer import Vectorizer, is_whole
from statics.bundle import Bundle
from statics.manifest import Component
from statics.version import service_version

logger = logging.getLogger(__name__)

Part = TypeVar("Part")

WARM_UP = (
    "hi",
    "what's the weather like",
    "remind me to take the bread out of the oven in twenty five minutes please",
)


def load(
    bundle: Bundle,
    *,
    before: Engine | None = None,
    placement: str = "cpu",
    pages: Pages = "own",
    milvus: tuple[str, str] = ("", ""),
) -> Engine:
    """Load a verified bundle; raises EngineRefused where its parts do not belong together, and then holds nothing of it.

    `placement` is where the vectors of replies are searched: cpu, gpu or gpu:N; `pages` whose memory they lie in. `milvus` is the address and the token
    of the server that a bundle may point to instead.
    """
    try:
        return _load(bundle, {} if before is None else before.parts, placement, pages, milvus)
    except BaseException as error:
        _let_go(error)
        raise


def _load(
    bundle: Bundle, known: dict[str, object], placement: str, pages: Pages, milvus: tuple[str, str]
) -> Engine:
    loader = _Loader(bundle, known)
    vectorizer = loader.one("vectorizer", _vectorizer)
    if vectorizer is None:
        raise EngineRefused(
            "bundle", found="no vectorizer", expected="exactly one", remedy="build it with a vectorizer"
        )
    promised = bundle.of_kind("vectorizer")[0].provides.get("vectorizer")
    if promised != vectorizer.fingerprint:
        raise EngineRefused(
            "vectorizer", found=f"fingerprint {vectorizer.fingerprint}", expected=f"{promised} as the manifest says",
            remedy="publish the bundle again; the manifest was not made from this folder",
        )  # fmt: skip
    _check_canaries(bundle, vectorizer)
    heads, shadows = (
        [_checked_head(loader, component, vectorizer) for component in bundle.of_kind(kind)]
        for kind in ("head", "shadow")
    )
    fleet = Fleet(heads, shadows)
    replies = _checked_width(
        loader.one("index", partial(load_replies, placement=placement, pages=pages, milvus=milvus)),
        vectorizer,
    )
    engine = Engine(
        bundle=bundle,
        versions=Versions(bundle.digest, vectorizer.fingerprint, service_version()),
        vectorizer=vectorizer,
        fleet=fleet,
        replies=replies,
        adapter=_checked_adapter(loader.one("adapter", Adapter.load), vectorizer),
        ranker=checked_ranker(loader.one("ranker", Ranker.load) or Ranker.linear(), fleet, vectorizer),
        routes=_checked_routes(loader.one("routes", Routes.load), fleet, replies),
        cold=_checked_fingerprint(loader.one("cold", ColdTable), vectorizer),
        parts=loader.parts,
    )
    _warm_up(vectorizer)
    logger.info(
        "loaded bundle %s: %d heads, %d shadows, %d reply rows",
        bundle.digest[:12],
        len(heads),
        len(shadows),
        len(engine.replies or ()),
    )
    return engine


def _let_go(error: BaseException | None) -> None:
    """Whoever keeps an error to tell why keeps its frames too, and they the parts of the load that was refused."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # libraries do raise errors that are their own cause
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class _Loader:
    """Loads components, or takes them over by digest."""

    def __init__(self, bundle: Bundle, known: dict[str, object]) -> None:
        self._bundle, self._known = bundle, known
        self.parts: dict[str, object] = {}

    def part(self, component: Component, make: Callable[[Path], Part]) -> Part:
        loaded = self._known.get(_key(component))
        if loaded is None:
            try:
                loaded = make(self._bundle.folder(component))
            except (EngineRefused, MemoryError):
                raise
            except Exception as error:  # of bytes made to harm, a parser may raise anything
                told = isinstance(error, ValueError | VectorizerRefused)
                raise EngineRefused(
                    f"{component.kind} {component.name}",
                    found=str(error) if told else f"{type(error).__name__} ({error})",
                    expected="a part this code can load",
                    remedy="rebuild it",
                ) from error
        self.parts[_key(component)] = loaded
        return loaded  # type: ignore[return-value]  # a kind is loaded by one function

    def is_new(self, component: Component) -> bool:
        return _key(component) not in self._known

    def one(self, kind: str, make: Callable[[Path], Part]) -> Part | None:
        components = self._bundle.of_kind(kind)
        if len(components) > 1:
            raise EngineRefused(
                "bundle",
                found=f"{len(components)} parts of kind {kind}",
                expected="at most one",
                remedy="drop one",
            )
        return self.part(components[0], make) if components else None


def _key(component: Component) -> str:
    """By its kind too: the same files may be called a part of another kind in the next bundle. A shadow is a head."""
    kind = "head" if component.kind == "shadow" else component.kind
    return f"{kind} {component.digest}"


def _warm_up(vectorizer: Vectorizer) -> None:
    phrases = [normalize(text, uncased=vectorizer.spec.uncased).text for text in WARM_UP]
    for phrase, encoding in zip(phrases, vectorizer.encode(phrases), strict=True):
        if not is_whole(encoding):
            raise EngineRefused(
                "vectorizer", found=f"vectors of {json.dumps(phrase)} that are not finite or not of unit length",
                expected="such vectors for every phrase", remedy="export it again",
            )  # fmt: skip


def _vectorizer(folder: Path) -> Vectorizer:
    return Vectorizer(folder)


def load_replies(
    folder: Path, *, placement: str = "cpu", pages: Pages = "own", milvus: tuple[str, str]
) -> Retriever:
    """The replies in this folder, or those in Milvus that it points to."""
    if not _points_to_milvus(folder):
        return Replies.load(folder, placement=placement, pages=pages)
    try:
        from index.milvus import MilvusReplies
    except ModuleNotFoundError as error:
        raise ValueError(
            f"found no module {error.name}, expected the 'milvus' extra; pip install 'chorus-nlu[milvus]'"
        ) from error
    uri, token = milvus
    return MilvusReplies.load(folder, uri=uri, token=token, vectorizer=canaries.made_for(folder) or "")


def _points_to_milvus(folder: Path) -> bool:
    """Whether an index part holds no replies but says where they are."""
    try:
        spec = json.loads((folder / INDEX_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(spec, dict) and spec.get("kind") == "milvus"


def _head(folder: Path) -> Head:
    check_graphs(folder)  # of boosted heads; the vectorizer and the ranker look at their own
    return table.load(folder)


def _checked_head(loader: _Loader, component: Component, vectorizer: Vectorizer) -> Head:
    """A live head or a shadow; golden phrases are asked of those that the engine before did not have."""
    head = loader.part(component, _head)
    if head.spec.name != component.name:
        raise EngineRefused(
            component.folder,
            found=f"a head named {head.spec.name}",
            expected=component.name,
            remedy="call the folder after the head",
        )
    _check_head(head, vectorizer)
    if loader.is_new(component):
        _check_golden(head, vectorizer)
    return head


def _check_canaries(bundle: Bundle, vectorizer: Vectorizer) -> None:
    """Artifacts of one vectorizer share one canary file, so there is normally one check, whatever their number."""
    seen: set[str] = set()
    for component in bundle.manifest.components:
        if "vectorizer" not in component.requires:
            continue
        digest = next((file.sha256 for file in component.files if file.name == canaries.FILE), "")
        if digest not in seen:
            canaries.check(f"{component.kind} {component.name}", bundle.folder(component), vectorizer)
            seen.add(digest)


def _check_head(head: Head, vectorizer: Vectorizer) -> None:
    part = f"head {head.spec.name}"
    if head.spec.requires.vectorizer != vectorizer.fingerprint:
        raise EngineRefused(
            part, found=f"trained on vectorizer {head.spec.requires.vectorizer}", expected=vectorizer.fingerprint,
            remedy="retrain the head on this bundle's vectorizer",
        )  # fmt: skip
    widths = (
        ("dim", getattr(head, "dim", vectorizer.dim), vectorizer.dim),
        ("token_dim", getattr(head, "token_dim", vectorizer.token_dim), vectorizer.token_dim),
    )
    for name, found, expected in widths:
        if found != expected:
            raise EngineRefused(
                part,
                found=f"{name} {found}",
                expected=f"{name} {expected}",
                remedy="retrain the head on this bundle's vectorizer",
            )


def _check_golden(head: Head, vectorizer: Vectorizer) -> None:
    """A head must still answer the phrases it was stored with."""
    alone = Fleet([head])
    uncased = vectorizer.spec.uncased

    for golden in head.spec.golden:
        phrases = [
            normalize(text, uncased=uncased)
            for text in (golden.text, *(turn.text for turn in golden.context))
        ]
        encoding, *before = vectorizer.encode([phrase.text for phrase in phrases])
        turns = [HeardTurn(turn.role, said) for turn, said in zip(golden.context, before, strict=True)]
        annotation = alone.annotate(Heard.alone(phrases[0].text, encoding, turns))[0]
        label = annotation.labels[0].label if annotation.labels else ""
        spans = tuple(f"{span.label}={phrases[0].text[span.start : span.end]}" for span in annotation.spans)
        if (golden.label and label != golden.label) or (golden.spans and spans != golden.spans):
            raise EngineRefused(
                f"head {head.spec.name}",
                found=f"{json.dumps(golden.text)} answered with {label or list(spans)}",
                expected=str(golden.label or list(golden.spans)),
                remedy="the head does not fit this vectorizer; retrain it",
            )


def _checked_width(replies: Retriever | None, vectorizer: Vectorizer) -> Retriever | None:
    if replies is not None and replies.dim != vectorizer.dim:
        raise EngineRefused(
            "index",
            found=f"vectors {replies.dim} wide",
            expected=str(vectorizer.dim),
            remedy="rebuild the index with this vectorizer",
        )
    return replies


def _checked_adapter(adapter: Adapter | None, vectorizer: Vectorizer) -> Adapter | None:
    if adapter is None:
        return None
    found = (adapter.spec.requires.vectorizer, adapter.spec.dim)
    if found != (vectorizer.fingerprint, vectorizer.dim):
        raise EngineRefused(
            "adapter", found=f"one of vectorizer {found[0]}, dim {found[1]}",
            expected=f"vectorizer {vectorizer.fingerprint}, dim {vectorizer.dim}",
            remedy="make it again with `nlu index adapt` on this bundle",
        )  # fmt: skip
    return adapter


def checked_ranker(ranker: Ranker, fleet: Fleet, vectorizer: Vectorizer) -> Ranker:
    """The ranker, or EngineRefused where it was made for another vectorizer or looks at labels that are not there."""
    requires = ranker.spec.requires
    if requires is not None and requires.vectorizer != vectorizer.fingerprint:
        raise EngineRefused(
            "ranker", found=f"trained on vectorizer {requires.vectorizer}", expected=vectorizer.fingerprint,
            remedy="train it again with `nlu index train-ranker` on this bundle",
        )  # fmt: skip
    for feature, head, label in ranker.features.labels:
        if head not in fleet.heads or label not in fleet.heads[head].spec.labels:
            raise EngineRefused(
                "ranker",
                found=f"feature {feature!r}, of a label that this bundle does not have",
                expected=f"labels of its heads, {', '.join(fleet.names)}",
                remedy="train it again with `nlu index train-ranker` on this bundle, or add the head",
            )
    return ranker


def _checked_routes(routes: Routes | None, fleet: Fleet, replies: Retriever | None) -> Routes | None:
    if routes is not None:
        routes.check(
            {name: head.spec for name, head in fleet.heads.items()},
            personas=() if replies is None else replies.personas,
            surfaces=() if replies is None else replies.surfaces,
        )
        for told in routes.idle(partial(_carried, replies)):
            logger.warning("%s", told)
    return routes


def _carried(replies: Retriever | None, tag: str) -> bool:
    """Whether any reply has this tag; where replies are kept elsewhere, the table is taken at its word."""
    if isinstance(replies, Replies):
        return bool(replies.items.with_tag(tag).any())
    return replies is not None


def _checked_fingerprint(cold: ColdTable | None, vectorizer: Vectorizer) -> ColdTable | None:
    if cold is not None and (cold.spec.vectorizer, cold.spec.dim, cold.spec.token_dim) != (
        vectorizer.fingerprint,
        vectorizer.dim,
        vectorizer.token_dim,
    ):
        raise EngineRefused(
            "cold cache", found=f"made by vectorizer {cold.spec.vectorizer}", expected=vectorizer.fingerprint,
            remedy="rebuild it with `nlu cache build`",
        )  # fmt: skip
    return cold
