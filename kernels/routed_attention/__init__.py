"""Softmax attention over blocks of keys that each query names for itself, with the logarithm of its sum."""
