"""Runnable recipes: each folder is one experiment, from data to result."""
