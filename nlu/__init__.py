"""Chorus NLU, the service. Read `pipeline.py` first: one utterance from text to reply."""

import os

# ONNX Runtime's Linux builds report to their maker, and write an identifier below ~/.cache, unless told not to before it is
# imported. A service that hears people talk reports to nobody.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
