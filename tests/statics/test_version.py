"""statics.version: ranges of the service."""

from importlib.metadata import PackageNotFoundError

import pytest

from statics import version
from statics.version import satisfies, service_version


@pytest.mark.parametrize(
    ("running", "spec", "expected"),
    [
        ("1.2.3", ">=1,<2", True),
        ("2.0.0", ">=1,<2", False),
        ("1.3.0rc1", ">=1,<2", True),
        ("1.3.0.dev4", ">=1.2", True),
        ("0.0.0+unknown", ">=0.1", False),
        ("0.0.0+unknown", "", True),
        ("1.2.3", "==1.2.*", True),
    ],
)
def test_version_satisfies_ranges(running: str, spec: str, expected: bool) -> None:
    assert satisfies(running, spec) is expected


@pytest.mark.parametrize(("running", "spec"), [("one", ">=1"), ("1.0", "newest")])
def test_version_refuses_what_it_cannot_read(running: str, spec: str) -> None:
    with pytest.raises(ValueError, match="nvalid"):
        satisfies(running, spec)


def test_version_of_a_checkout_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", missing)
    assert service_version() == "0.0.0+unknown"


def test_version_is_that_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "version", {"chorus-nlu": "4.5.6"}.__getitem__)
    assert service_version() == "4.5.6"
