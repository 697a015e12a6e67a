"""The nouns of one request and one reply; plain data, no behaviour, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Literal

from annotators.annotator import Annotation

Role = Literal["user", "assistant"]
RouteTo = Literal["skill", "persona", "promotion", "chitchat", "clarify", "out_of_scope"]


class Source(Enum):
    """Where an Encoding came from, cheapest first."""

    ANSWER = "answer"  # nothing was encoded: this engine had given the whole answer before
    COLD = "cold"
    LRU = "lru"
    REDIS = "redis"
    MODEL = "model"


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One reading of the user's speech; `confidence` None means the recogniser gave none."""

    text: str
    confidence: float | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """An earlier turn of the dialog."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How many replies are wanted, and which must not come back."""

    top_k: int = 5
    avoid: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()  # only replies that carry one of these; empty: all


@dataclass(frozen=True, slots=True)
class Utterance:
    """One request, as the dialog manager put it. `as_of` None means the server's clock."""

    hypotheses: tuple[Hypothesis, ...]
    context: tuple[Turn, ...] = ()
    request_id: str = ""
    locale: str = ""
    persona: str = ""
    surface: str = ""
    as_of: datetime | None = None
    annotators: frozenset[str] | None = None
    retrieval: Retrieval = field(default_factory=Retrieval)
    explain: bool = False
    raw_scores: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A reply that could be said, after ranking. `features` is filled only when an explanation was asked for."""

    id: str
    text: str
    score: float
    similarity: float
    prompt: str
    features: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Route:
    """What is to happen next, by the bundle's table. `because` is filled only when an explanation was asked for."""

    to: RouteTo
    name: str
    because: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Versions:
    """Which bundle, which vectorizer and which code answered."""

    bundle: str
    vectorizer: str
    service: str


@dataclass(frozen=True, slots=True)
class Timings:
    """Nanoseconds by stage."""

    total: int
    normalize: int
    encode: int
    annotate: int
    search: int
    rank: int


@dataclass(frozen=True, slots=True)
class Reply:
    """Everything `Understand` returns."""

    phrase: str
    hypothesis: int
    annotations: tuple[Annotation, ...]
    replies: tuple[Candidate, ...]
    versions: Versions
    timings: Timings
    source: Source
    route: Route | None = None  # None: the bundle has no table of routes
    searched: bool = True  # False: replies are kept elsewhere, and could not be reached
    skipped: tuple[str, ...] = ()  # what was left out for want of time: heads, and "replies"


@dataclass(frozen=True, slots=True)
class DescribedPart:
    """A component of the bundle."""

    name: str
    kind: str
    digest: str


@dataclass(frozen=True, slots=True)
class DescribedHead:
    """A head and what it can say."""

    name: str
    kind: str
    task: str
    labels: tuple[str, ...]
    version: str


@dataclass(frozen=True, slots=True)
class Release:
    """What a process serves, and what became of the release that should follow it; of the message of this name."""

    state: Literal["HOLDING", "SERVING", "DRAINING"] = "HOLDING"
    bundle: str = ""
    channel: str = ""
    seq: int = 0
    since: datetime | None = None
    expires: datetime | None = None
    pinned: str = ""
    wanted: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Description:
    """What an engine serves."""

    versions: Versions
    channel: str
    seq: int
    components: tuple[DescribedPart, ...]
    heads: tuple[DescribedHead, ...]
    dim: int
    token_dim: int
    reply_rows: int
    personas: tuple[str, ...]
    surfaces: tuple[str, ...]
