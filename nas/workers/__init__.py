"""Pools that run trials, inline or on Ray, behind submit and next_done; they never touch storage."""
