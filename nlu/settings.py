"""Everything an operator can set, from NLU_* environment variables; read once, in serve.py, and passed down."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Each comment says what the value costs."""

    model_config = SettingsConfigDict(env_prefix="NLU_", frozen=True, extra="ignore")

    host: str = "127.0.0.1"  # 0.0.0.0 opens the port to the network
    port: int = Field(50051, ge=0, le=65535)  # 0 takes any free one
    metrics_port: int = Field(9464, ge=0, le=65535)  # Prometheus; 0 takes any free one
    metrics: bool = True

    bundle: Path | None = None  # a bundle folder; unset: pull `channel` from `store`
    store: str = ""  # a folder, file:///folder or s3://bucket/prefix; both unset: the shipped bundle
    channel: str = "prod"
    statics: Path = Path("/var/lib/chorus")  # where pulled bundles are kept
    keyring: Path | None = None  # trusted public keys, from the deployment and never from the store
    require_signature: bool = False  # production: true

    redis: SecretStr = SecretStr("")  # redis://:password@host:6379/0; empty: no shared cache
    cache_secret: SecretStr = SecretStr("")  # authenticates values in a Redis that others can write to
    milvus_uri: str = ""  # http://host:19530; only for a bundle whose replies live there
    milvus_token: SecretStr = SecretStr("")  # user:password or an API key
    index_pages: Literal["own", "shared"] = (
        "own"  # own: faster; shared: one copy for all processes of a machine
    )
    index_placement: str = "cpu"  # or gpu (all in turn), gpu:0, ...: where vectors of replies are searched
    lru_bytes: int = Field(64 * 2**20, ge=0)  # about 10,000 phrases with token vectors
    answers_bytes: int = Field(16 * 2**20, ge=0)  # about 6,000 whole answers; 0 computes every answer anew

    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)  # threads of the vectorizer
    queue: int = Field(256, ge=1)  # phrases that may wait for the vectorizer; more only wait longer
    in_flight: int = Field(512, ge=1)  # calls handled at once; more are refused
    deadline_s: float = Field(1.0, gt=0)  # for callers that set none
    max_deadline_s: float = Field(5.0, gt=0)  # nobody waits longer, whatever they ask for
    drain_s: float = Field(10.0, ge=0)  # how long accepted calls may take once we are told to stop
    shadow_sample: Path | None = None  # keeps flips of shadow heads here, phrases redacted
    shadow_sample_rows: int = Field(1000, ge=1)  # the newest are kept
    persona: str = "calm"  # for callers that name none; ignored where the bundle does not have it
    log_level: str = "INFO"

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
