"""Tune reward weights by HPGD, against the search that people run today."""
