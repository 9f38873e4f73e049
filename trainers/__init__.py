"""A layout becomes a trained, measured model; returns values, and never writes results."""
