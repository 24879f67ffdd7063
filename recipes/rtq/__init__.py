"""The recipe `rtq`: bias, variance and cost of randomly truncated hypergradients against the number of levels."""
