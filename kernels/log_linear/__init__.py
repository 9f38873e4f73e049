"""Linear recurrences whose past is kept in a logarithmic number of matrices, read with a weight each (Fenwick tree)."""
