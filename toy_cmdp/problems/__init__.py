"""One file for each problem, from the literature or as a test."""
