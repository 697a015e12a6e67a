"""Nothing of this project reports to anybody."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nlu.settings import shipped_bundle


@pytest.mark.parametrize(("package", "written"), [("nlu.vectorizer", False), ("nlu.ranker", False)])
def test_telemetry_of_onnxruntime_is_off_wherever_the_service_is_imported(
    tmp_path: os.PathLike[str], package: str, written: bool
) -> None:
    """Its identifier below the home folder is what would show."""
    model = shipped_bundle() / "vectorizer.sentence" / "model.onnx"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    code = f"import {package}, onnxruntime; onnxruntime.InferenceSession(open({str(model)!r}, 'rb').read())"
    subprocess.run(
        [sys.executable, "-c", code], env={**environment, "HOME": str(tmp_path)}, check=True, timeout=60
    )
    found = [name for _, _, names in os.walk(tmp_path) for name in names if name == "deviceid"]
    assert bool(found) is written
