"""The two versions a bundle is held against: the format of bundles and the version of the service."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

FORMAT = 1  # of bundles, pointers and state files; raised only when older code could misread a newer file

DISTRIBUTION = "chorus-nlu"


def service_version() -> str:
    """The installed version; `0.0.0+unknown` in a checkout that was never installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "0.0.0+unknown"


def satisfies(version: str, spec: str) -> bool:
    """Whether `version` lies in the PEP 440 range `spec`; pre-releases count like any other version.

    Raises ValueError where one of the two cannot be read.
    """
    return SpecifierSet(spec).contains(Version(version), prereleases=True)
