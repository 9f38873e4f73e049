"""Attention of each head over the few keys that it found nearest, or that were named for it: the search and the reading."""
