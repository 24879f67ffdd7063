"""One policy, one judge, six things that a leader may want of it."""
