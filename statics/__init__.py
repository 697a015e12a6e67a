"""Statics: versioned, verified bundles of files. Knows files and digests, not what is in them."""

from statics.bundle import Bundle, Change, Part, build, diff
from statics.errors import StaticsError
from statics.locate import open_store
from statics.manifest import Component, File, Manifest
from statics.signing import Keyring
from statics.store import FolderStore, Store

# `verify`, `publish` and `pull` are imported from the modules of the same name.
__all__ = [
    "Bundle",
    "Change",
    "Component",
    "File",
    "FolderStore",
    "Keyring",
    "Manifest",
    "Part",
    "StaticsError",
    "Store",
    "build",
    "diff",
    "open_store",
]
