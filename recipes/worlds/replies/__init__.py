"""Replies of a support desk: a small world for the laboratory, with a judge that a reward model misreads."""
