"""One reward for several policies: followers of different sizes and families, and one leader."""
