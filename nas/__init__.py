"""Commands, the search loop, samplers and workers: the only floor that knows all the others."""
