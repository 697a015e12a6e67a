"""Training the vectorizer. Nothing that serves imports from here; it needs the `train` extra."""
