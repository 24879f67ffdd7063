"""Estimators of the hypergradient from the follower's paths, and what tells how good they are."""
