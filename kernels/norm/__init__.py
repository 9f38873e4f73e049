"""Norms over the last dimension: root-mean-square, with the gate that a mixer puts beside it, and to length one."""
