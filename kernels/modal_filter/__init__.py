"""Filters that are sums of fading modes, and what such a filter carries from the past: the diagonal state spaces."""
