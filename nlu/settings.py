"""Everything an operator can set, from NLU_* environment variables; read once, in serve.py, and passed down."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Drop = Literal["replies", "boosted", "context", "token"]


class Settings(BaseSettings):
    """Each comment says what the value costs."""

    model_config = SettingsConfigDict(env_prefix="NLU_", frozen=True, extra="ignore")

    host: str = "127.0.0.1"  # 0.0.0.0 opens the port to the network
    port: int = Field(50051, ge=0, le=65535)  # 0 takes any free one
    processes: int = Field(1, ge=1, le=256)  # workers on the one port; each has its own model and caches
    metrics_host: str = "127.0.0.1"  # metrics have a listener of their own
    metrics_port: int = Field(9464, ge=0, le=65535)  # Prometheus; 0 takes any free one
    metrics: bool = True
    http_port: int | None = Field(None, ge=0, le=65535)  # the HTTP gateway; unset: none; needs the http extra
    control: str = ""  # unix:/run/chorus/control.sock, or host:port with mTLS; empty: no control service
    control_names: tuple[str, ...] = ()  # who may use it over host:port, by a name in their certificate
    reflection: bool = True  # off in production: it tells every caller the schema

    bundle: Path | None = None  # a bundle folder; unset: pull `channel` from `store`
    store: str = ""  # a folder, file:///folder or s3://bucket/prefix; both unset: the shipped bundle
    channel: str = "prod"
    statics: Path = Path("/var/lib/chorus")  # where pulled bundles are kept
    keyring: Path | None = None  # trusted public keys, from the deployment and never from the store
    require_signature: bool = False  # production: true
    signatures: int = Field(1, ge=1, le=8)  # how many trusted keys must have signed a bundle
    min_seq: int = Field(0, ge=0)  # a floor from the deployment: no release below it is taken
    # Break glass: this bundle and no other, floor and expiry aside.
    pin: str = Field("", pattern="^([0-9a-f]{64})?$")
    watch_s: float = Field(30.0, ge=0)  # how often the channel is looked at; 0: only at the start
    pull_s: float = Field(120.0, gt=0)  # one pull may take this long
    pull_bytes_s: int = Field(0, ge=0)  # one pull takes at most this rate; 0: as fast as it comes
    trial: Literal["unsigned", "always", "never"] = "unsigned"  # which bundles a child process loads first
    memory_bytes: int = Field(0, ge=0)  # a swap that would not fit is refused; 0: what cgroup or machine has

    redis: SecretStr = SecretStr("")  # redis://:password@host:6379/0; empty: no shared cache
    cache_secret: SecretStr = SecretStr("")  # authenticates values in a Redis that others can write to
    tls_cert: Path | None = None  # PEM; with tls_key it turns TLS on; both are read again when they change
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # PEM; callers must then present a certificate it signed (mTLS)
    callers: Path | None = None  # tokens (hashed) and rates of those who may call; unset: everybody may

    milvus_uri: str = ""  # http://host:19530; only for a bundle whose replies live there
    milvus_token: SecretStr = SecretStr("")  # user:password or an API key
    # own: faster; shared: one copy for all processes of a machine
    index_pages: Literal["own", "shared"] = Field(
        default_factory=lambda data: "own" if data.get("processes", 1) == 1 else "shared"
    )
    index_placement: str = "cpu"  # or gpu (all in turn), gpu:0, ...: where vectors of replies are searched
    lru_bytes: int = Field(64 * 2**20, ge=0)  # about 10,000 phrases with token vectors
    answers_bytes: int = Field(16 * 2**20, ge=0)  # about 6,000 whole answers; 0 computes every answer anew

    # threads of the vectorizer, of one process
    workers: int = Field(
        default_factory=lambda data: max(1, (os.cpu_count() or 1) // data.get("processes", 1)), ge=1
    )
    queue: int = Field(256, ge=1)  # phrases that may wait for the vectorizer; more only wait longer
    queue_s: float = Field(0.1, gt=0)  # nor may they wait longer than this, by the measured time of one
    in_flight: int = Field(512, ge=1)  # calls handled at once; more are refused
    # What is left out, first to last, of an answer for which time is short.
    drops: tuple[Drop, ...] = ("replies", "boosted", "context", "token")
    deadline_s: float = Field(1.0, gt=0)  # for callers that set none
    max_deadline_s: float = Field(5.0, gt=0)  # nobody waits longer, whatever they ask for
    drain_s: float = Field(10.0, ge=0)  # how long accepted calls may take once we are told to stop
    # For so long of it calls are still taken on, until the platform knows we are going.
    linger_s: float = Field(0.0, ge=0)
    shadow_sample: Path | None = None  # keeps flips of shadow heads here, phrases redacted
    shadow_sample_rows: int = Field(1000, ge=1)  # the newest are kept
    persona: str = "calm"  # for callers that name none; ignored where the bundle does not have it
    log_level: str = "INFO"
    log_format: Literal["text", "json"] = "text"  # json: one object a line
    otlp: str = ""  # http://collector:4317; traces go there; needs the otel extra

    @property
    def milvus(self) -> tuple[str, str]:
        """Address and token."""
        return self.milvus_uri, self.milvus_token.get_secret_value()

    @model_validator(mode="after")
    def _needs_keys(self) -> Settings:
        if self.require_signature and self.keyring is None:
            raise ValueError(
                "NLU_REQUIRE_SIGNATURE is set but NLU_KEYRING is not; point it at the file of trusted public keys"
            )
        return self


def shipped_bundle() -> Path:
    """The bundle that comes with the package, whether or not it is there; its vectorizer part is the student."""
    return Path(str(files("statics") / "shipped"))
