"""Depthwise causal convolution over a few tokens, with its tail as the carried state."""
