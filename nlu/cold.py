"""The cold table: Encodings of the phrases people say most, built once, memory-mapped, shared by all workers of a machine.

Files: `keys.bin` (sorted pairs of uint64, the first 128 bits of the key), `ends.bin` (uint64 end of each record in
`records.bin`), `records.bin` (records as nlu/record.py packs them), `cold.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from annotators.annotator import Encoding
from nlu.errors import EngineRefused
from nlu.record import key, pack, unpack

SPEC_FILE = "cold.json"
KEYS_FILE, ENDS_FILE, RECORDS_FILE = "keys.bin", "ends.bin", "records.bin"
_REMEDY = "build it again with `nlu cache build`"


class ColdSpec(BaseModel):
    """cold.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    vectorizer: str
    dim: int
    token_dim: int
    phrases: int


class ColdTable:
    """A read-only map from phrase to Encoding. Thread-safe; one lookup is a binary search and one record."""

    def __init__(self, folder: Path) -> None:
        """Map a folder; raises EngineRefused where sizes do not add up."""
        try:
            self.spec = ColdSpec.model_validate_json((folder / SPEC_FILE).read_bytes())
        except (FileNotFoundError, ValidationError) as error:
            raise EngineRefused(
                "cold cache", found=f"no valid {SPEC_FILE}", expected="a cold table", remedy=_REMEDY
            ) from error
        self._keys = _mapped(folder / KEYS_FILE, np.dtype("<u8"), 2 * self.spec.phrases).reshape(-1, 2)
        self._high = np.ascontiguousarray(self._keys[:, 0])
        ends = _mapped(folder / ENDS_FILE, np.dtype("<u8"), self.spec.phrases)
        self._bounds = np.concatenate([np.zeros(1, np.uint64), ends]).astype(np.int64)
        size = int(self._bounds[-1])
        self._records = _mapped(folder / RECORDS_FILE, np.dtype("u1"), size)
        if (np.diff(self._bounds) < 0).any():
            raise EngineRefused(
                "cold cache", found="records out of order", expected="ascending ends", remedy=_REMEDY
            )

    def __len__(self) -> int:
        return self.spec.phrases

    def get(self, phrase_key: bytes) -> Encoding | None:
        """The Encoding stored under a key of nlu.record.key, or None."""
        high, low = _halves(phrase_key)
        row = int(self._high.searchsorted(high))
        while row < len(self._high) and self._high[row] == high:
            if self._keys[row, 1] == low:
                record = self._records[self._bounds[row] : self._bounds[row + 1]]
                return unpack(record.tobytes(), dim=self.spec.dim, token_dim=self.spec.token_dim)
            row += 1
        return None


def write(
    out: Path, encodings: Iterable[tuple[str, Encoding]], *, fingerprint: str, dim: int, token_dim: int
) -> int:
    """Write a cold table of (phrase, Encoding) pairs and return how many phrases it holds; deterministic."""
    records = {key(fingerprint, phrase): pack(encoding) for phrase, encoding in encodings}
    ordered = sorted(records, key=_halves)
    out.mkdir(parents=True, exist_ok=True)
    np.array([_halves(phrase_key) for phrase_key in ordered], "<u8").tofile(out / KEYS_FILE)
    np.cumsum([len(records[phrase_key]) for phrase_key in ordered], dtype="<u8").tofile(out / ENDS_FILE)
    with (out / RECORDS_FILE).open("wb") as file:
        file.writelines(records[phrase_key] for phrase_key in ordered)
    spec = ColdSpec(vectorizer=fingerprint, dim=dim, token_dim=token_dim, phrases=len(ordered))
    (out / SPEC_FILE).write_text(json.dumps(spec.model_dump(), sort_keys=True) + "\n")
    return len(ordered)


def _halves(phrase_key: bytes) -> tuple[int, int]:
    return int.from_bytes(phrase_key[:8], "little"), int.from_bytes(phrase_key[8:16], "little")


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    found = path.stat().st_size if path.exists() else -1
    if found != count * dtype.itemsize:
        raise EngineRefused(
            "cold cache",
            found=f"{path.name} of {found} bytes",
            expected=f"{count * dtype.itemsize}",
            remedy=_REMEDY,
        )
    if not count:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", shape=(count,))
