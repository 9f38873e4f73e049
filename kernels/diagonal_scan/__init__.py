"""Linear recurrences of a vector, in which each channel fades by its own factor and knows no other channel."""
