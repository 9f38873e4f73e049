"""Softmax attention over a first part of the keys whose length each query states, with its weights."""
