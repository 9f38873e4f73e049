"""Linear attention whose matrix passes through a nonlinearity before it is read, a block of tokens at a time."""
