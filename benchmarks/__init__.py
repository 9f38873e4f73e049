"""Measurements, side by side with what a user would otherwise have; each writes JSON under results/."""
