"""Timings, as medians of repeated runs; never part of the tests."""
