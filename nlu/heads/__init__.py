"""The sprint: labelled phrases in, a measured head in a bundle out. Read train.py first."""
