"""statics.errors: one clear line, one code each."""

import pytest

from statics import errors
from statics.errors import StaticsError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StaticsError)]


def test_errors_read_as_one_line() -> None:
    error = errors.SizeMismatch(part="head.a/x", found="3 bytes", expected="4 bytes", remedy="pull again")
    assert str(error) == "size-mismatch: head.a/x: found 3 bytes, expected 4 bytes; remedy: pull again"
    assert (error.part, error.found, error.expected, error.remedy) == (
        "head.a/x",
        "3 bytes",
        "4 bytes",
        "pull again",
    )


def test_errors_have_distinct_codes() -> None:
    assert len(KINDS) == 20
    assert len({kind.code for kind in KINDS}) == 20
    assert all(kind.code.replace("-", "").isalpha() and kind.code.islower() for kind in KINDS)


def test_errors_are_drawn_in_the_docstring() -> None:
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in KINDS)


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("a\nERROR forged", "a\\nERROR forged"),
        ("\x1b[2J", "\\x1b[2J"),
        ("имя", "имя"),
        ("x" * 5000, "x" * 399 + "…"),
    ],
)
def test_errors_show_hostile_texts_on_one_bounded_line(hostile: str, shown: str) -> None:
    error = errors.FileUnexpected(part=hostile, found="", expected="", remedy="")
    assert error.part == shown
    assert "\n" not in str(error)
