"""Chorus NLU, the service. Read `pipeline.py` first: one utterance from text to reply."""
