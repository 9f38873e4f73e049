"""Mamba's recurrence: every channel keeps a vector that fades by rate times a step chosen from the token."""
