"""What the commands share: options, how bundles are named, and what is printed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from nlu.engine import Engine
    from nlu.settings import Settings
    from statics.bundle import Bundle

out = Console(highlight=False)
BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--bundle",
        help="Bundle folder. Default: NLU_BUNDLE, else NLU_STORE, else the bundle shipped with the package.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead of a page.")]


def one_blas_thread() -> None:
    """The heads' products are small: a team of BLAS threads costs more than it saves. Call before numpy is imported."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def settings_for(bundle: Path | None = None) -> Settings:
    """What the environment says, with a bundle named on the command line in the place of any other."""
    from nlu.settings import Settings

    settings = Settings()
    return settings if bundle is None else settings.model_copy(update={"bundle": bundle})


def verified(folder: Path | None) -> Bundle:
    """The bundle in a folder, or without one what `nlu serve` would serve."""
    from nlu.origin import find_bundle

    return find_bundle(settings_for(folder))


def load(folder: Path | None) -> Engine:
    from nlu import loading

    return loading.load(verified(folder), milvus=settings_for().milvus)


def vectorizer_folder(folder: Path | None) -> Path:
    """The vectorizer of a bundle, or the folder itself where it is one."""
    if folder is not None and (folder / "vectorizer.json").exists():
        return folder
    bundle = verified(folder)
    found: Path = bundle.folder(bundle.of_kind("vectorizer")[0])
    return found


def print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


class extra:
    """Turns a missing optional package into the command that installs it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModuleNotFoundError):
            raise typer.BadParameter(
                f"found no module {error.name}, expected the '{self._name}' extra; pip install 'chorus-nlu[{self._name}]'"
            )
