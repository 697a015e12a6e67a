"""Light heads on the shared Encoding: one kind of head, one file; `fleet.py` runs them together."""
