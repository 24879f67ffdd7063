"""Objectives: what the leader wants of the best response."""
