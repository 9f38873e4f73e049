"""Causal convolution with filters as long as the text, whose carried state is the past inputs themselves."""
