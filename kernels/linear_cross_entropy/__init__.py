"""The head of a language model and its loss in one: mean cross-entropy of a projection to the vocabulary."""
