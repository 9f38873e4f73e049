"""Windowed softmax attention that also says how much its exponentials sum to, the largest counted as one."""
