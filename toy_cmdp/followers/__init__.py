"""Followers of a table: exact, iterative, and trained on samples."""
