"""The recipe `variety`: what a leader can want that no regression can, against the best refit there is."""
