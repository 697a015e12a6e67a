"""statics.pointer: which manifest is the current release."""

import json
from typing import Any

import pytest

from statics.bundle import Bundle
from statics.errors import FormatTooNew, ManifestInvalid
from statics.pointer import Pointer, dump, parse, pointer_to

POINTER = Pointer(format=1, channel="dev", seq=3, manifest="a" * 64, size=100)


def test_pointer_parses_what_it_dumps() -> None:
    assert parse(dump(POINTER), "channels/dev.json") == POINTER


def test_pointer_points_to_a_manifest(bundle: Bundle) -> None:
    assert pointer_to(bundle.manifest, bundle.digest, 9) == Pointer(
        format=1, channel="dev", seq=1, manifest=bundle.digest, size=9
    )


@pytest.mark.parametrize(
    "change",
    [
        {"seq": -1},
        {"manifest": "../x"},
        {"size": 0},
        {"size": 5 * 1024 * 1024},
        {"channel": ""},
        {"x": 1},
        {"format": 0},
    ],
)
def test_pointer_refuses_changes(change: dict[str, Any]) -> None:
    with pytest.raises(ManifestInvalid, match="channels/dev.json"):
        parse(json.dumps({**json.loads(dump(POINTER)), **change}).encode(), "channels/dev.json")


def test_pointer_names_a_newer_format() -> None:
    with pytest.raises(FormatTooNew, match="channels/dev.json: found format 2"):
        parse(b'{"format": 2}', "channels/dev.json")
