"""nlu.settings: NLU_* variables become typed values, out-of-range ones an error, and the secret stays one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from nlu.settings import Settings


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables of whoever runs the tests."""
    for name in [name for name in os.environ if name.upper().startswith("NLU_")]:
        monkeypatch.delenv(name)


def test_settings_without_variables_listen_to_this_machine_alone() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.metrics_port) == ("127.0.0.1", 50051, 9464)
    assert (settings.bundle, settings.store, settings.channel) == (None, "", "prod")
    assert (settings.redis, settings.cache_secret) == (SecretStr(""), SecretStr(""))
    assert (settings.keyring, settings.require_signature) == (None, False)
    assert settings.workers == os.cpu_count()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("host", "0.0.0.0", "0.0.0.0"),
        ("port", "0", 0),
        ("port", "65535", 65535),
        ("metrics", "false", False),
        ("bundle", "/srv/bundle", Path("/srv/bundle")),
        ("store", "s3://bucket/prefix", "s3://bucket/prefix"),
        ("redis", "redis://cache:6379/0", SecretStr("redis://cache:6379/0")),
        ("lru_bytes", "0", 0),
        ("workers", "3", 3),
        ("queue", "1", 1),
        ("deadline_s", "0.25", 0.25),
        ("drain_s", "0", 0.0),
        ("shadow_sample", "/var/flips.jsonl", Path("/var/flips.jsonl")),
        ("persona", "lively", "lively"),
    ],
)
def test_settings_read_a_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object
) -> None:
    monkeypatch.setenv(f"NLU_{name.upper()}", text)
    assert getattr(Settings(), name) == value


def test_settings_arguments_win_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NLU_PORT", "1")
    assert Settings(port=2).port == 2


def test_settings_ignore_variables_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "1")
    monkeypatch.setenv("NLU_OF_THE_FUTURE", "1")
    assert Settings() == Settings(port=50051)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "-1"),
        ("port", "65536"),
        ("port", "http"),
        ("metrics_port", "70000"),
        ("metrics", "perhaps"),
        ("lru_bytes", "-1"),
        ("workers", "0"),
        ("queue", "0"),
        ("in_flight", "0"),
        ("deadline_s", "0"),
        ("max_deadline_s", "-1"),
        ("drain_s", "-0.1"),
        ("shadow_sample_rows", "0"),
    ],
)
def test_settings_refuse(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    Settings()  # the control
    monkeypatch.setenv(f"NLU_{name.upper()}", text)
    with pytest.raises(ValidationError, match=f"\n{name}\n"):
        Settings()


def test_settings_refuse_required_signatures_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NLU_REQUIRE_SIGNATURE", "true")
    with pytest.raises(ValidationError, match="NLU_REQUIRE_SIGNATURE is set but NLU_KEYRING is not"):
        Settings()
    monkeypatch.setenv("NLU_KEYRING", "/etc/chorus/keys.json")
    assert Settings().require_signature


def test_settings_never_show_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NLU_CACHE_SECRET", "hunter2")
    settings = Settings()
    assert settings.cache_secret.get_secret_value() == "hunter2"
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump()}"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_settings_are_all_in_their_page_and_nothing_else_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`NLU_([A-Z0-9_]+)`", page))
    assert told == {name.upper() for name in Settings.model_fields}
