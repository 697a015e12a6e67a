"""The groups of the command line, a file each; nlu/__main__.py puts them together."""
