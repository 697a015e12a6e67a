"""Everything one bundle gives, loaded: immutable, used whole, swapped whole."""

from __future__ import annotations

from dataclasses import dataclass

from annotators.fleet import Fleet
from index.adapter import Adapter
from index.replies import Retriever
from nlu.cold import ColdTable
from nlu.ranker import Ranker
from nlu.routes import Routes
from nlu.types import DescribedHead, DescribedPart, Description, Versions
from nlu.vectorizer import Vectorizer
from statics.bundle import Bundle


@dataclass(frozen=True)
class Engine:
    """One request uses one Engine from its first line to its last, so an answer never mixes versions."""

    bundle: Bundle
    versions: Versions
    vectorizer: Vectorizer
    fleet: Fleet
    replies: Retriever | None
    adapter: Adapter | None  # moves a query before the search, and nothing else
    ranker: Ranker
    routes: Routes | None
    cold: ColdTable | None
    parts: dict[str, object]  # by kind and digest, for the next load to reuse

    def describe(self) -> Description:
        """What is served, for Describe and the command line."""
        manifest, replies = self.bundle.manifest, self.replies
        return Description(
            versions=self.versions,
            channel=manifest.channel,
            seq=manifest.seq,
            components=tuple(
                DescribedPart(part.name, part.kind, part.digest) for part in manifest.components
            ),
            heads=tuple(
                DescribedHead(head.spec.name, head.spec.kind, head.spec.task, head.spec.labels, head.version)
                for head in self.fleet.heads.values()
            ),
            dim=self.vectorizer.dim,
            token_dim=self.vectorizer.token_dim,
            reply_rows=0 if replies is None else len(replies),
            personas=() if replies is None else replies.personas,
            surfaces=() if replies is None else replies.surfaces,
        )
