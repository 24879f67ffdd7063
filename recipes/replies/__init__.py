"""Replies of a support desk: a small world for the recipes, with a judge that a reward model misreads."""
