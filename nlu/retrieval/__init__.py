"""Replies on the training side: dialogs, the ranker learnt from them, and how good retrieval is."""
