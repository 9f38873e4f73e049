"""Attention over few keys that a light index chose for each query: choice, scores of the index, and the reading."""
