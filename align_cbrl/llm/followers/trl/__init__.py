"""The only files that touch trl's private methods."""
