"""Softmax attention over keys aligned at their end: causal, windowed, grouped, with a decode step."""
