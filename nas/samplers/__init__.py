"""Proposers of layouts, each behind the same two verbs; Optuna lives here and nowhere else."""
