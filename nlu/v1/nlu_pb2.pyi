import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_USER: _ClassVar[Role]
    ROLE_ASSISTANT: _ClassVar[Role]

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    STATUS_OK: _ClassVar[Status]
    STATUS_DEGRADED: _ClassVar[Status]
    STATUS_SKIPPED: _ClassVar[Status]
    STATUS_ERROR: _ClassVar[Status]

class Source(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_UNSPECIFIED: _ClassVar[Source]
    SOURCE_COLD: _ClassVar[Source]
    SOURCE_LRU: _ClassVar[Source]
    SOURCE_REDIS: _ClassVar[Source]
    SOURCE_MODEL: _ClassVar[Source]
    SOURCE_ANSWER: _ClassVar[Source]

class Precision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRECISION_FLOAT32: _ClassVar[Precision]
    PRECISION_FLOAT16: _ClassVar[Precision]
ROLE_UNSPECIFIED: Role
ROLE_USER: Role
ROLE_ASSISTANT: Role
STATUS_UNSPECIFIED: Status
STATUS_OK: Status
STATUS_DEGRADED: Status
STATUS_SKIPPED: Status
STATUS_ERROR: Status
SOURCE_UNSPECIFIED: Source
SOURCE_COLD: Source
SOURCE_LRU: Source
SOURCE_REDIS: Source
SOURCE_MODEL: Source
SOURCE_ANSWER: Source
PRECISION_FLOAT32: Precision
PRECISION_FLOAT16: Precision

class Hypothesis(_message.Message):
    __slots__ = ("text", "confidence")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    text: str
    confidence: float
    def __init__(self, text: _Optional[str] = ..., confidence: _Optional[float] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("role", "text")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    role: Role
    text: str
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., text: _Optional[str] = ...) -> None: ...

class Retrieval(_message.Message):
    __slots__ = ("top_k", "avoid_ids", "tags")
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    AVOID_IDS_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    top_k: int
    avoid_ids: _containers.RepeatedScalarFieldContainer[str]
    tags: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, top_k: _Optional[int] = ..., avoid_ids: _Optional[_Iterable[str]] = ..., tags: _Optional[_Iterable[str]] = ...) -> None: ...

class UnderstandRequest(_message.Message):
    __slots__ = ("request_id", "hypotheses", "context", "locale", "persona", "surface", "as_of", "annotators", "retrieval", "explain", "raw_scores")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HYPOTHESES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    LOCALE_FIELD_NUMBER: _ClassVar[int]
    PERSONA_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    AS_OF_FIELD_NUMBER: _ClassVar[int]
    ANNOTATORS_FIELD_NUMBER: _ClassVar[int]
    RETRIEVAL_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    RAW_SCORES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    hypotheses: _containers.RepeatedCompositeFieldContainer[Hypothesis]
    context: _containers.RepeatedCompositeFieldContainer[Turn]
    locale: str
    persona: str
    surface: str
    as_of: _timestamp_pb2.Timestamp
    annotators: _containers.RepeatedScalarFieldContainer[str]
    retrieval: Retrieval
    explain: bool
    raw_scores: bool
    def __init__(self, request_id: _Optional[str] = ..., hypotheses: _Optional[_Iterable[_Union[Hypothesis, _Mapping]]] = ..., context: _Optional[_Iterable[_Union[Turn, _Mapping]]] = ..., locale: _Optional[str] = ..., persona: _Optional[str] = ..., surface: _Optional[str] = ..., as_of: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., annotators: _Optional[_Iterable[str]] = ..., retrieval: _Optional[_Union[Retrieval, _Mapping]] = ..., explain: _Optional[bool] = ..., raw_scores: _Optional[bool] = ...) -> None: ...

class Label(_message.Message):
    __slots__ = ("label", "score", "raw_score", "accepted", "threshold")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    RAW_SCORE_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    label: str
    score: float
    raw_score: float
    accepted: bool
    threshold: float
    def __init__(self, label: _Optional[str] = ..., score: _Optional[float] = ..., raw_score: _Optional[float] = ..., accepted: _Optional[bool] = ..., threshold: _Optional[float] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("label", "text", "start", "end", "score")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    label: str
    text: str
    start: int
    end: int
    score: float
    def __init__(self, label: _Optional[str] = ..., text: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., score: _Optional[float] = ...) -> None: ...

class Annotation(_message.Message):
    __slots__ = ("name", "kind", "status", "labels", "spans", "disagreement", "version", "note", "out_of_scope", "restored")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    DISAGREEMENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_SCOPE_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    status: Status
    labels: _containers.RepeatedCompositeFieldContainer[Label]
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    disagreement: float
    version: str
    note: str
    out_of_scope: float
    restored: str
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., status: _Optional[_Union[Status, str]] = ..., labels: _Optional[_Iterable[_Union[Label, _Mapping]]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., disagreement: _Optional[float] = ..., version: _Optional[str] = ..., note: _Optional[str] = ..., out_of_scope: _Optional[float] = ..., restored: _Optional[str] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("id", "text", "score", "similarity", "features", "prompt")
    class FeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    id: str
    text: str
    score: float
    similarity: float
    features: _containers.ScalarMap[str, float]
    prompt: str
    def __init__(self, id: _Optional[str] = ..., text: _Optional[str] = ..., score: _Optional[float] = ..., similarity: _Optional[float] = ..., features: _Optional[_Mapping[str, float]] = ..., prompt: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("total", "normalize", "encode", "annotate", "search", "rank")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    ANNOTATE_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    total: int
    normalize: int
    encode: int
    annotate: int
    search: int
    rank: int
    def __init__(self, total: _Optional[int] = ..., normalize: _Optional[int] = ..., encode: _Optional[int] = ..., annotate: _Optional[int] = ..., search: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class Versions(_message.Message):
    __slots__ = ("bundle", "vectorizer", "service")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    VECTORIZER_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    vectorizer: str
    service: str
    def __init__(self, bundle: _Optional[str] = ..., vectorizer: _Optional[str] = ..., service: _Optional[str] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("to", "name", "because")
    TO_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BECAUSE_FIELD_NUMBER: _ClassVar[int]
    to: str
    name: str
    because: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, to: _Optional[str] = ..., name: _Optional[str] = ..., because: _Optional[_Iterable[str]] = ...) -> None: ...

class UnderstandReply(_message.Message):
    __slots__ = ("request_id", "phrase", "annotations", "replies", "versions", "timings_ns", "source", "hypothesis", "route", "skipped")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PHRASE_FIELD_NUMBER: _ClassVar[int]
    ANNOTATIONS_FIELD_NUMBER: _ClassVar[int]
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_NS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    HYPOTHESIS_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    phrase: str
    annotations: _containers.RepeatedCompositeFieldContainer[Annotation]
    replies: _containers.RepeatedCompositeFieldContainer[Candidate]
    versions: Versions
    timings_ns: Timings
    source: Source
    hypothesis: int
    route: Route
    skipped: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_id: _Optional[str] = ..., phrase: _Optional[str] = ..., annotations: _Optional[_Iterable[_Union[Annotation, _Mapping]]] = ..., replies: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ..., timings_ns: _Optional[_Union[Timings, _Mapping]] = ..., source: _Optional[_Union[Source, str]] = ..., hypothesis: _Optional[int] = ..., route: _Optional[_Union[Route, _Mapping]] = ..., skipped: _Optional[_Iterable[str]] = ...) -> None: ...

class UnderstandBatchRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[UnderstandRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[UnderstandRequest, _Mapping]]] = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("request_id", "reply", "problem")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reply: UnderstandReply
    problem: Problem
    def __init__(self, request_id: _Optional[str] = ..., reply: _Optional[_Union[UnderstandReply, _Mapping]] = ..., problem: _Optional[_Union[Problem, _Mapping]] = ...) -> None: ...

class UnderstandBatchReply(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[Outcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("texts", "tokens", "precision")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    tokens: bool
    precision: Precision
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., tokens: _Optional[bool] = ..., precision: _Optional[_Union[Precision, str]] = ...) -> None: ...

class Vectors(_message.Message):
    __slots__ = ("phrase", "sentence", "sentence_f16", "tokens", "tokens_f16", "token_starts", "token_ends", "source")
    PHRASE_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_F16_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_F16_FIELD_NUMBER: _ClassVar[int]
    TOKEN_STARTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ENDS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    phrase: str
    sentence: _containers.RepeatedScalarFieldContainer[float]
    sentence_f16: bytes
    tokens: _containers.RepeatedScalarFieldContainer[float]
    tokens_f16: bytes
    token_starts: _containers.RepeatedScalarFieldContainer[int]
    token_ends: _containers.RepeatedScalarFieldContainer[int]
    source: Source
    def __init__(self, phrase: _Optional[str] = ..., sentence: _Optional[_Iterable[float]] = ..., sentence_f16: _Optional[bytes] = ..., tokens: _Optional[_Iterable[float]] = ..., tokens_f16: _Optional[bytes] = ..., token_starts: _Optional[_Iterable[int]] = ..., token_ends: _Optional[_Iterable[int]] = ..., source: _Optional[_Union[Source, str]] = ...) -> None: ...

class EncodeReply(_message.Message):
    __slots__ = ("vectors", "dim", "token_dim", "versions")
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    TOKEN_DIM_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    vectors: _containers.RepeatedCompositeFieldContainer[Vectors]
    dim: int
    token_dim: int
    versions: Versions
    def __init__(self, vectors: _Optional[_Iterable[_Union[Vectors, _Mapping]]] = ..., dim: _Optional[int] = ..., token_dim: _Optional[int] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Component(_message.Message):
    __slots__ = ("name", "kind", "digest", "state", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    digest: str
    state: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., digest: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Head(_message.Message):
    __slots__ = ("name", "kind", "task", "labels", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    task: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    version: str
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., task: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_request_bytes", "max_text_bytes", "max_code_points", "max_hypotheses", "max_context_turns", "max_batch")
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TEXT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_CODE_POINTS_FIELD_NUMBER: _ClassVar[int]
    MAX_HYPOTHESES_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TURNS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    max_request_bytes: int
    max_text_bytes: int
    max_code_points: int
    max_hypotheses: int
    max_context_turns: int
    max_batch: int
    def __init__(self, max_request_bytes: _Optional[int] = ..., max_text_bytes: _Optional[int] = ..., max_code_points: _Optional[int] = ..., max_hypotheses: _Optional[int] = ..., max_context_turns: _Optional[int] = ..., max_batch: _Optional[int] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("state", "bundle", "channel", "seq", "since", "expires", "pinned", "wanted", "reason")
    STATE_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    state: str
    bundle: str
    channel: str
    seq: int
    since: _timestamp_pb2.Timestamp
    expires: _timestamp_pb2.Timestamp
    pinned: str
    wanted: str
    reason: str
    def __init__(self, state: _Optional[str] = ..., bundle: _Optional[str] = ..., channel: _Optional[str] = ..., seq: _Optional[int] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., pinned: _Optional[str] = ..., wanted: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("versions", "components", "heads", "dim", "token_dim", "replies", "personas", "surfaces", "limits", "channel", "seq", "release")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    TOKEN_DIM_FIELD_NUMBER: _ClassVar[int]
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    PERSONAS_FIELD_NUMBER: _ClassVar[int]
    SURFACES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    versions: Versions
    components: _containers.RepeatedCompositeFieldContainer[Component]
    heads: _containers.RepeatedCompositeFieldContainer[Head]
    dim: int
    token_dim: int
    replies: int
    personas: _containers.RepeatedScalarFieldContainer[str]
    surfaces: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    channel: str
    seq: int
    release: Release
    def __init__(self, versions: _Optional[_Union[Versions, _Mapping]] = ..., components: _Optional[_Iterable[_Union[Component, _Mapping]]] = ..., heads: _Optional[_Iterable[_Union[Head, _Mapping]]] = ..., dim: _Optional[int] = ..., token_dim: _Optional[int] = ..., replies: _Optional[int] = ..., personas: _Optional[_Iterable[str]] = ..., surfaces: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., channel: _Optional[str] = ..., seq: _Optional[int] = ..., release: _Optional[_Union[Release, _Mapping]] = ...) -> None: ...
